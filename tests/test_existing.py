"""Masks of other tools, in whatever form and under whatever names they were saved."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.utils import parametrize, prune

from optimum_barber.base.errors import BarberError
from optimum_barber.checkpoints.foreign import ForeignWeights
from optimum_barber.checkpoints.safetensors import SafetensorsWeights
from optimum_barber.cli import main
from optimum_barber.prune.producers import PRODUCERS
from optimum_barber.tensors.patterns import SparsityPattern

from .conftest import tiny_model


class Masked(torch.nn.Module):
    """What torch.ao.pruning attaches to a weight."""

    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight):
        return weight * self.mask


def linears(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}


def masks_of(model, pattern="unstructured"):
    """A seeded keep mask a Linear."""
    generator, masks = torch.Generator().manual_seed(3), {}
    for name, linear in linears(model).items():
        scores = torch.rand(linear.weight.shape, generator=generator)
        group = scores.shape[1] if pattern == "unstructured" else int(pattern[-1])
        ranks = scores.reshape(-1, group).argsort(1).argsort(1)
        masks[name] = (ranks >= group // 2).reshape(scores.shape)
    return masks


def zeros(model, masks):
    for name, linear in linears(model).items():
        linear.weight.data *= masks[name]
    return model.state_dict()


def pruned(model, masks):
    for name, linear in linears(model).items():
        prune.custom_from_mask(linear, "weight", masks[name])
    return model.state_dict()


def parametrized(model, masks):
    for name, linear in linears(model).items():
        parametrize.register_parametrization(linear, "weight", Masked(masks[name]))
    return model.state_dict()


def bitmask(model, masks):
    """Bit by bit, as the format's own text has it; the older naming for attention, the newer for the MLP."""
    state = dict(model.state_dict())
    for name in linears(model):
        weight, keep = state.pop(f"{name}.weight"), masks[name]
        start = f"{name}.weight" if "attn" in name else name
        rows = [[sum(int(row[8 * b + i]) << i for i in range(8)) for b in range(len(row) // 8)] for row in keep]
        state |= {f"{start}.bitmask": torch.tensor(rows, dtype=torch.uint8), f"{start}.compressed": weight[keep]}
        state[f"{start}.shape"] = torch.tensor(weight.shape).reshape(-1, 1)
    return state


FORMS = {
    "zeros in the weights": zeros,
    "weight_orig and weight_mask": pruned,
    "a parametrized weight": parametrized,
    "a sparse bitmask": bitmask,
}


def save(directory, state, shards=1, rename=lambda key: key):
    """A checkpoint of `shards` files."""
    tensors = {rename(k): v.detach().clone().contiguous() for k, v in state.items() if "lm_head" not in k}
    files = (
        [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)] if shards > 1 else ["model.safetensors"]
    )
    where = {key: files[i % shards] for i, key in enumerate(sorted(tensors))}
    for file in files:
        save_file({key: tensors[key] for key, home in where.items() if home == file}, directory / file)
    if shards > 1:
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    tiny_model().config.save_pretrained(directory)
    return str(directory)


def shapes_of(masks):
    return {name: tuple(keep.shape) for name, keep in masks.items()}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4:8"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_masks_and_is_told(tmp_path, caplog, form, pattern, shards):
    masks = masks_of(tiny_model(), pattern)
    directory = save(tmp_path, FORMS[form](tiny_model(), masks), shards)
    result = PRODUCERS["existing"].brings_pattern(shapes_of(masks), sparse_model=directory)
    assert (str(result), result.sparsity) == (pattern, 0.5)
    weights = ForeignWeights(SafetensorsWeights.open(directory))
    for name, dense in linears(tiny_model()).items():
        assert torch.equal(weights.linear(name), torch.where(masks[name], dense.weight, 0))
    assert caplog.messages[0].startswith(
        f"sparse model '{directory}': 0.5000 zeros, pattern {pattern}, Linears: 14 as {form}"
    )


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: key.removeprefix("model."),
        lambda key: f"module.{key}",
        lambda key: f"base_model.model.{key}",
        lambda key: f"language_model.{key.removeprefix('model.')}" if "layers" not in key else f"language_model.{key}",
    ],
)
def test_names_may_have_more_or_fewer_leading_parts(tmp_path, rename):
    masks = masks_of(tiny_model())
    directory = save(tmp_path, pruned(tiny_model(), masks), rename=rename)
    assert PRODUCERS["existing"].brings_pattern(shapes_of(masks), sparse_model=directory) == SparsityPattern(0.5)


def test_a_checkpoint_of_mixed_forms_counts_them(tmp_path, caplog):
    model = tiny_model()
    masks = masks_of(model)
    name, first = next(iter(linears(model).items()))
    prune.custom_from_mask(first, "weight", masks.pop(name))
    directory = save(tmp_path, zeros(model, masks | {name: torch.ones(())}))
    PRODUCERS["existing"].brings_pattern(shapes_of(masks) | {name: tuple(first.weight.shape)}, sparse_model=directory)
    assert "13 as zeros in the weights, 1 as weight_orig and weight_mask" in caplog.messages[0]


def test_what_cannot_be_understood_is_refused(tmp_path):
    model, name = tiny_model(), "model.layers.0.mlp.up_proj"
    masks = masks_of(model)
    state = parametrized(model, masks)
    mask = f"{name}.parametrizations.weight.0.mask"
    cases = {
        "is parametrized by nothing that was saved, expected masks": {k: v for k, v in state.items() if k != mask},
        "is parametrized by .*weight.0.mask, .*weight.1.gain, expected masks": {
            **state,
            mask.replace("0.mask", "1.gain"): state[mask],
        },
        r"weight.0.mask has shape \(1, 32\), its weight \(48, 32\)": {**state, mask: state[mask][:1]},
        "has no weight model.layers.0.mlp.up_proj.weight: it has": {k: v for k, v in state.items() if name not in k},
        "has no weight .*: it has a.model.layers.0.mlp.up_proj, b.model.": {
            f"{p}.{k}": v for p in "ab" for k, v in state.items()
        },
    }
    for number, (message, content) in enumerate(cases.items()):
        (tmp_path / str(number)).mkdir()
        weights = ForeignWeights(SafetensorsWeights.open(save(tmp_path / str(number), content)))
        with pytest.raises(BarberError, match=message):
            weights.linear(name)


def test_a_state_of_torch_prune_is_rebuilt_by_the_command(tmp_path, model_dir, text_file, capsys, caplog):
    caplog.set_level(logging.WARNING)
    masks = masks_of(tiny_model())
    (tmp_path / "sparse").mkdir()
    directory = save(tmp_path / "sparse", pruned(tiny_model(), masks))
    flags = ["--calibration", str(text_file), "--samples", "2", "--sequence-length", "16", "--rebuild", "none"]
    command = ["prune", str(model_dir), "--producer", "existing", "--sparse-model", directory, *flags]
    assert main([*command, "-o", str(tmp_path / "out")]) == 0
    assert "14 as weight_orig and weight_mask (torch.nn.utils.prune)" in caplog.text
    written, dense = load_file(tmp_path / "out" / "model.safetensors"), load_file(model_dir / "model.safetensors")
    for name, keep in masks.items():
        assert torch.equal(written[f"{name}.weight"], torch.where(keep, dense[f"{name}.weight"], 0))
    assert main([*command, "--pattern", "2:4", "-o", str(tmp_path / "other")]) == 2
    assert "model.layers.0.self_attn.q_proj does not hold the pattern 2:4" in capsys.readouterr().err
