"""A tiny model of every causal LM that transformers knows: hand-written sizes, and general ones for the others."""

from typing import Any

import torch

LARGEST = 20_000_000  # parameters of a tiny model
BASE: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
HEADS: dict[str, Any] = {**BASE, "head_dim": 16}
LATENT: dict[str, Any] = {  # multi-head latent attention
    "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}  # fmt: skip
ROUTED: dict[str, Any] = {
    "moe_intermediate_size": 64, "n_routed_experts": 6, "num_experts_per_tok": 4, "n_group": 1, "topk_group": 1,
    "n_shared_experts": 1, "first_k_dense_replace": 1,
}  # fmt: skip
EXPERTS: dict[str, Any] = {"num_experts": 6, "num_experts_per_tok": 4, "moe_intermediate_size": 64}
MAMBA: dict[str, Any] = {
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 16
}  # fmt: skip
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
TWICE = {
    "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 16
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
GEMMA4_TEXT: dict[str, Any] = {
    **HEADS, **TWICE, "global_head_dim": 32, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 512,
    "num_kv_shared_layers": 0,
}  # fmt: skip

SIZES: dict[str, dict[str, Any]] = {
    "bamba": {**BASE, **MAMBA, "attn_layer_indices": [1]},
    "cohere_compass_text": {
        **HEADS, **ALTERNATING,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {
        "vocab_size": 512, "d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 256, "pad_token_id": 0,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    },
    "deepseek_v2": {**BASE, **LATENT, **ROUTED, "topk_method": "greedy", "head_dim": 8},
    "dots3_note_text": {
        **BASE, **LATENT, **ROUTED, "head_dim": 16, "layer_types": ["full_attention"] * 2, "index_topk": 16,
        "index_head_dim": 16, "index_n_heads": 2, "mlp_layer_types": ["dense", "sparse"],
        "shared_experts_intermediate_size": 64, "per_layer_config": {},
    },
    "dots1": {**HEADS, **ROUTED, "layer_types": ["full_attention"] * 2},
    "falcon": {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512, "ffn_hidden_size": 256,
        "bos_token_id": 1, "eos_token_id": 1,
    },
    "falcon_h1": {**HEADS, **MAMBA, "mamba_d_ssm": 128},
    "gemma3": {"text_config": {**HEADS, **ALTERNATING}, "vision_config": VISION, "mm_tokens_per_image": 4,
               "image_token_index": 511, "boi_token_index": 510, "eoi_token_index": 509},
    "gemma3n_text": {
        **HEADS, **TWICE, "intermediate_size": [96] * 4, "num_kv_shared_layers": 0, "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0] * 4, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 512,
        "altup_num_inputs": 2,
    },
    "gemma4_text": GEMMA4_TEXT,
    "granitemoehybrid": {
        **BASE, **MAMBA, "mamba_d_head": 16, "layer_types": ["mamba", "attention"], "num_local_experts": 6,
        "num_experts_per_tok": 4, "shared_intermediate_size": 64,
    },
    "gpt_neo": {
        "vocab_size": 512, "hidden_size": 64, "num_layers": 2, "attention_types": [[["global", "local"], 1]],
        "num_heads": 4, "intermediate_size": 128, "max_position_embeddings": 256, "window_size": 16,
    },
    "hunyuan_v1_dense": HEADS,
    "hunyuan_v1_moe": {**HEADS, "num_experts": 4, "moe_topk": 2, "moe_intermediate_size": 64},
    "lfm2_moe": {**BASE, **EXPERTS, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    "longcat_flash": {
        **HEADS, **LATENT, "num_layers": 2, "ffn_hidden_size": 128, "expert_ffn_hidden_size": 64,
        "n_routed_experts": 4, "zero_expert_num": 2, "moe_topk": 2, "qk_rope_head_dim": 16,
    },
    "mamba2": {
        "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 16, "expand": 2,
        "state_size": 16, "n_groups": 1, "chunk_size": 16,
    },
    "ministral": {**HEADS, **ALTERNATING},
    "nemotron_h": {
        **HEADS, "num_hidden_layers": 4, "hybrid_override_pattern": "M*-E", "mamba_num_heads": 8, "mamba_head_dim": 16,
        "ssm_state_size": 16, "n_groups": 1, "chunk_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 64, "moe_shared_expert_intermediate_size": 64, "n_group": 1, "topk_group": 1,
    },
    "qwen4_exp_text": {
        **HEADS, **EXPERTS, "shared_expert_intermediate_size": 64, "linear_key_head_dim": 16,
        "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "layer_types": ["linear_attention", "full_attention"], "hc_count": 2, "hc_lowrank": 8, "ple_embed_dim": 8,
        "heads_per_ngram": 2, "ngram_vocab_size_base": 64, "split_ngram_parts": 2,
        "make_ngram_vocab_size_divisible_by": 8, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16,
        "indexer_budget": 16, "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {
        **HEADS, "num_hidden_layers": 3, "lru_width": 64, "attention_window_size": 16,
        "block_types": ["recurrent", "recurrent", "attention"],
    },
    "xlnet": {"vocab_size": 512, "d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 128},
    "zamba": {
        "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 4, "intermediate_size": 128, "mamba_d_state": 8, "mamba_dt_rank": 8,
        "attention_hidden_size": 128, "attention_head_dim": 32, "use_mamba_kernels": False,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
    },
    "zamba2": {
        "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
        "intermediate_size": 128, "mamba_d_state": 16, "mamba_headdim": 16, "n_mamba_heads": 8, "mamba_ngroups": 1,
        "chunk_size": 16, "num_mem_blocks": 1, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "use_mem_eff_path": False,
    },
    "zaya": {**BASE, "num_experts": 4, "num_experts_per_tok": 1},
}  # fmt: skip

VQ = {"base_channels": 32, "latent_channels": 32, "num_embeddings": 64, "embed_dim": 32, "channel_multiplier": [1]}
MROPE = {"text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}}
HALF_MROPE = {
    "text_config": {
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5
        }
    }
}  # fmt: skip
WRAPPER_SIZES: dict[str, dict[str, Any]] = {
    "chameleon": {"vocabulary_map": {"<image>": 511, "IMGIMGA": 500}, "vq_config": VQ},
    "emu3": {
        "vocabulary_map": {"<image>": 511, "<|extra_200|>": 510},
        "vq_config": {**VQ, "hidden_size": 32, "codebook_size": 64, "embed_dim": 4, "latent_channels": 4},
    },
    "ernie4_5_vl_moe": {
        "text_config": {
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]},
            "moe_intermediate_size": [64, 32], "mlp_layer_types": ["dense", "sparse"],
        }
    },
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 4}},
    "granite4_vision": {
        "deepstack_layer_map": [[0, 0]], "vision_config": {"hidden_size": 64},
        "qformer_config": {"hidden_size": 64, "num_attention_heads": 4, "encoder_hidden_size": 64},
    },
    "janus": {"vq_config": {**VQ, "num_patches": 4, "projection_dim": 64, "image_token_embed_dim": 64},
              "vision_config": {"num_image_tokens": 4}},
    "mllama": {"text_config": {"num_hidden_layers": 3, "cross_attention_layers": [1]}},
    "molmo2": {
        "vision_config": {"image_size": [28, 28], "num_position_embeddings": 4},
        "adapter_config": {
            "vision_feature_layer": [-1, -2], "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2,
            "head_dim": 16, "intermediate_size": 64, "text_hidden_size": 64,
        },
    },
    "dots3_note": {}, "moss_transcribe_diarize": {},
    "muse_glimmer": {"out_hidden_size": 64, "projector_hidden_size": 64},
    "muse_spark": {
        "out_hidden_size": 64, "projector_hidden_size": 64,
        "audio_config": {"hidden_sizes": [32] * 4, "depths": [1] * 4, "out_hidden_size": 64},
    },
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}, "vision_hidden_size": 32},
    "phi4_multimodal": {
        "audio_config": {
            "hidden_size": 32, "intermediate_size": 64, "num_blocks": 2, "num_attention_heads": 2,
            "ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32, "nemo_conv_channels": 32,
        }
    },
    "glm46v": MROPE, "glm4v": MROPE, "glm4v_moe": HALF_MROPE, "glm_ocr": MROPE, "glmga": MROPE, "paddleocr_vl": MROPE,
    "glm5_next": {
        "text_config": {
            **LATENT, "qk_rope_head_dim": 0, "head_dim": 0, "linear_head_dim": 16, "linear_num_heads": 4, "hc_mult": 2,
            "index_topk": 16, "index_head_dim": 16, "index_n_heads": 2, "index_kpool": 4,
        }
    },
    "hunyuan_vl": {
        "text_config": {
            "head_dim": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2, 2]},
        }
    },
    "inkling2": {"vision_config": {"text_hidden_size": 64}},
    "qwen2_5_omni_thinker": MROPE, "qwen2_5_vl": MROPE, "qwen2_vl": MROPE,
    "step3p7": {"text_config": {"sliding_window": 16}},
}  # fmt: skip
LISTED = ("layers", "indexes", "layer_indices", "index")  # numbers of layers, in names

