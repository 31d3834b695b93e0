"""Decoder layers are replayed block by block: how each is called, and the check that nothing is lost by it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..base.errors import BarberError
from .architectures import Architecture, layer_blocks, linears_of
from .blocks import Block, DecoderLayer, hidden_of
from .calls import Call, Inputs, ReachedError, Replay, forward_of, same
from .loading import brief


@dataclass(frozen=True)
class LayerReplay:
    """How the model calls a decoder layer, and the layer its blocks.

    Attributes:
        blocks: in the order of computation, without their modules.
    """

    replay: Replay
    blocks: list[Block]


class Recordable(Protocol):
    """What a recording needs of a `ModelSource`."""

    path: str
    stack: nn.ModuleList
    architecture: Architecture

    def run(self, window: Tensor) -> Any:
        """Run the model without its head."""

    def calls(self, window: Tensor, rest: tuple[Any, ...] | None) -> list[Call]:
        """The calls of all layers if these computed nothing and returned `rest` beside the hidden states."""

    def opened(self, index: int) -> AbstractContextManager[nn.Module]:
        """A layer on the working device in the working dtype."""

    def working(self, calls: Sequence[Call]) -> list[Call]:
        """The calls with their tensors on the working device in the working dtype."""


def build_layer(name: str, module: nn.Module, architecture: Architecture, recorded: LayerReplay) -> DecoderLayer:
    """Put a layer and its blocks together as they were recorded."""
    blocks = blocks_of(name, module, architecture)
    for block in recorded.blocks:
        blocks[block.name].places, blocks[block.name].extra = block.places, block.extra
    return DecoderLayer(name, module, [blocks[block.name] for block in recorded.blocks], recorded.replay)


def blocks_of(layer: str, module: nn.Module, architecture: Architecture) -> dict[str, Block]:
    """Return the blocks of a layer by name, in the order of the table."""
    blocks = {}
    for short, members in layer_blocks(module, architecture).items():
        name = f"{layer}.{short}"
        linears = {f"{layer}.{path}": linear for path, linear in linears_of(module, members).items()}
        blocks[name] = Block(name, [module.get_submodule(member) for member in members], linears)
    return blocks


def record_replays(source: Recordable, ends: Tensor) -> list[LayerReplay]:
    """Run the model on two windows, record its calls, and compare its own bits with those of replays.

    The first window takes the model's own way; the second is passed from layer to layer with the arguments that the
    model makes for it.

    Args:
        source: the model.
        ends: (2, length) int64, the first and the last calibration window.

    Raises:
        BarberError: a layer's replay differs; the message names the layer, and the argument where there is one.
    """
    recording = _Recording(source, ends)
    with ExitStack() as stack, suppress(ReachedError):
        for index, layer in enumerate(source.stack):
            stack.enter_context(forward_of(layer, partial(recording.layer_called, index, layer.forward)))
        source.run(ends[:1])
    if len(recording.layers) < len(source.stack):
        raise BarberError(f"model never calls {source.path}.{len(recording.layers)}: it cannot be pruned")
    return recording.layers


@dataclass
class _Recording:
    source: Recordable
    ends: Tensor
    layers: list[LayerReplay] = field(default_factory=list)
    calls: tuple[list[Call], ...] = ()
    other_hidden: Tensor = field(default_factory=lambda: torch.empty(0))

    def layer_called(self, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Take the place of a layer's forward."""
        source, name = self.source, f"{self.source.path}.{index}"
        if index != len(self.layers):
            raise BarberError(f"model calls {name} out of turn: its layers cannot be replayed one after the other")
        call = source.working([Call(args, kwargs)])[0]
        with source.opened(index) as module, forward_of(module, forward):
            order = _CallOrder(name, blocks_of(name, module, source.architecture))
            with order, _untouched(name, call):
                output = module(*call.args, **call.kwargs)
            if index == 0:
                rest = output[1:] if isinstance(output, tuple) else None
                self.calls = source.calls(self.ends[:1], rest), source.calls(self.ends[1:], rest)
                self.other_hidden = self.calls[1][0].hidden
            replay = self._replay(name, call, index)
            other = _filled(replay, self.calls[1][index], self.other_hidden)
            other_output = hidden_of(replay(module, other))
            inputs = replay.inputs(call)
            layer = DecoderLayer(name, module, order.blocks(), replay)
            _compare(layer, [inputs, other], [hidden_of(output), other_output])
        known = [Block(block.name, [], {}, block.places, block.extra) for block in layer.blocks]
        self.layers.append(LayerReplay(replay, known))
        self.other_hidden = other_output
        if index + 1 == len(source.stack):
            raise ReachedError
        return _as_given(output, Call(args, kwargs).hidden)

    def _replay(self, name: str, call: Call, index: int) -> Replay:
        """How the layer is called; refuses arguments that the layers before it have a part in."""
        first, last = (calls[index] for calls in self.calls)
        own, expected, hidden = call.tensors(), first.tensors(), call.hidden_place
        for place in sorted(own.keys() | expected.keys()):
            if place != hidden and not same(own.get(place), expected.get(place)):
                raise BarberError(f"{name} cannot be replayed: its argument {place} depends on the layers before it")
        return Replay.of(name, first, _differing(first, last))


