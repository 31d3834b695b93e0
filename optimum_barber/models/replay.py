"""Decoder layers are replayed block by block: how each is called, and the check that nothing is lost by it."""

from collections.abc import Callable, MutableMapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..base.errors import BarberError
from .architectures import Architecture, layer_blocks
from .blocks import Block, DecoderLayer, hidden_of
from .calls import Call, Inputs, ReachedError, Replay, as_given, forward_of, same
from .file_names import FileNames
from .loading import brief
from .matrices import Matrices, MatrixView, matrices_of


@dataclass(frozen=True)
class LayerReplay:
    """How the model calls a decoder layer, and the layer its blocks.

    Attributes:
        blocks: in the order of computation, without their modules.
        shared, writes: see `DecoderLayer`.
    """

    replay: Replay
    blocks: list[Block]
    shared: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()

    @property
    def arguments(self) -> tuple[str, ...]:
        """The places of what the model itself gives to each window."""
        return self.replay.places[1 + len(self.shared) :]


@dataclass(frozen=True)
class LayerStructure:
    """The blocks of a decoder layer by name, not yet in the order of computation, and their matrices."""

    name: str
    module: nn.Module
    blocks: dict[str, Block]
    matrices: dict[str, Matrices]

    @classmethod
    def of(cls, name: str, module: nn.Module, architecture: Architecture, names: FileNames) -> "LayerStructure":
        """Look at a layer, which may be without weights."""
        structure = cls(name, module, {}, {})
        for short, members in layer_blocks(module, architecture).items():
            block = f"{name}.{short}"
            matrices = structure.matrices[block] = matrices_of(name, module, members, names)
            modules = [module.get_submodule(member) for member in members]
            structure.blocks[block] = Block(block, modules, matrices.linears)
        return structure

    def layer(self, blocks: Sequence[Block], replay: Replay) -> DecoderLayer:
        """Return the layer to be worked on, with its blocks in order."""
        forwards = []
        for matrices in self.matrices.values():
            forwards += matrices.forwards
        return DecoderLayer(self.name, self.module, list(blocks), replay, forwards)

    def recorded(self, recorded: LayerReplay) -> DecoderLayer:
        """Return the layer as it was recorded."""
        for block in recorded.blocks:
            own = self.blocks[block.name]
            own.places, own.width, own.extra = block.places, block.width, block.extra
        layer = self.layer([self.blocks[block.name] for block in recorded.blocks], recorded.replay)
        layer.shared, layer.writes = recorded.shared, recorded.writes
        return layer


