"""The cut itself: tensors sliced, the configuration rewritten, a new and smaller model."""

import copy
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..base.errors import BarberError
from ..models.architectures import Structure
from ..models.loading import empty_model
from .units import CHANNELS, HEADS, Kept, LayerUnits, linear_of


def cut_state(state: Mapping[str, Tensor], kept: Kept, units: LayerUnits) -> dict[str, Tensor]:
    """A model's tensors by name without the rows, biases and columns of the units that go.

    `state` is not changed; tensors in which nothing goes are shared.
    """
    result = dict(state)
    for layer, kept_units in kept.items():
        for kind, indices in kept_units.items():
            for linear, axis in dict.fromkeys((part.linear, part.axis) for part in units[kind].slices):
                names = ("weight", "bias") if axis == 0 else ("weight",)
                for key in (f"{layer}.{linear}.{name}" for name in names):
                    if key in result:
                        tensor = result[key]
                        keep = units[kind].kept(indices, tensor.shape[axis], linear, axis)
                        if not keep.all():
                            result[key] = tensor.index_select(axis, keep.to(tensor.device).nonzero()[:, 0])
    return result


def smaller_config(config: Any, structure: Structure, units: LayerUnits, kept: Mapping[str, int]) -> Any:
    """The configuration of the smaller model; a LLaMA whose head count LlamaConfig refuses becomes a Mistral.

    Raises:
        BarberError: the configuration cannot say the numbers of `kept`, and why.
    """
    changes = {structure.width: kept[CHANNELS]}
    if kept[HEADS] < units[HEADS].count:
        changes |= _head_changes(config, structure, units, kept[HEADS])
    smaller, reason = _changed(config, changes)
    if not reason:
        return smaller
    hint = _legal_counts(config, structure, units)
    if config.model_type != "llama":
        values = ", ".join(f"{key} {value}" for key, value in changes.items())
        raise BarberError(f"{type(config).__name__} cannot say {values}: {reason}; {hint}")
    return _as_mistral(smaller, hint)


def _changed(config: Any, changes: Mapping[str, int]) -> tuple[Any, str]:
    """A copy of the configuration with other numbers, and why it refuses them, empty where it does not."""
    smaller = copy.deepcopy(config)
    for key, value in changes.items():
        setattr(smaller.get_text_config(), key, value)
    try:
        type(smaller).from_dict(smaller.to_dict())
    except Exception as error:  # whatever the configuration's validation raises
        return smaller, " ".join(str(error).split())
    return smaller, ""


def with_biases(config: Any, structure: Structure, layer: nn.Module, units: LayerUnits, kept: Mapping[str, int]) -> Any:
    """The smaller model's configuration with a bias in every Linear that reads units which go.

    `layer` is one of the dense model, `units` are its heads and channels, of which `kept` is the number that stays.

    Raises:
        BarberError: the configuration cannot say such a bias.
    """
    config = copy.deepcopy(config)
    for kind, unit in units.items():
        if kept[kind] == unit.count or linear_of(layer, unit.reader).bias is not None:
            continue
        flag = structure.output_bias if kind == HEADS else structure.down_bias
        if not flag or not hasattr(config, flag):
            raise BarberError(
                f"compensate needs a bias in {unit.reader}, which {type(config).__name__} cannot say: leave it out, or "
                f"keep all {kind}"
            )
        setattr(config, flag, True)
    return config


def _head_changes(config: Any, structure: Structure, units: LayerUnits, kept: int) -> dict[str, int]:
    """The configuration's new numbers of heads, with the head size said explicitly."""
    text, heads = config.get_text_config(), units[HEADS]
    if not structure.free_heads:
        raise BarberError(
            f"model type {config.model_type!r} cannot lose heads: its configuration has no head_dim, the head size is "
            "hidden_size / heads; give --remove-heads 0, and FFN channels make up the total"
        )
    groups = kept
    if heads.alone:
        groups = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return {
        "num_attention_heads": kept * heads.heads,
        "num_key_value_heads": groups,
        "head_dim": heads.slices[-1].width // heads.heads,
    }


def _as_mistral(config: Any, hint: str) -> Any:
    """A LLaMA's configuration as the Mistral that computes the same; an error ends in `hint`."""
    from transformers import MistralConfig

    biased = [name for name in ("attention_bias", "mlp_bias") if getattr(config, name, False)]
    if biased:
        raise BarberError(
            f"LlamaConfig refuses {config.num_attention_heads} heads at hidden_size {config.hidden_size}, and as a "
            f"Mistral the model would lose its biases ({', '.join(biased)}); {hint}"
        )
    settings = config.to_dict()
    for name in ("model_type", "architectures", "attention_bias", "mlp_bias", "pretraining_tp"):
        settings.pop(name, None)
    return MistralConfig(**{**settings, "sliding_window": None}, architectures=["MistralForCausalLM"])


def _legal_counts(config: Any, structure: Structure, units: LayerUnits) -> str:
    heads, legal = units[HEADS], []
    for units_left in range(heads.groups, heads.count, heads.groups):
        if not _changed(config, _head_changes(config, structure, units, units_left))[1]:
            legal.append(units_left * heads.heads)
    return f"of {heads.count * heads.heads} heads these can stay: {', '.join(map(str, legal)) or 'none but all'}"


@torch.no_grad()
def cut_model(
    model: Any, config: Any, kept: Kept, units: LayerUnits, biases: Mapping[str, Tensor] = MappingProxyType({})
) -> Any:
    """The smaller model of `config`; the dense one does not change, and tensors in which nothing goes are shared.

    `biases` are added to the bias of a Linear, (out,), by its full name.
    """
    state = cut_state(model.state_dict(), kept, units)
    for name, bias in biases.items():
        weight = state[f"{name}.weight"]
        before = state.get(f"{name}.bias", torch.zeros(()))
        state[f"{name}.bias"] = (before.cpu().double() + bias).to(weight.device, weight.dtype)
    small = empty_model(config, attn_implementation=model.config._attn_implementation)
    for name, parameter in small.named_parameters():
        if name not in state and name.endswith(".bias"):  # only the smaller configuration has it
            state[name] = torch.zeros(parameter.shape, dtype=model.dtype, device=model.device)
    small.load_state_dict(state, assign=True)
    small.tie_weights()
    small.generation_config = copy.deepcopy(model.generation_config)
    return small.eval()