TOWER: dict[str, Any] = {  # tried on every configuration without a vocabulary
    **VISION, "depth": 2, "num_heads": 2, "embed_dim": 32, "out_hidden_size": 64, "num_layers": 2, "d_model": 32,
    "mlp_dim": 64, "output_dim": 64, "projection_dim": 64, "num_key_value_heads": 2, "head_dim": 16,
    "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 64, "num_position_embeddings": 16,
    "num_channels": 3, "out_channels": 64, "hidden_sizes": [32], "depths": [1],
}  # fmt: skip

GENERAL: dict[str, Any] = {  # tried on every configuration that has such a setting
    **HEADS, **LATENT, **ROUTED, **EXPERTS,
    "n_layer": 2, "n_head": 4, "n_embd": 64, "n_positions": 256, "n_ctx": 256, "d_model": 64, "n_heads": 4,
    "n_layers": 2, "ffn_dim": 128, "word_embed_proj_dim": 64, "num_local_experts": 6,
    "shared_expert_intermediate_size": 64, "decoder_layers": 2, "encoder_layers": 2, "decoder_attention_heads": 4,
    "encoder_attention_heads": 4, "decoder_ffn_dim": 128, "encoder_ffn_dim": 128, "embedding_size": 64,
    "sliding_window": 32, "num_layers": 2, "d_ff": 128, "num_heads": 4, "d_kv": 16, "rotary_dim": 8,
    "multi_query": False, "state_size": 8, "num_groups": 1, "moe_num_experts": 6, "moe_topk": 4,
    "ffn_hidden_size": 128, "ffn_hidden_dim": 128, "num_key_value_heads": 2,
}  # fmt: skip


