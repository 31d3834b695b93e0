"""The prunable matrices of a block as Linears: Linears, transposed ones, and the experts in a parameter of all."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..base.errors import BarberError
from .file_names import FileNames, Piece

ROUTERS = ("gate", "router", "shared_expert_gate")  # names of modules beside experts, which stay dense
DENSE = (
    "router",
    "dt_proj",
    "vision_moe",
)  # names of modules that stay dense; Mamba uses the weight of its dt_proj by itself


class MatrixView(nn.Linear):
    """A Linear whose weight, (out, in), is a view of a part of another module's parameter.

    Attributes:
        transposed: whether the files hold it as (in, out).
        expert: which expert's it is, and `closing` whether it is that one's last; None for no expert's.
        tokens: which rows of the block's input, (tokens,) int64, the latest call was made for; None for all.
        routing: what the output of the latest call is multiplied with, (tokens,); None where that is done before.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, transposed: bool) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias, requires_grad=False)
        self.transposed = transposed
        self.expert: int | None = None
        self.closing = False
        self.tokens: Tensor | None = None
        self.routing: Tensor | None = None


Forward = Callable[..., Any]


@dataclass
class Matrices:
    """The prunable matrices of a block.

    Attributes:
        linears: by name in the files.
        pieces: where each lies in the files.
        sources: the parameters that hold them.
        forwards: for modules that do not call Linears, a forward that calls these.
    """

    linears: dict[str, nn.Linear] = field(default_factory=dict)
    pieces: dict[str, Piece] = field(default_factory=dict)
    sources: dict[str, nn.Parameter] = field(default_factory=dict)
    forwards: list[tuple[nn.Module, Forward]] = field(default_factory=list)

    def add(self, piece: Piece, linear: nn.Linear, source: nn.Parameter) -> None:
        """Add a matrix of the parameter `source`."""
        name = piece.matrix
        self.linears[name], self.pieces[name], self.sources[name] = linear, piece, source

    def routed(self) -> list["RoutedExperts"]:
        """Return the experts to which a router sends tokens."""
        return [forward for _, forward in self.forwards if isinstance(forward, RoutedExperts)]

    def parameters(self) -> set[int]:
        """Return the identities of all parameters that hold a matrix."""
        return {id(source) for source in self.sources.values()}


def matrices_of(layer: str, module: nn.Module, members: Sequence[str], names: FileNames) -> Matrices:
    """Return the matrices of the members of a block, in the order of definition.

    Args:
        layer: full name of the decoder layer.
        module: the decoder layer.
        members: names within the layer.
        names: of the model's parameters in its files.
    """
    matrices = Matrices()
    for member in members:
        _collect(f"{layer}.{member}", module.get_submodule(member), names, matrices, routed=False)
    return matrices


def has_matrices(module: nn.Module) -> bool:
    """True if any part of the module is one that can be pruned."""
    return any(is_matrix(part) or is_experts(part) for part in module.modules())


def is_matrix(module: nn.Module) -> bool:
    """True for a Linear, or its transposed form of GPT-2."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def is_transposed(linear: nn.Linear) -> bool:
    """True if the files hold the weight of a matrix as (in, out)."""
    return isinstance(linear, MatrixView) and linear.transposed


def is_experts(module: nn.Module) -> bool:
    """True for experts in parameters of three dimensions: those of transformers' interface, and those of Llama 4."""
    down = module._parameters.get("down_proj")
    return down is not None and down.ndim == 3 and (hasattr(module, "is_transposed") or _see_every_token(module))


def _see_every_token(module: nn.Module) -> bool:
    return type(module).__name__ == "Llama4TextExperts"


def _collect(name: str, module: nn.Module, names: FileNames, matrices: Matrices, routed: bool) -> None:
    if is_experts(module):
        views = _experts(name, module, names, matrices)
        every = _see_every_token(module)
        forward = partial(_on_every_token, module, views) if every else RoutedExperts(module, views)
        matrices.forwards.append((module, forward))
    elif type(module).__name__ == "Conv1D":
        weight, bias = module.get_parameter("weight"), module.get_parameter("bias")
        view = MatrixView(weight.data.t(), bias.data, transposed=True)
        matrices.add(_only_piece(f"{name}.weight", weight, names), view, weight)
        matrices.forwards.append((module, partial(view)))  # a module as attribute would become a child
    elif isinstance(module, nn.Linear):
        _add_linear(name, module, names, matrices)
    else:
        routed = routed or any(map(is_experts, module.children()))
        dense = (*DENSE, *ROUTERS) if routed else DENSE
        for child_name, child in module.named_children():
            if child_name not in dense:
                _collect(f"{name}.{child_name}", child, names, matrices, routed)


def _add_linear(name: str, linear: nn.Linear, names: FileNames, matrices: Matrices) -> None:
    """Add a Linear, or the parts into which the files cut it."""
    weight = linear.get_parameter("weight")
    pieces = names.of_parameter(f"{name}.weight", weight)
    if len(pieces) == 1 or linear.bias is not None:
        matrices.add(_only_piece(f"{name}.weight", weight, names), linear, weight)
        return
    parts = _views(weight.data, pieces, transposed=False)
    for piece, view in zip(pieces, parts.linears, strict=True):
        matrices.add(piece, view, weight)
    matrices.forwards.append((linear, partial(parts)))


