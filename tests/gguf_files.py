"""GGUF files of tiny models, written as llama.cpp's converter has them."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np

SETTINGS = {  # by the file's names, ours behind them
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "vocab_size": "vocab_size",
}
HALVES = {"llama": ("q_proj", "k_proj")}  # whose rows it interleaves
SHIFTED = ("gemma2",)  # whose norms it stores plus one


def write_gguf(path: Path, model: Any, kind: str = "F32") -> Path:
    """Write a model's weights, norms and biases in float32, everything else as `kind`."""
    family, settings = model.config.model_type, model.config
    architecture = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == family)
    names = gguf.get_tensor_name_map(architecture, settings.num_hidden_layers)
    writer = gguf.GGUFWriter(path, family)
    for key, name in SETTINGS.items():
        writer.add_uint32(f"{family}.{key}", getattr(settings, name, None) or 32 // settings.num_attention_heads)
    writer.add_float32(f"{family}.attention.layer_norm_rms_epsilon", settings.rms_norm_eps)
    writer.add_float32(f"{family}.rope.freq_base", 10000.0)
    stored = model.state_dict()
    tied = settings.tie_word_embeddings
    for name in (name for name in stored if not (tied and name == "lm_head.weight")):
        known: Any = names.get_name(name, (".weight", ".bias"))
        weight = arranged(name, stored[name].float().numpy(), family, settings)
        if weight.ndim > 1:
            chosen = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(known, gguf.quantize(weight, chosen), raw_dtype=chosen)
        else:
            writer.add_tensor(known, weight)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    return path


def arranged(name: str, weight: np.ndarray, family: str, settings: Any) -> np.ndarray:
    """A tensor as the file holds it."""
    if family in SHIFTED and name.endswith("norm.weight"):
        return weight + np.float32(1)
    if any(part in name for part in HALVES.get(family, ())):
        heads = settings.num_attention_heads if "q_proj" in name else settings.num_key_value_heads
        split = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
        return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(weight.shape)
    return weight
