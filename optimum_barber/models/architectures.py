"""The blocks of a decoder layer by architecture: a table, and a look at the layers of what is not in it."""

import re
from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..base.errors import BarberError
from ..base.registry import Registry
from .matrices import has_matrices, is_matrix


@dataclass(frozen=True)
class Structure:
    """The Linears of a decoder layer that write and read its attention heads and FFN channels, by name in the layer.

    A Linear that is named several times is a fused one: its rows are the parts' rows, in this order.

    Attributes:
        attention: projections of queries, keys and values.
        output: reads the heads.
        makers: write the FFN channels: gate and up, or the one projection of a plain MLP.
        down: reads the FFN channels.
        norm: in front of the MLP.
        norm_offset: what the norm adds to its weight: 1 in Gemma.
        width: the configuration's name for the number of FFN channels.
        output_bias: the configuration's name for a bias in `output` and the attention's other Linears; empty for none.
        down_bias: the same for `down` and the MLP.
        free_heads: True if the configuration has a head size of its own, so that heads can go and the hidden size stay.
    """

    attention: tuple[str, str, str] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    output: str = "self_attn.o_proj"
    makers: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    norm: str = "post_attention_layernorm"
    norm_offset: float = 0.0
    width: str = "intermediate_size"
    output_bias: str = ""
    down_bias: str = ""
    free_heads: bool = True


@dataclass(frozen=True)
class Architecture:
    """The blocks of a decoder layer, as attribute names of the layer.

    A block is one module, or a chain of modules that the layer calls one after the other (OPT's MLP).

    Attributes:
        attention: members of the attention block.
        mlp: members of the MLP block.
        stack: path of the ModuleList of decoder layers; empty to find it by `_no_split_modules`.
        generic: True to look in each layer what its blocks are.
        dense: children of a layer that are no blocks, such as those whose Linears the layer calls by themselves.
        structure: the Linears of heads and FFN channels; None where these cannot be removed.
    """

    attention: tuple[str, ...] = ("self_attn",)
    mlp: tuple[str, ...] = ("mlp",)
    stack: str = ""
    generic: bool = False
    dense: tuple[str, ...] = ()
    structure: Structure | None = None


OWN_MLP = (("fc1", "fc2"), ("linear1", "linear2"))  # names of Linears with the layer's activation between them
CROSS_ATTENTION = "encoder_attn|cross_?att"
BLOCK_NAMES = {"attention": "attn|attention", "mlp": "mlp|ffn|feed_?forward|moe"}  # patterns of children's names

ARCHITECTURES: Registry[Architecture] = Registry("architecture", "optimum_barber.architectures")

ARCHITECTURES.add("llama", Architecture(structure=Structure(output_bias="attention_bias", down_bias="mlp_bias")))
ARCHITECTURES.add("mistral", Architecture(structure=Structure()))
ARCHITECTURES.add("qwen2", Architecture(structure=Structure()))
ARCHITECTURES.add("qwen3", Architecture(structure=Structure(output_bias="attention_bias")))
ARCHITECTURES.add("gemma", Architecture(structure=Structure(norm_offset=1.0, output_bias="attention_bias")))
GEMMA2 = Structure(norm="pre_feedforward_layernorm", norm_offset=1.0, output_bias="attention_bias")
ARCHITECTURES.add("gemma2", Architecture(structure=GEMMA2))
PHI3 = Structure(attention=("self_attn.qkv_proj",) * 3, makers=("mlp.gate_up_proj",) * 2)
ARCHITECTURES.add("phi3", Architecture(structure=PHI3))
OPT = Structure(
    output="self_attn.out_proj", makers=("fc1",), down="fc2", norm="final_layer_norm", width="ffn_dim", free_heads=False
)
ARCHITECTURES.add("opt", Architecture(mlp=("fc1", "activation_fn", "fc2"), structure=OPT))
ARCHITECTURES.add("dbrx", Architecture(attention=("norm_attn_norm.attn",), mlp=("ffn",)))
GEMMA3N = Architecture(generic=True, dense=("altup",))
ARCHITECTURES.add("gemma3n", GEMMA3N)
ARCHITECTURES.add("gemma3n_text", GEMMA3N)
QWEN4 = Architecture(generic=True, dense=("attn_hyper_connection", "mlp_hyper_connection"))
ARCHITECTURES.add("qwen4_exp", QWEN4)
ARCHITECTURES.add("qwen4_exp_text", QWEN4)


