"""Decoder layers in parts: capture what reaches a block, replay a block, replace its output by a constant.

The model's own code runs the norms, residuals and everything else between the blocks, so nothing of an architecture is
written a second time here.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..base.errors import BarberError
from .architectures import Architecture, linears_of


@dataclass
class Call:
    """The arguments of one module call, with a place for the hidden states.

    All calibration windows have the same length and no padding, so everything but the hidden states is the same for
    every window.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def hidden(self) -> Tensor:
        """The hidden states: the first positional argument, or the keyword `hidden_states`."""
        hidden = self.args[0] if self.args else self.kwargs["hidden_states"]
        assert isinstance(hidden, Tensor)
        return hidden

    def template(self) -> "Call":
        """Return the call without its hidden states."""
        if self.args:
            return Call((None, *self.args[1:]), self.kwargs)
        return Call((), {**self.kwargs, "hidden_states": None})

    def replay(self, module: Callable[..., Any], hidden: Tensor) -> Any:
        """Call `module` with `hidden` in place of the hidden states."""
        if self.args:
            return module(hidden, *self.args[1:], **self.kwargs)
        return module(**{**self.kwargs, "hidden_states": hidden})


class _ReachedError(Exception):
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


def call_reaching(module: nn.Module, run: Callable[[], Any]) -> Call:
    """Return the arguments with which `run()` first calls `module`; what follows that call is not computed."""

    calls: list[Call] = []

    def stop(*args: Any, **kwargs: Any) -> None:
        calls.append(Call(args, kwargs))
        raise _ReachedError

    with forward_of(module, stop), suppress(_ReachedError):
        run()
    if calls:
        return calls[0]
    raise BarberError(f"model never calls its {type(module).__name__}: it is no part of the decoder's forward pass")


@dataclass
class Block:
    """One block of a decoder layer: its members, called in a chain, and their Linears by full name.

    Attributes:
        call: how the layer calls the first member, without the hidden states; None before that is recorded.
        extra: what the first member returns beside its output; None before it has run, or if that is all it returns.
    """

    name: str
    members: list[nn.Module]
    linears: dict[str, nn.Linear]
    call: Call | None = None
    extra: tuple[Any, ...] | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Compute the block's output for one window's input; a tuple's first item is the output."""
        assert self.call is not None
        output = self.call.replay(self.members[0], hidden)
        if isinstance(output, tuple):
            output, self.extra = output[0], (None,) * (len(output) - 1)
        for member in self.members[1:]:
            output = member(output)
        return output

    def record_call(self, call: Call) -> None:
        """Keep the call; refuse a second stream of hidden states, with which the block's output is not its own."""
        shape = call.hidden.shape
        others = list(call.args[1:])
        for name, value in call.kwargs.items():
            if name != "hidden_states":
                others.append(value)
        for value in others:
            if isinstance(value, Tensor) and value.is_floating_point() and value.shape == shape:
                raise BarberError(f"{self.name} takes a second stream of hidden states, which is not supported")
        self.call = call.template()


@contextmanager
def constant_outputs(blocks: Sequence[Block], outputs: Sequence[Tensor]) -> Iterator[None]:
    """Replace the forward of the first blocks by constants: they compute nothing and return `outputs`."""

    def constant(value: Any, *_: Any, **__: Any) -> Any:
        return value

    with ExitStack() as stack:
        for block, output in zip(blocks, outputs, strict=False):
            answer = output if block.extra is None else (output, *block.extra)
            for member in block.members:
                stack.enter_context(forward_of(member, partial(constant, answer)))
        yield


@dataclass
class DecoderLayer:
    """A decoder layer with its weights, and the call that the model makes of it."""

    name: str
    module: nn.Module
    call: Call
    blocks: list[Block] = field(default_factory=list)

    @classmethod
    def build(cls, name: str, module: nn.Module, call: Call, architecture: Architecture) -> "DecoderLayer":
        """Find the blocks of `module` by the architecture's table row."""
        layer = cls(name, module, call)
        for block, members in architecture.blocks.items():
            modules = [module.get_submodule(member) for member in members]
            linears = {f"{name}.{path}": linear for path, linear in linears_of(module, members).items()}
            layer.blocks.append(Block(f"{name}.{block}", modules, linears))
        return layer

    def input_of(self, block: Block, hidden: Tensor, outputs: list[Tensor]) -> Tensor:
        """Return what reaches `block` for one window, for these outputs of the blocks before it."""
        with constant_outputs(self.blocks, outputs):
            call = call_reaching(block.members[0], partial(self.call.replay, self.module, hidden))
        block.record_call(call)
        return call.hidden

    def output(self, hidden: Tensor, outputs: list[Tensor]) -> Tensor:
        """Return the layer's output for one window, for these outputs of all its blocks."""
        with constant_outputs(self.blocks, outputs):
            output = self.call.replay(self.module, hidden)
        return output[0] if isinstance(output, tuple) else output
