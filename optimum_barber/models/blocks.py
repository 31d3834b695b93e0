"""Decoder layers taken apart: capturing what reaches a block, replaying a block, substituting its output.

The model's own code runs the norms, residuals and everything else between the blocks, so nothing of an
architecture is written a second time here.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..base.errors import BarberError
from .architectures import Architecture, linears_of


@dataclass
class Call:
    """Arguments of one module call, with a place for its hidden states.

    All calibration windows have the same length and no padding, so everything but the hidden states is
    the same for every window.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def hidden(self) -> Tensor:
        """The hidden states: the first positional argument, or the keyword `hidden_states`."""
        found = self.args[0] if self.args else self.kwargs["hidden_states"]
        assert isinstance(found, Tensor)
        return found

    def template(self) -> "Call":
        """The call without its hidden states."""
        if self.args:
            return Call((None, *self.args[1:]), self.kwargs)
        return Call((), {**self.kwargs, "hidden_states": None})

    def replay(self, module: Callable[..., Any], hidden: Tensor) -> Any:
        """`module` called with `hidden` in place of the hidden states."""
        if self.args:
            return module(hidden, *self.args[1:], **self.kwargs)
        return module(**{**self.kwargs, "hidden_states": hidden})


class _ReachedError(Exception):
    """Carries a call out of a forward pass that need not go on."""

    def __init__(self, call: Call) -> None:
        self.call = call


@contextmanager
def forward_of(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let `forward` stand in for the module's own, and restore it."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def call_reaching(module: nn.Module, run: Callable[[], Any]) -> Call:
    """The arguments with which `run()` first calls `module`; nothing behind that call is computed."""

    def stop(*args: Any, **kwargs: Any) -> None:
        raise _ReachedError(Call(args, kwargs))

    with forward_of(module, stop):
        try:
            run()
        except _ReachedError as reached:
            return reached.call
    raise BarberError(f"model never calls its {type(module).__name__}: it is no part of the decoder's forward pass")


@dataclass
class Block:
    """One block of a decoder layer: its members, called in a chain, and their Linears by full name."""

    name: str
    members: list[nn.Module]
    linears: dict[str, nn.Linear]
    call: Call | None = None
    extra: tuple[Any, ...] | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """The block's output for one window's input; a tuple's first item is the output."""
        assert self.call is not None
        output = self.call.replay(self.members[0], hidden)
        if isinstance(output, tuple):
            output, self.extra = output[0], (None,) * (len(output) - 1)
        for member in self.members[1:]:
            output = member(output)
        return output

    @contextmanager
    def giving(self, output: Tensor) -> Iterator[None]:
        """Inside, the block computes nothing and gives `output`."""
        answer = output if self.extra is None else (output, *self.extra)
        with ExitStack() as stack:
            for member in self.members[:-1]:
                stack.enter_context(forward_of(member, lambda hidden, *_, **__: hidden))
            stack.enter_context(forward_of(self.members[-1], lambda *_, **__: answer))
            yield

    def accept(self, call: Call) -> None:
        """Remember how the layer calls this block.

        Raises:
            BarberError: a second stream of hidden states goes in, so that the block's output is not its own.
        """
        hidden = call.hidden
        others = [*call.args[1:], *(v for k, v in call.kwargs.items() if k != "hidden_states")]
        if any(isinstance(o, Tensor) and o.is_floating_point() and o.shape == hidden.shape for o in others):
            raise BarberError(f"{self.name} takes a second stream of hidden states, which is not supported")
        self.call = call.template()


@dataclass
class DecoderLayer:
    """A decoder layer, materialised, with the call that the model makes of it."""

    name: str
    module: nn.Module
    call: Call
    blocks: list[Block] = field(default_factory=list)

    @classmethod
    def build(cls, name: str, module: nn.Module, call: Call, architecture: Architecture) -> "DecoderLayer":
        """Find the blocks of `module` by the architecture's table row."""
        blocks = [
            Block(
                name=f"{name}.{block}",
                members=[module.get_submodule(member) for member in members],
                linears={f"{name}.{path}": linear for path, linear in linears_of(module, members).items()},
            )
            for block, members in architecture.blocks.items()
        ]
        return cls(name, module, call, blocks)

    def input_of(self, block: Block, hidden: Tensor, outputs: list[Tensor]) -> Tensor:
        """What reaches `block` for one window, given the outputs of the blocks before it."""
        with self._giving(outputs):
            call = call_reaching(block.members[0], lambda: self.call.replay(self.module, hidden))
        block.accept(call)
        return call.hidden

    def output(self, hidden: Tensor, outputs: list[Tensor]) -> Tensor:
        """The layer's output for one window, given the outputs of all its blocks."""
        with self._giving(outputs):
            output = self.call.replay(self.module, hidden)
        return output[0] if isinstance(output, tuple) else output

    @contextmanager
    def _giving(self, outputs: list[Tensor]) -> Iterator[None]:
        with ExitStack() as stack:
            for block, output in zip(self.blocks, outputs, strict=False):
                stack.enter_context(block.giving(output))
            yield
