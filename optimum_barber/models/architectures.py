"""The two blocks of a decoder layer by architecture: a table, and a fallback for what is not in it."""

import logging
import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..base.errors import BarberError
from ..base.registry import Registry

logger = logging.getLogger(__name__)


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
        structure: the Linears of heads and FFN channels; None where these cannot be removed.
    """

    attention: tuple[str, ...] = ("self_attn",)
    mlp: tuple[str, ...] = ("mlp",)
    stack: str = ""
    structure: Structure | None = None

    @property
    def blocks(self) -> dict[str, tuple[str, ...]]:
        """Members by block name, in the order of computation."""
        return {"attention": self.attention, "mlp": self.mlp}


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


def positions(config: Any) -> int | None:
    """Return how many positions a model has by its configuration; None where that sets no limit."""
    return getattr(config, "max_position_embeddings", None) or None


def architecture_of(model: nn.Module) -> Architecture:
    """Return the table's row for the model's `model_type`, or one guessed from its first decoder layer."""
    model_type = getattr(getattr(model, "config", None), "model_type", "")
    if model_type in ARCHITECTURES:
        return ARCHITECTURES[model_type]
    _, layers = decoder_stack(model, Architecture())
    attention, mlp = _guess(layers[0], model_type)
    message = "%s is not in the table of architectures; found attention = %s, mlp = %s"
    logger.warning(message, model_type, attention, mlp)
    return Architecture(attention=(attention,), mlp=(mlp,))


def decoder_stack(model: nn.Module, architecture: Architecture) -> tuple[str, nn.ModuleList]:
    """Return path and ModuleList of the decoder layers; a `BarberError` for a model that has none."""
    classes = set(getattr(model, "_no_split_modules", None) or ())
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) == 0:
            continue
        if path == architecture.stack or (not architecture.stack and type(module[0]).__name__ in classes):
            return path, module
    raise BarberError(f"model {type(model).__name__} has no list of decoder layers: a causal LM is needed")


def layer_blocks(layer: nn.Module, architecture: Architecture) -> dict[str, tuple[str, ...]]:
    """Return the members of each block of a decoder layer by the block's name."""
    return architecture.blocks


def linears_of(layer: nn.Module, members: tuple[str, ...]) -> dict[str, nn.Linear]:
    """Return the Linears of one block by their name within the decoder layer, in the order of definition."""
    linears = {}
    for member in members:
        for name, module in layer.get_submodule(member).named_modules(prefix=member):
            if isinstance(module, nn.Linear):
                linears[name] = module
    return linears


def check_layer(layer: nn.Module, path: str, architecture: Architecture) -> None:
    """Refuse a decoder layer with matrices that are not Linears, with quantized ones, or a block without Linears."""
    _check_matrices(layer, path)
    for block, members in architecture.blocks.items():
        if not linears_of(layer, members):
            raise BarberError(f"model has no Linear in the {block} block of {path} ({', '.join(members)})")


def _check_matrices(layer: nn.Module, path: str) -> None:
    of_linears: set[int] = set()
    for module in layer.modules():
        if isinstance(module, nn.Linear):
            of_linears.update(map(id, module.parameters(False)))
    others, quantized = [], []
    for name, parameter in layer.named_parameters():
        if id(parameter) in of_linears:
            if not parameter.is_floating_point():
                quantized.append(f"{path}.{name}")
        elif parameter.ndim > 1:
            others.append(f"{path}.{name} {tuple(parameter.shape)}")
    if others:
        raise BarberError(f"model has weights that are no Linears and cannot be pruned: {', '.join(others)}")
    if quantized:
        raise BarberError(f"model has quantized weights, which cannot be pruned: {quantized[0]}; load it dequantized")


def _guess(layer: nn.Module, model_type: str) -> tuple[str, str]:
    """Return the names of the attention and the MLP module among the children of an unknown decoder layer."""
    children, attention, mlp = [], [], []
    for name, module in layer.named_children():
        if all(parameter.ndim < 2 for parameter in module.parameters()):
            continue
        children.append(name)
        if re.search("attn|attention", name, re.I):
            attention.append(name)
        if re.search("mlp|ffn|feed_?forward", name, re.I):
            mlp.append(name)
    if len(attention) != 1 or len(mlp) != 1:
        raise BarberError(
            f"model type {model_type!r} is not in the table of architectures and its decoder layer has no single "
            f"attention and MLP module; with weights are: {', '.join(children) or 'none'}"
        )
    return attention[0], mlp[0]
