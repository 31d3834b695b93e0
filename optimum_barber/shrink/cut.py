"""The cut itself: tensors sliced, the configuration rewritten, a new and smaller model."""

import copy
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..base.errors import BarberError
from ..models.architectures import Structure
from ..models.loading import empty_model
from .units import CHANNELS, HEADS, Kept, LayerUnits


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
                        keep = units[kind].kept(indices, result[key].shape[axis], linear, axis)
                        result[key] = _selected(result[key], keep, axis)
    return result


def _selected(tensor: Tensor, keep: Tensor, axis: int) -> Tensor:
    """The kept rows or columns; the tensor itself where all are."""
    if keep.all():
        return tensor
    return tensor.index_select(axis, keep.to(tensor.device).nonzero()[:, 0])


def smaller_config(config: Any, structure: Structure, units: LayerUnits, kept: Mapping[str, int]) -> Any:
    """The configuration of the smaller model; a LLaMA whose head count LlamaConfig refuses becomes a Mistral.

    Args:
        config: of the dense model.
        structure: the table's row of its family.
        units: its heads and channels.
        kept: numbers of units that stay, by kind.

    Raises:
        BarberError: the configuration cannot say this, and why.
    """
    changes = {structure.width: kept[CHANNELS]}
    if kept[HEADS] < units[HEADS].count:
        changes |= head_changes(config, structure, units, kept[HEADS])
    smaller = copy.deepcopy(config)
    text = smaller.get_text_config()
    for key, value in changes.items():
        setattr(text, key, value)
    try:
        type(smaller).from_dict(smaller.to_dict())
        return smaller
    except Exception as error:  # whatever the configuration's validation raises
        reason = " ".join(str(error).split())
    if config.model_type != "llama":
        values = ", ".join(f"{key} {value}" for key, value in changes.items())
        raise BarberError(f"{type(config).__name__} cannot say {values}: {reason}; {_legal_counts(config, units)}")
    return as_mistral(smaller, _legal_counts(config, units))


def head_changes(config: Any, structure: Structure, units: LayerUnits, kept: int) -> dict[str, int]:
    """The configuration's new numbers of heads, with the head size said explicitly.

    Raises:
        BarberError: the family's configuration has no head size.
    """
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


def as_mistral(config: Any, hint: str) -> Any:
    """A LLaMA's configuration as the Mistral that computes the same; an error ends in `hint`.

    Raises:
        BarberError: the LLaMA has biases, which a Mistral has not.
    """
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


def _legal_counts(config: Any, units: LayerUnits) -> str:
    """The head counts that divide the hidden size, as a hint."""
    text, heads = config.get_text_config(), units[HEADS]
    legal = []
    for units_left in range(heads.groups, heads.count, heads.groups):
        if text.hidden_size % (units_left * heads.heads) == 0:
            legal.append(units_left * heads.heads)
    return f"of {text.num_attention_heads} heads these can stay: {', '.join(map(str, legal)) or 'none but all'}"


def built(config: Any, state: Mapping[str, Tensor], like: Any) -> Any:
    """A model of `config` that holds `state`, with the generation settings and the attention of `like`.

    Biases that only `config` has are zero.
    """
    model = empty_model(config, attn_implementation=like.config._attn_implementation)
    biases = {}
    for name, parameter in model.named_parameters():
        if name not in state and name.endswith(".bias"):
            biases[name] = torch.zeros(parameter.shape, dtype=like.dtype, device=like.device)
    model.load_state_dict({**biases, **state}, assign=True)
    model.tie_weights()
    model.generation_config = copy.deepcopy(like.generation_config)
    return model.eval()


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
    return built(config, state, model)
