"""Models of images and text: the language model inside is pruned, the rest is carried over untouched."""

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from benchmarks.tiny_models import tiny_model, tiny_wrapper_config
from optimum_barber import BarberConfig, BarberSparsifier
from optimum_barber.base.errors import BarberError
from optimum_barber.checkpoints.verify import verify_checkpoint
from optimum_barber.models.loading import load_model, resolve_model
from optimum_barber.models.source import ModelSource

from .conftest import SIZES, tiny_windows

VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip


def gemma3():
    config = transformers.Gemma3Config(
        text_config={
            **SIZES, "head_dim": 8, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]
        },
        vision_config=VISION, mm_tokens_per_image=4, image_token_index=299, boi_token_index=298, eoi_token_index=297,
    )  # fmt: skip
    return transformers.Gemma3ForConditionalGeneration(config)


def qwen2_vl():
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    config = transformers.Qwen2_5_VLConfig(
        text_config={**SIZES, "rope_parameters": rope},
        vision_config={"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32},
        image_token_id=299, video_token_id=298, vision_start_token_id=297, vision_end_token_id=296,
    )  # fmt: skip
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def mistral3():
    config = transformers.Mistral3Config(
        text_config={"model_type": "mistral", **SIZES},
        vision_config={"model_type": "pixtral", **VISION, "head_dim": 16},
        image_token_index=299, spatial_merge_size=2,
    )  # fmt: skip
    return transformers.Mistral3ForConditionalGeneration(config)


WRAPPERS = {"gemma3": gemma3, "qwen2_vl": qwen2_vl, "mistral3": mistral3}


@pytest.mark.parametrize("family", WRAPPERS)
def test_the_language_model_is_pruned_and_the_rest_is_carried_over(family, tmp_path, tokenizer):
    torch.manual_seed(0)
    WRAPPERS[family]().eval().save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    results = {}
    for stream in ("always", "never"):
        sparsifier = BarberSparsifier.from_pretrained(tmp_path / "dense", stream=stream)
        config = BarberConfig(sparsity=0.5)
        results[stream] = sparsifier.sparsify(config, tiny_windows(), tmp_path / stream, quiet=True)
        assert not verify_checkpoint(tmp_path / stream).faults
    assert len(results["always"].masks) == 14
    hashes = [{name: mask.sha256 for name, mask in result.masks.items()} for result in results.values()]
    assert hashes[0] == hashes[1]
    dense, pruned = (load_file(tmp_path / name / "model.safetensors") for name in ("dense", "always"))
    assert dense.keys() == pruned.keys()
    changed = {name for name, tensor in dense.items() if not torch.equal(tensor, pruned[name])}
    assert changed == {f"{name}.weight" for name in hashes[0]}
    assert not any("vision" in name or "visual" in name for name in changed)
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "always").eval()
    with torch.no_grad():
        tokens = tiny_windows()[:1]
        assert torch.equal(loaded(input_ids=tokens).logits, sparsifier.model.eval()(input_ids=tokens).logits)


def test_experts_that_lie_transposed_in_the_files_are_pruned_as_the_others(tmp_path):
    config = tiny_wrapper_config("qwen3_vl_moe")
    config.text_config.moe_intermediate_size = 48
    model = tiny_model(config, transformers.AutoModelForImageTextToText)
    masks = []
    for name in ("as-in-memory", "transposed"):
        model.save_pretrained(tmp_path / name)
        file = tmp_path / name / "model.safetensors"
        tensors = load_file(file)
        if name == "transposed":
            tensors |= {key: tensor.mT.contiguous() for key, tensor in tensors.items() if ".experts." in key}
        save_file(tensors, file, {"format": "pt"})
        sparsifier = BarberSparsifier.from_pretrained(tmp_path / name, stream="auto")
        result = sparsifier.sparsify(BarberConfig(sparsity=0.5), tiny_windows(), tmp_path / f"{name}-out", quiet=True)
        assert not verify_checkpoint(tmp_path / f"{name}-out").faults
        masks.append({key: mask.sha256 for key, mask in result.masks.items()})
    assert masks[0] == masks[1] and any("experts" in key for key in masks[0])


def test_a_layer_that_text_alone_does_not_reach_is_refused(tmp_path):
    tiny_model(tiny_wrapper_config("mllama"), transformers.AutoModelForImageTextToText).save_pretrained(tmp_path)
    source = ModelSource(load_model(resolve_model(tmp_path)))
    with pytest.raises(BarberError, match=r"model never calls model\.language_model\.layers\.1 for text"):
        source.begin(tiny_windows())