class _CallOrder:
    """Context manager: notes the order in which the blocks of a layer are called."""

    def __init__(self, name: str, blocks: Mapping[str, Block]) -> None:
        self.name, self._blocks = name, blocks
        self._called: list[Block] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> None:
        for block in self._blocks.values():
            self._handles.append(block.members[0].register_forward_pre_hook(partial(self._note, block)))

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _note(self, block: Block, *_: Any) -> None:
        self._called.append(block)

    def blocks(self) -> list[Block]:
        """Return the blocks in order; raises BarberError for one that is not called just once."""
        for block in self._blocks.values():
            count = sum(called is block for called in self._called)
            if count != 1:
                raise BarberError(f"{self.name} cannot be replayed: it calls {block.name} {count} times, not once")
        return self._called


@contextmanager
def _untouched(name: str, call: Call) -> Iterator[None]:
    """Context manager: refuse a layer that writes to its arguments; only the hidden states are copies."""
    versions = {place: tensor._version for place, tensor in call.tensors().items()}
    yield
    for place, tensor in call.tensors().items():
        if place != call.hidden_place and versions.get(place) != tensor._version:
            raise BarberError(f"{name} cannot be replayed: it writes to its argument {place}, which other layers read")


def _compare(layer: DecoderLayer, inputs: Sequence[Inputs], expected: Sequence[Tensor]) -> None:
    """Record the calls of the blocks, and refuse a layer whose replay gives other bits than `expected`."""
    try:
        replayed = _replayed(layer, inputs)
    except BarberError:
        raise
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError) as error:
        raise BarberError(f"{layer.name} cannot be replayed block by block: {brief(error)}") from None
    for one, other in zip(replayed, expected, strict=True):
        if not same(one, other):
            blocks = ", ".join(block.name.removeprefix(f"{layer.name}.") for block in layer.blocks)
            raise BarberError(f"{layer.name} cannot be replayed by its blocks ({blocks}): its output differs")


def _replayed(layer: DecoderLayer, inputs: Sequence[Inputs]) -> list[Tensor]:
    """The layer's output for each window, put together from its blocks."""
    outputs: list[list[Tensor]] = [[] for _ in inputs]
    for block in layer.blocks:
        calls = [layer.call_of(block, *stream) for stream in zip(inputs, outputs, strict=True)]
        block.places = _differing(*calls)
        for call, before in zip(calls, outputs, strict=True):
            before.append(block(block.inputs_of(call)))
    return [layer.output(*stream) for stream in zip(inputs, outputs, strict=True)]


def _differing(one: Call, other: Call) -> tuple[str, ...]:
    """The places of what differs in two windows' calls, the hidden states first."""
    hidden, tensors, others = one.hidden_place, one.tensors(), other.tensors()
    if tensors.keys() != others.keys():
        raise BarberError(f"arguments {sorted(tensors.keys() ^ others.keys())} are given for some windows alone")
    places = [place for place in tensors if place != hidden and not same(tensors[place], others[place])]
    return (hidden, *places)


def _filled(replay: Replay, call: Call, hidden: Tensor) -> Inputs:
    """The inputs of a window out of its call, with other hidden states."""
    inputs = replay.inputs(call)
    return hidden if isinstance(inputs, Tensor) else (hidden, *inputs[1:])


def _as_given(output: Any, hidden: Tensor) -> Any:
    """What a layer returns, where the model keeps it: on the device and in the dtype of `hidden`."""

    def moved(_: str, tensor: Tensor) -> Tensor:
        return tensor.to(hidden.device, hidden.dtype if tensor.is_floating_point() else None)

    return Call((output,), {}).mapped(moved).args[0]
