"""Which parts of a decoder layer are its two blocks: a table, and a fallback for what is not in it."""

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
    """Which Linears of a decoder layer make and read its attention heads and its FFN channels, by name in the layer.

    A Linear that is named several times is a fused one: its rows are the parts' rows, in this order.

    Attributes:
        attention: of queries, keys and values.
        output: reads the heads.
        makers: of the FFN channels: gate and up, or the one projection of a plain MLP.
        down: reads the FFN channels.
        norm: in front of the MLP.
        norm_offset: what the norm adds to its weight: 1 in Gemma.
        width: the configuration's name for the number of FFN channels.
        output_bias: the configuration's name for a bias in `output`, and in the attention's other Linears; empty where
            it has none.
        down_bias: the same for `down` and the MLP.
        free_heads: whether the configuration can say a head size, so that heads can go and the hidden size stay.
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
        structure: what makes and reads heads and FFN channels; None where they cannot be removed.
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

GATED = Structure()

ARCHITECTURES.add("llama", Architecture(structure=Structure(output_bias="attention_bias", down_bias="mlp_bias")))
ARCHITECTURES.add("mistral", Architecture(structure=GATED))
ARCHITECTURES.add("qwen2", Architecture(structure=GATED))
ARCHITECTURES.add("qwen3", Architecture(structure=Structure(output_bias="attention_bias")))
ARCHITECTURES.add("gemma", Architecture(structure=Structure(norm_offset=1.0, output_bias="attention_bias")))
ARCHITECTURES.add(
    "gemma2",
    Architecture(structure=Structure(norm="pre_feedforward_layernorm", norm_offset=1.0, output_bias="attention_bias")),
)
ARCHITECTURES.add(
    "phi3",
    Architecture(structure=Structure(attention=("self_attn.qkv_proj",) * 3, makers=("mlp.gate_up_proj",) * 2)),
)
ARCHITECTURES.add(
    "opt",
    Architecture(
        mlp=("fc1", "activation_fn", "fc2"),
        structure=Structure(
            output="self_attn.out_proj", makers=("fc1",), down="fc2", norm="final_layer_norm", width="ffn_dim",
            free_heads=False,
        ),
    ),
)  # fmt: skip


def positions(config: Any) -> int | None:
    """How many tokens on end a model can take, by its configuration; None where that sets no end."""
    return getattr(config, "max_position_embeddings", None) or None


def architecture_of(model: nn.Module) -> Architecture:
    """The table's row for the model's `model_type`, or what the fallback finds in its first decoder layer."""
    model_type = getattr(getattr(model, "config", None), "model_type", "")
    if model_type in ARCHITECTURES:
        return ARCHITECTURES[model_type]
    found = _guess(decoder_stack(model, Architecture())[1][0], model_type)
    logger.warning("%s is not in the table of architectures; found attention = %s, mlp = %s", model_type, *found)
    return Architecture(attention=(found[0],), mlp=(found[1],))


def decoder_stack(model: nn.Module, architecture: Architecture) -> tuple[str, nn.ModuleList]:
    """Path and ModuleList of the decoder layers.

    Raises:
        BarberError: the model has no list of decoder layers, so it is not a causal LM that we know.
    """
    classes = set(getattr(model, "_no_split_modules", None) or ())
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 0:
            if path == architecture.stack or (not architecture.stack and type(module[0]).__name__ in classes):
                return path, module
    raise BarberError(f"model {type(model).__name__} has no list of decoder layers: a causal LM is needed")


def linears_of(layer: nn.Module, members: tuple[str, ...]) -> dict[str, nn.Linear]:
    """The Linears of one block by their name within the decoder layer, in the order of definition."""
    found = {}
    for member in members:
        for name, module in layer.get_submodule(member).named_modules(prefix=member):
            if isinstance(module, nn.Linear):
                found[name] = module
    return found


def check_layer(layer: nn.Module, path: str, architecture: Architecture) -> None:
    """Refuse a decoder layer with matrices that are not Linears, or with a block without Linears.

    Raises:
        BarberError: names every such weight.
    """
    linears = {id(p) for module in layer.modules() if isinstance(module, nn.Linear) for p in module.parameters(False)}
    others = [
        f"{path}.{n} {tuple(p.shape)}" for n, p in layer.named_parameters() if p.ndim > 1 and id(p) not in linears
    ]
    if others:
        raise BarberError(f"model has weights that are no Linears and cannot be pruned: {', '.join(others)}")
    low = [n for n, p in layer.named_parameters() if id(p) in linears and not p.is_floating_point()]
    if low:
        raise BarberError(f"model has quantized weights, which cannot be pruned: {path}.{low[0]}; load it dequantized")
    for block, members in architecture.blocks.items():
        if not linears_of(layer, members):
            raise BarberError(f"model has no Linear in the {block} block of {path} ({', '.join(members)})")


def _guess(layer: nn.Module, model_type: str) -> tuple[str, str]:
    """Names of the attention and the MLP module among the children of an unknown decoder layer."""
    children = [n for n, m in layer.named_children() if any(p.ndim > 1 for p in m.parameters())]
    attention = [n for n in children if re.search("attn|attention", n, re.I)]
    mlp = [n for n in children if re.search("mlp|ffn|feed_?forward", n, re.I)]
    if len(attention) != 1 or len(mlp) != 1:
        raise BarberError(
            f"model type {model_type!r} is not in the table of architectures and its decoder layer has no single "
            f"attention and MLP module; with weights are: {', '.join(children) or 'none'}"
        )
    return attention[0], mlp[0]