def _only_piece(name: str, parameter: nn.Parameter, names: FileNames) -> Piece:
    pieces = names.of_parameter(name, parameter)
    if len(pieces) > 1:
        stored = ", ".join(piece.tensor for piece in pieces)
        raise BarberError(f"model has {name} in its files in parts ({stored}): it cannot be pruned")
    return pieces[0]


@dataclass
class _Projection:
    """What one expert's rows of a parameter are: Linears side by side, and the bias of all of them."""

    linears: list[MatrixView]
    whole: Tensor  # (out, in)
    bias: Tensor | None = None

    def __call__(self, x: Tensor, tokens: Tensor | None = None, routing: Tensor | None = None) -> Tensor:
        for linear in self.linears:
            linear.tokens, linear.routing = tokens, routing
        if len(self.linears) == 1:
            output = self.linears[0](x)
        elif self._untouched():
            output = functional.linear(x, self.whole)  # one product, as the model computes it
        else:
            output = torch.cat([linear(x) for linear in self.linears], dim=-1)
        return output if self.bias is None else output + self.bias

    def _untouched(self) -> bool:
        """True if nobody looks at the Linears or has other weights in them."""
        if torch.is_grad_enabled():
            return False
        pointer = self.whole.data_ptr()
        for linear in self.linears:
            if linear._forward_pre_hooks or linear._forward_hooks or linear.weight.data_ptr() != pointer:
                return False
            pointer += linear.weight.nbytes
        return True


Expert = tuple[_Projection, _Projection]


def _experts(name: str, module: nn.Module, names: FileNames, matrices: Matrices) -> list[Expert]:
    first = "gate_up_proj" if "gate_up_proj" in module._parameters else "up_proj"
    transposed = bool(getattr(module, "is_transposed", True))
    sides = []
    for side in (first, "down_proj"):
        parameter, bias = module.get_parameter(side), module._parameters.get(f"{side}_bias")
        projections = []
        by_expert: dict[int, list[Piece]] = {}
        for piece in names.of_parameter(f"{name}.{side}", parameter):
            by_expert.setdefault(piece.expert or 0, []).append(piece)
        for expert, pieces in sorted(by_expert.items()):
            own_bias = bias.data[expert] if bias is not None else None
            views = _views(parameter.data[expert], pieces, transposed)
            for piece, view in zip(pieces, views.linears, strict=True):
                view.expert, view.closing = expert, side == "down_proj"
                matrices.add(piece, view, parameter)
            projections.append(replace(views, bias=own_bias))
        sides.append(projections)
    return list(zip(*sides, strict=True))


def _views(weight: Tensor, pieces: Sequence[Piece], transposed: bool) -> _Projection:
    whole = weight.t() if transposed else weight
    linears = []
    for piece in pieces:
        rows = whole if len(pieces) == 1 else whole[slice(*piece.rows)]
        linears.append(MatrixView(rows, None, transposed))
    return _Projection(linears, whole)


@dataclass(frozen=True)
class RoutedExperts:
    """The forward of experts to which a router sends tokens."""

    module: Any
    experts: Sequence[Expert]

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Compute each expert on the tokens that are routed to it, and add up outputs by the routing weights."""
        output = torch.zeros_like(hidden_states)
        for index, (first, down) in enumerate(self.experts):
            place, tokens = _tokens_of(index, top_k_index, len(self.experts))
            routing = top_k_weights[tokens, place, None]
            states = down(self._states(first, hidden_states[tokens], tokens), tokens, routing[:, 0])
            if self.module.has_post_expert_norm:
                states = self.module.post_expert_norm(states)
            weighted = states * routing
            output.index_add_(0, tokens, weighted.to(output.dtype))
        return output

    def on_all_tokens(self, hidden_states: Tensor, *_: Any) -> Tensor:
        """Compute each expert on all tokens for those who look at its Linears; the output is zero."""
        for first, down in self.experts:
            down(self._states(first, hidden_states))
        return torch.zeros_like(hidden_states)

    def linears(self) -> set[nn.Linear]:
        """Return the matrices of all experts."""
        linears: set[nn.Linear] = set()
        for first, down in self.experts:
            linears.update([*first.linears, *down.linears])
        return linears

    def _states(self, first: _Projection, x: Tensor, tokens: Tensor | None = None) -> Tensor:
        states: Tensor = first(x, tokens)
        module = self.module
        activated: Tensor = module._apply_gate(states) if module.has_gate else module.act_fn(states)
        return activated


def _tokens_of(expert: int, top_k_index: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Which tokens are routed to an expert, and as which of their choices; without values, an even share of them."""
    if not top_k_index.is_meta:
        place, tokens = torch.where((top_k_index == expert).t())
        return place, tokens
    rows = (top_k_index.numel() + expert) // experts
    return top_k_index.new_empty(rows), top_k_index.new_empty(rows)


def _on_every_token(module: Any, experts: Sequence[Expert], hidden_states: Tensor) -> Tensor:
    """Compute each expert on all tokens, which come once for each, scaled by its routing weight (Llama 4)."""
    outputs = []
    for (first, down), states in zip(experts, hidden_states.chunk(len(experts)), strict=True):
        gate, up = first(states).chunk(2, dim=-1)
        outputs.append(down(up * module.act_fn(gate)))
    return torch.cat(outputs)
