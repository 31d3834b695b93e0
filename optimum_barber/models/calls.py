"""The call of a module: its arguments as a tree of tensors, and the same call made again for other windows."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..base.errors import BarberError

Contexts = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]
Inputs = Tensor | tuple[Tensor, ...]  # of one window: the hidden states, and what else differs from window to window


@dataclass(frozen=True)
class Call:
    """The arguments of one module call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def hidden_place(self) -> str:
        """Where the hidden states are: the keyword `hidden_states`, else the first floating-point tensor."""
        tensors = self.tensors()
        if "hidden_states" in tensors:
            return "hidden_states"
        for place, tensor in tensors.items():
            if tensor.is_floating_point():
                return place
        raise BarberError("a block is called without hidden states")

    @property
    def hidden(self) -> Tensor:
        """The hidden states."""
        return self.tensors()[self.hidden_place]

    @property
    def arguments(self) -> dict[str, Any]:
        """Every argument by its place."""
        return {str(index): value for index, value in enumerate(self.args)} | self.kwargs

    def of(self, function: Callable[..., Any]) -> Any:
        """Call a function with these arguments."""
        return function(*self.args, **self.kwargs)

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor by its place, such as "1" (the second positional argument) or "attention_mask"."""
        tensors: dict[str, Tensor] = {}

        def collect(place: str, tensor: Tensor) -> Tensor:
            tensors[place] = tensor
            return tensor

        self.mapped(collect)
        return tensors

    def mapped(self, change: Callable[[str, Tensor], Tensor]) -> "Call":
        """Return the call with every tensor replaced by `change(place, tensor)`; containers are new ones."""
        args = [_mapped(value, change, str(index)) for index, value in enumerate(self.args)]
        kwargs = {name: _mapped(value, change, name) for name, value in self.kwargs.items()}
        return Call(tuple(args), kwargs)


def _mapped(value: Any, change: Callable[[str, Tensor], Tensor], place: str) -> Any:
    if isinstance(value, Tensor):
        return change(place, value)
    if isinstance(value, tuple | list):
        items = [_mapped(item, change, f"{place}.{index}") for index, item in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, Mapping):
        mapping: Any = copy.copy(value)
        for key, item in value.items():
            mapping[key] = _mapped(item, change, f"{place}.{key}")
        return mapping
    return value


@dataclass(frozen=True)
class Replay:
    """A call that is made again for every window: `call` with other tensors at `places`, the hidden states first.

    A module may write to what it is given, so it gets copies of what differs between windows.
    """

    name: str  # of what is called
    call: Call
    places: tuple[str, ...]

    @classmethod
    def of(cls, name: str, call: Call, places: tuple[str, ...]) -> "Replay":
        """Keep a window's call; of what differs in the others, its layout in memory."""

        def blank(place: str, tensor: Tensor) -> Tensor:
            return torch.empty_like(tensor, device="meta") if place in places else tensor

        return cls(name, call.mapped(blank), places)

    def inputs(self, call: Call) -> Inputs:
        """Return what another window's call has at `places`; raises BarberError if anything else differs, too."""
        values = self.values(call, self.places)
        return values[0] if len(values) == 1 else values

    def values(self, call: Call, places: Sequence[str]) -> tuple[Tensor, ...]:
        """Return what another window's call has at some of the places; checked as in `inputs`."""
        tensors, expected = call.tensors(), self.call.tensors()
        for place in expected.keys() | tensors.keys():
            if place not in self.places and not same(tensors.get(place), expected.get(place)):
                raise BarberError(f"{self.name} cannot be replayed: its argument {place} changes from window to window")
        return tuple(tensors[place] for place in places)

    def filled(self, inputs: Inputs) -> Call:
        """Return the call of one window, with copies of its inputs that lie in memory as the model's own do."""
        values = (inputs,) if isinstance(inputs, Tensor) else inputs
        at_place = dict(zip(self.places, values, strict=True))

        def fill(place: str, tensor: Tensor) -> Tensor:
            value = at_place.get(place)
            if value is None:
                return tensor
            if value.shape != tensor.shape:
                return value.clone()
            return torch.empty_like(tensor, dtype=value.dtype, device=value.device).copy_(value)

        return self.call.mapped(fill)

    def __call__(self, function: Callable[..., Any], inputs: Inputs) -> Any:
        """Call `function` for one window."""
        return self.filled(inputs).of(function)


def as_given(output: Any, hidden: Tensor) -> Any:
    """Return what a layer returns or writes where the model keeps it: on the device and in the dtype of `hidden`."""

    def moved(_: str, tensor: Tensor) -> Tensor:
        return tensor.to(hidden.device, hidden.dtype if tensor.is_floating_point() else None)

    return Call((output,), {}).mapped(moved).args[0]


def same(one: Tensor | None, other: Tensor | None) -> bool:
    """True if two tensors are one, or have the same values in the same shape; one NaN is like another."""
    if one is other:
        return True
    if one is None or other is None or one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one, other) or bool(((one == other) | (one.isnan() & other.isnan())).all())


class ReachedError(Exception):
    """Ends a forward pass at a call."""


@contextmanager
def forward_of(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace the forward of a module inside the block."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


@contextmanager
def recomputing(modules: Iterable[nn.Module], contexts: Contexts) -> Iterator[None]:
    """Inside, a backward pass computes each of these modules again, so that a forward pass keeps their inputs alone.

    They must compute the same every time: in evaluation mode nothing is drawn. `contexts` gives what is entered in the
    forward pass and where it is computed again.
    """
    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
    with ExitStack() as stack:
        for module in dict.fromkeys(modules):  # one may stand in a stack several times
            stack.enter_context(forward_of(module, partial(again, module.forward)))
        yield


def call_reaching(module: nn.Module, run: Callable[[], Any]) -> Call:
    """Return the arguments with which `run()` first calls `module`; what follows that call is not computed."""
    calls: list[Call] = []

    def stop(*args: Any, **kwargs: Any) -> None:
        calls.append(Call(args, kwargs))
        raise ReachedError

    with forward_of(module, stop), suppress(ReachedError):
        run()
    if calls:
        return calls[0]
    raise BarberError(f"model never calls its {type(module).__name__}: it is no part of the decoder's forward pass")