class Recordable(Protocol):
    """What a recording needs of a `ModelSource`."""

    path: str
    stack: nn.ModuleList

    def structure(self, index: int) -> LayerStructure:
        """The blocks and matrices of a layer, which may be without weights."""

    def run(self, window: Tensor) -> Any:
        """Run the model without its head."""

    def calls(self, window: Tensor, rest: tuple[Any, ...] | list[Any] | None) -> list[Call]:
        """The calls of all layers if these computed nothing and returned `rest` beside the hidden states."""

    def opened(self, index: int) -> AbstractContextManager[nn.Module]:
        """A layer on the working device in the working dtype."""

    def working(self, calls: Sequence[Call]) -> list[Call]:
        """The calls with their tensors on the working device in the working dtype."""


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
    other: tuple[Tensor, ...] = ()  # the second window's hidden states, and what its layers share
    returned: list[Tensor] = field(default_factory=list)  # by the first layer beside its hidden states, out of these
    shared: tuple[str, ...] = ()  # the places of what the layers share by now

    def layer_called(self, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Take the place of a layer's forward."""
        source, name = self.source, f"{self.source.path}.{index}"
        if index != len(self.layers):
            raise BarberError(f"model calls {name} out of turn: its layers cannot be replayed one after the other")
        given = Call(args, kwargs)
        call = source.working([given])[0]
        with source.opened(index) as module, forward_of(module, forward):
            structure = source.structure(index)
            order = _CallOrder(structure)
            with order:
                output, made, writes = _made(name, module, call)
            if index == 0:
                rest = None if isinstance(output, Tensor) else output[1:]
                self.calls = source.calls(self.ends[:1], rest), source.calls(self.ends[1:], rest)
                self.returned = _depending(module, call, rest) if rest else []
                self.other = (self.calls[1][0].hidden,)
            replay = self._replay(name, call, index)
            known = LayerReplay(replay, order.blocks(), self.shared, writes)
            layer = structure.recorded(known)
            other = (*self.other, *replay.values(self.calls[1][index], known.arguments))
            other_call = replay.filled(other)
            other_output = hidden_of(other_call.of(module))
            order.check_matrices()
            _compare(layer, [replay.inputs(call), other], [hidden_of(output), other_output])
        blocks = [replace(block, members=[], linears={}, replay=None) for block in layer.blocks]
        self.layers.append(replace(known, blocks=blocks))
        self.other = (other_output, *layer.shared_of(other_call))
        self.shared = tuple(dict.fromkeys((*self.shared, *writes)))
        if index + 1 == len(source.stack):
            raise ReachedError
        _write(given, made, writes)
        return as_given(output, given.hidden)

    def _returns(self, tensor: Tensor | None) -> bool:
        return any(same(tensor, other) for other in self.returned)

    def _replay(self, name: str, call: Call, index: int) -> Replay:
        """How the layer is called; refuses arguments that the layers before it have a part in."""
        first, last = (calls[index] for calls in self.calls)
        own, expected, hidden = call.tensors(), first.tensors(), call.hidden_place
        for place in sorted(own.keys() | expected.keys()):
            constant = same(own.get(place), expected.get(place)) and not (index and self._returns(own.get(place)))
            if place not in (hidden, *self.shared) and not constant:
                raise BarberError(f"{name} cannot be replayed: its argument {place} depends on the layers before it")
        for place in self.shared:
            if place not in own:
                raise BarberError(f"{name} cannot be replayed: layers before it write {place}, which it is not given")
        template = call.mapped(lambda place, tensor: expected.get(place, tensor))  # what layers have in common, once
        return Replay.of(name, template, (hidden, *self.shared, *_differing(first, last)[1:]))


def _depending(module: nn.Module, call: Call, rest: Sequence[Any]) -> list[Tensor]:
    """Those tensors of what a layer returns beside its hidden states that other hidden states change."""

    def turned(place: str, tensor: Tensor) -> Tensor:
        return tensor.flip(-1) if place == call.hidden_place else tensor

    others = Call(tuple(call.mapped(turned).of(module)[1:]), {}).tensors()
    return [tensor for place, tensor in Call(tuple(rest), {}).tensors().items() if not same(tensor, others.get(place))]


class _CallOrder:
    """Context manager: notes the order in which a layer calls its blocks, and which of its matrices it calls."""

    def __init__(self, structure: LayerStructure) -> None:
        self.name, self._blocks = structure.name, structure.blocks
        self._matrices: dict[str, nn.Module] = {}  # what must be called: Linears, and modules that hold views
        views = {module for matrices in structure.matrices.values() for module, _ in matrices.forwards}
        for name, module in structure.module.named_modules(prefix=structure.name):
            if module in views:
                self._matrices[name] = module
        for block in self._blocks.values():
            linears = {name: linear for name, linear in block.linears.items() if not isinstance(linear, MatrixView)}
            self._matrices |= linears
        self._called: list[nn.Module] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> None:
        for module in {block.members[0] for block in self._blocks.values()} | {*self._matrices.values()}:
            self._handles.append(module.register_forward_pre_hook(self._note))

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _note(self, module: nn.Module, _: Any) -> None:
        self._called.append(module)

    def blocks(self) -> list[Block]:
        """Return the blocks in order; raises BarberError for one that is not called just once."""
        order: dict[int, Block] = {}
        for block in self._blocks.values():
            times = [time for time, module in enumerate(self._called) if module is block.members[0]]
            if len(times) != 1:
                count = len(times)
                raise BarberError(f"{self.name} cannot be replayed: it calls {block.name} {count} times, not once")
            order[times[0]] = block
        return [order[time] for time in sorted(order)]

    def check_matrices(self) -> None:
        """Refuse a matrix whose weight is used without a call, or not at all: its input is not to be seen."""
        for name, matrix in self._matrices.items():
            if not any(module is matrix for module in self._called):
                raise BarberError(f"{self.name} cannot be pruned: it never calls its {type(matrix).__name__} {name}")


def _made(name: str, module: nn.Module, call: Call) -> tuple[Any, Call, tuple[str, ...]]:
    """Make a copy of a layer's call: its output, the copy, and the places of what the layer has put into mappings.

    A layer that writes to its arguments in another way is refused; only the hidden states are copies.
    """
    before, arguments, writes = call.tensors(), call.arguments, []
    versions = {place: tensor._version for place, tensor in before.items()}
    made = call.mapped(lambda _, tensor: tensor)
    output = made.of(module)
    for place, tensor in made.tensors().items():
        if place == call.hidden_place or (before.get(place) is tensor and versions[place] == tensor._version):
            continue
        if before.get(place) is tensor or not isinstance(arguments[place.partition(".")[0]], MutableMapping):
            raise BarberError(f"{name} cannot be replayed: it writes to its argument {place}, which other layers read")
        writes.append(place)
    return output, made, tuple(writes)


def _write(given: Call, made: Call, writes: Sequence[str]) -> None:
    """Put what a layer wrote to its mappings into those that the model gives to its layers."""
    arguments = given.arguments
    for name in {place.partition(".")[0] for place in writes}:
        arguments[name].update(as_given(made.arguments[name], given.hidden))


def _compare(layer: DecoderLayer, inputs: Sequence[Inputs], expected: Sequence[Tensor]) -> None:
    """Record the calls of the blocks, and refuse a layer whose replay gives other bits than `expected`."""
    try:
        replayed = _replayed(layer, inputs)
    except BarberError as error:
        raise BarberError(f"{layer.name} cannot be replayed block by block: {error}") from None
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError) as error:
        raise BarberError(f"{layer.name} cannot be replayed block by block: {brief(error)}") from None
    for one, other in zip(replayed, expected, strict=True):
        if not same(one, other):
            blocks = ", ".join(block.name.removeprefix(f"{layer.name}.") for block in layer.blocks)
            raise BarberError(f"{layer.name} cannot be replayed by its blocks ({blocks}): its output differs")


def _replayed(layer: DecoderLayer, inputs: Sequence[Inputs]) -> list[Tensor]:
    """The layer's output for each window, put together from its blocks."""
    outputs: list[list[Tensor]] = [[] for _ in inputs]
    with layer.computing_by_linears():
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