def tiny_config(model_type: str) -> Any:
    """Return a configuration of a model of a few hundred thousand parameters; whatever refuses the sizes is raised."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    if SIZES.get(model_type):
        return kind(**SIZES[model_type])
    if model_type in WRAPPER_SIZES:
        return tiny_wrapper_config(model_type)
    default = kind()
    text = default.get_text_config()
    if text is default:
        return _accepted(kind, _sizes_for(text))
    name = next((name for name, value in vars(default).items() if value is text), None)
    inner = _accepted(type(text), _sizes_for(text))
    return kind(**{name: inner.to_dict()}) if name else default


def tiny_wrapper_config(model_type: str) -> Any:
    """Return a configuration of a tiny model of images and text; whatever refuses the sizes is raised."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    if model_type in SIZES:
        return kind(**SIZES[model_type])
    return _shrunk(kind(), WRAPPER_SIZES.get(model_type, {}), True)


def tiny_model(config: Any, auto: Any = None, seed: int = 0) -> Any:
    """Build the model of a tiny configuration with seeded random weights; `auto` is its Auto class."""
    from transformers import AutoModelForCausalLM

    auto = auto or AutoModelForCausalLM
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in auto.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"no tiny sizes are known: {size:,} parameters")
    torch.manual_seed(seed)
    model = auto.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)  # before training (xLSTM)
    return model


def _shrunk(config: Any, own: dict[str, Any], outer: bool = False) -> Any:
    """A default configuration with tiny sizes, also in those inside it; `own` are sizes that are known."""
    from transformers import PretrainedConfig

    sizes: dict[str, Any] = {}
    if config.model_type in SIZES:
        sizes = dict(SIZES[config.model_type])
    elif _setting(config, "vocab_size") is not None:
        sizes = _sizes_for(config)
    elif not outer:
        sizes = {name: size for name, size in TOWER.items() if _setting(config, name) is not None}
        sizes |= {
            name: [0] for name, value in vars(config).items() if name.endswith(LISTED) and isinstance(value, list)
        }
    parts = {name: value for name, value in vars(config).items() if isinstance(value, PretrainedConfig)}
    for name, value in vars(config).items():
        if name.endswith(("token_id", "token_index")) and isinstance(value, int) and name not in BASE:
            sizes[name] = 511 - len(sizes)
    sizes |= {name: value for name, value in own.items() if name not in parts}
    sizes |= {name: _shrunk(part, own.get(name, {})).to_dict() for name, part in parts.items()}
    return _accepted(type(config), sizes)


def _sizes_for(config: Any) -> dict[str, Any]:
    """The general sizes that a default configuration has settings for."""
    sizes = {}
    for name, size in GENERAL.items():
        optional = name in ("num_key_value_heads", "pad_token_id") and hasattr(config, name)
        if optional or _setting(config, name) is not None:
            sizes[name] = size
    if "num_experts" in sizes and not _setting(config, "num_experts"):
        del sizes["num_experts"]
    if _setting(config, "qk_rope_head_dim"):
        sizes.pop("head_dim", None)
        sizes["num_key_value_heads"] = 4
    rope = _setting(config, "rope_parameters")
    if isinstance(rope, dict) and "mrope_section" in rope:
        sizes["rope_parameters"] = {**rope, "mrope_section": [2, 3, 3]}
    kinds = _setting(config, "layer_types") or _setting(config, "layers_block_type")
    if kinds:
        kinds = list(dict.fromkeys(kinds))
        kinds = kinds * 2 if len(kinds) == 1 else kinds
        sizes["num_hidden_layers"] = len(kinds)
        if _setting(config, "layer_types"):
            sizes["layer_types"] = kinds
    return sizes


def _setting(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # some properties refuse a default configuration
        return None


def _accepted(kind: Any, sizes: dict[str, Any]) -> Any:
    """The configuration without the settings that it refuses by name."""
    while True:
        try:
            return kind(**sizes)
        except Exception as error:  # whatever a configuration raises
            refused = [name for name in sizes if f"'{name}'" in str(error) or f"`{name}`" in str(error)]
            if not refused:
                raise
            del sizes[refused[0]]
