"""Decoder layers in parts: capture what reaches a block, replay a block, replace its output by a constant.

The model's own code runs the norms, residuals and everything else between the blocks, so nothing of an architecture is
written a second time here.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..base.errors import BarberError
from .activations import Activations, tensors_of
from .calls import Call, Inputs, Replay, call_reaching, forward_of
from .matrices import Forward


@dataclass
class Block:
    """One block of a decoder layer: its members, called in a chain, and their matrices as Linears.

    Attributes:
        linears: by name in the files.
        places: of the arguments of the first member that differ from window to window, the hidden states first.
        width: of the block's output; 0 before it has run.
        extra: what the first member returns beside its output; None before it has run, or if that is all it returns.
        replay: how the layer calls the first member; None before that is recorded.
    """

    name: str
    members: list[nn.Module]
    linears: dict[str, nn.Linear]
    places: tuple[str, ...] = ()
    width: int = 0
    extra: tuple[Any, ...] | list[Any] | None = None
    replay: Replay | None = None

    def __call__(self, inputs: Inputs) -> Tensor:
        """Compute the block's output for one window's inputs; of several things the first is the output."""
        assert self.replay is not None
        output = self.replay(self.members[0], inputs)
        if not isinstance(output, Tensor):
            output, self.extra = output[0], type(output)([None] * (len(output) - 1))
        for member in self.members[1:]:
            output = member(output)
        assert isinstance(output, Tensor)
        self.width = output.shape[-1]
        return output

    def inputs_of(self, call: Call) -> Inputs:
        """Return the inputs of one window out of the call that the layer makes; the first call is kept."""
        if self.replay is None:
            self.replay = Replay.of(self.name, call, self.places or (call.hidden_place,))
        return self.replay.inputs(call)

    def answer(self, output: Tensor) -> Any:
        """Return what the block's members answer the layer where `output` is the block's output."""
        return output if self.extra is None else type(self.extra)([output, *self.extra])

    def skipped(self, *args: Any, **kwargs: Any) -> Any:
        """Answer the layer as if the block added nothing: zeros, or the residual stream where the block adds that."""
        call = Call(args, kwargs)
        hidden, tensors = call.hidden, call.tensors()
        for place in self.places[1:]:
            if place in tensors and tensors[place].shape == hidden.shape:
                return self.answer(tensors[place])
        return self.answer(hidden.new_zeros(*hidden.shape[:-1], self.width))


@contextmanager
def constant_outputs(blocks: Sequence[Block], outputs: Sequence[Tensor]) -> Iterator[None]:
    """Replace the forward of the first blocks by constants: they compute nothing and return copies of `outputs`."""

    def constant(block: Block, output: Tensor, *_: Any, **__: Any) -> Any:
        return block.answer(output.clone())  # the layer may add to it in place

    with ExitStack() as stack:
        for block, output in zip(blocks, outputs, strict=False):
            for member in block.members:
                stack.enter_context(forward_of(member, partial(constant, block, output)))
        yield


@dataclass
class DecoderLayer:
    """A decoder layer with its weights, its blocks in the order of computation, and the call that the model makes.

    Attributes:
        forwards: for modules whose matrices are views, a forward that calls these.
        shared: places of what layers before it have written for later ones, such as keys and values; they follow the
            hidden states in `replay.places`.
        writes: places of what the layer itself writes for later ones.
        returns: by the place at which the next layer takes it, where it is in what the layer returns beside the hidden
            states.
        arguments: what the call has at the other `replay.places`, for every window of this rank; None where all windows
            have the same.
    """

    name: str
    module: nn.Module
    blocks: list[Block]
    replay: Replay
    forwards: Sequence[tuple[nn.Module, Forward]] = ()
    shared: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    returns: Mapping[str, str] = field(default_factory=dict)
    arguments: Sequence[tuple[Tensor, ...]] | None = None

    @contextmanager
    def computing_by_linears(self) -> Iterator[None]:
        """Inside, the layer computes by the Linears of its blocks and by nothing else."""
        with ExitStack() as stack:
            for module, forward in self.forwards:
                stack.enter_context(forward_of(module, forward))
            yield

    def inputs(self, hidden: Activations) -> Iterator[Inputs]:
        """Yield what enters the layer, for every window of this rank; `hidden` are as `passed_on` returns them."""
        if self.arguments is None:
            yield from hidden
            return
        for window, arguments in zip(hidden, self.arguments, strict=True):
            yield (*tensors_of(window), *arguments)

    def call_of(self, block: Block, inputs: Inputs, outputs: Sequence[Tensor]) -> Call:
        """Return the call that reaches `block` for one window, for these outputs of the blocks before it."""
        with constant_outputs(self.blocks, outputs):
            return call_reaching(block.members[0], partial(self.replay, self.module, inputs))

    def input_of(self, block: Block, inputs: Inputs, outputs: Sequence[Tensor]) -> Inputs:
        """Return what reaches `block` for one window, for these outputs of the blocks before it."""
        return block.inputs_of(self.call_of(block, inputs, outputs))

    def output(self, inputs: Inputs, outputs: Sequence[Tensor]) -> Tensor:
        """Return the layer's output for one window, for these outputs of its first blocks; later ones add nothing."""
        with constant_outputs(self.blocks, outputs), ExitStack() as stack:
            for block in self.blocks[len(outputs) :]:
                for member in block.members:
                    stack.enter_context(forward_of(member, block.skipped))
            output = self.replay(self.module, inputs)
        return hidden_of(output)

    def passed_on(self, inputs: Inputs, outputs: Sequence[Tensor]) -> Inputs:
        """Return what later layers get of one window: the output of all blocks, and what the layers share by now."""
        output = self.output(inputs, outputs)
        if not self.shared and not self.writes and not self.returns:
            return output
        call = self.replay.filled(inputs)
        made = call.of(self.module) if self.writes or self.returns else ()
        return (output, *self.shared_of(call, made))

    def shared_of(self, call: Call, made: Any) -> tuple[Tensor, ...]:
        """Return what the layers share, out of this layer's call after it has been made, and of what that returned."""
        tensors, beside = call.tensors(), tensors_beside(made)
        for place, key in self.returns.items():
            if key not in beside:
                raise BarberError(f"{self.name} cannot be replayed: it does not return {place}, which others do")
            tensors[place] = beside[key]
        return tuple(tensors[place] for place in dict.fromkeys((*self.shared, *self.writes, *self.returns)))


def tensors_beside(output: Any) -> dict[str, Tensor]:
    """Return the tensors of what a layer returns beside its hidden states, by place; none of a layer without any."""
    return {} if isinstance(output, Tensor) else Call(tuple(output[1:]), {}).tensors()


def hidden_of(output: Any) -> Tensor:
    """Return the hidden states out of what a layer returns: all of it, or the first item."""
    hidden = output if isinstance(output, Tensor) else output[0]
    assert isinstance(hidden, Tensor)
    return hidden