def architecture_of(model: nn.Module) -> Architecture:
    """Return the table's row for the model's `model_type`, or one that has the layers looked at."""
    model_type = getattr(getattr(model, "config", None), "model_type", "")
    if model_type in ARCHITECTURES:
        return ARCHITECTURES[model_type]
    return Architecture(generic=True)


def decoder_stack(model: nn.Module, architecture: Architecture) -> tuple[str, nn.ModuleList]:
    """Return path and ModuleList of the decoder layers; a `BarberError` for a model that has none.

    It is the table's, else the largest that `_no_split_modules` names within the decoder, else the only one there.
    """
    candidates = _outer_lists(model)
    if architecture.stack in candidates:
        return architecture.stack, candidates[architecture.stack]
    named = _named_lists(model, candidates)
    if named:
        return max(named, key=_size)
    if len(candidates) == 1:
        return next(iter(candidates.items()))
    listed = f"one list of decoder layers, but {', '.join(candidates)}" if candidates else "list of decoder layers"
    raise BarberError(f"model {type(model).__name__} has no {listed}: a causal LM is needed")


def _named_lists(model: nn.Module, lists: dict[str, nn.ModuleList]) -> list[tuple[str, nn.ModuleList]]:
    """Those of modules that `_no_split_modules` names, within the decoder if there are any."""
    classes, decoder = set(getattr(model, "_no_split_modules", None) or ()), decoder_path(model)
    named = [(path, stack) for path, stack in lists.items() if type(stack[0]).__name__ in classes]
    return [(path, stack) for path, stack in named if path.startswith(decoder)] or named


def _outer_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The ModuleLists with prunable matrices that lie in no other one, by path."""
    lists: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and not inside and has_matrices(module):
            lists[path] = module
    return lists


def decoder_path(model: nn.Module) -> str:
    """Return how names begin in a model's text decoder, beside which it may have encoders of other things."""
    get_decoder: Any = getattr(model, "get_decoder", None)
    decoder: Any = get_decoder() if get_decoder is not None else None
    for path, module in model.named_modules():
        if path and module is decoder and any(True for _ in module.children()):  # ModernBERT's is its head
            return f"{path}."
    return f"{base_name(model)}."


def base_name(model: nn.Module) -> str:
    """Return the attribute of a causal LM that is the model without its head; empty where there is none."""
    for name in (str(getattr(model, "base_model_prefix", "")), "model"):
        if name and hasattr(model, name):
            return name
    return ""


def _size(stack: tuple[str, nn.ModuleList]) -> int:
    return sum(parameter.numel() for parameter in stack[1].parameters())


def layer_blocks(layer: nn.Module, architecture: Architecture) -> dict[str, tuple[str, ...]]:
    """Return the members of each block of a decoder layer by the block's name.

    Without a row of the table every child with prunable matrices is a block, but for attention to an encoder, which a
    causal LM has not. Two Linears that are the layer's own are its MLP if they are named so; else each is a block.
    """
    if not architecture.generic:
        return {"attention": architecture.attention, "mlp": architecture.mlp}
    blocks: dict[str, tuple[str, ...]] = {}
    own, activations = [], []
    for name, child in _parts(layer):
        if is_matrix(child):
            own.append(name)
        elif has_matrices(child) and _may_be_block(name, architecture):
            blocks[_block_name(name, blocks)] = (name,)
        elif re.search("act", name, re.I):
            activations.append(name)
    if tuple(own) in OWN_MLP and len(activations) == 1:
        blocks[_block_name("mlp", blocks)] = (own[0], activations[0], own[1])
    else:
        blocks |= {name: (name,) for name in own}
    return blocks


def _parts(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The children of a layer by name; of those in a list each by itself."""
    for name, child in layer.named_children():
        if isinstance(child, nn.ModuleList):
            for index, part in child.named_children():
                yield f"{name}.{index}", part
        else:
            yield name, child


def _may_be_block(name: str, architecture: Architecture) -> bool:
    return name not in architecture.dense and not is_cross_attention(name)


def is_cross_attention(name: str) -> bool:
    """True for the name of a part that attends to an encoder."""
    return re.search(CROSS_ATTENTION, name, re.I) is not None


def _block_name(child: str, others: Container[str]) -> str:
    for name, pattern in BLOCK_NAMES.items():
        if re.search(pattern, child, re.I) and name not in others:
            return name
    return child


def check_layer(layer: nn.Module, path: str) -> None:
    """Refuse a decoder layer with quantized weights."""
    for name, parameter in layer.named_parameters():
        if parameter.ndim > 1 and not parameter.is_floating_point():
            raise BarberError(
                f"model has quantized weights, which cannot be pruned: {path}.{name}; load it dequantized"
            )
