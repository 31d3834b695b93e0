"""Decoder layers are replayed block by block: how each is called, and the check that nothing is lost by it."""

from collections.abc import Callable, MutableMapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn

from ..base.errors import BarberError
from .blocks import DecoderLayer, hidden_of, tensors_beside
from .calls import Call, Inputs, ReachedError, Replay, as_given, forward_of, same
from .loading import brief
from .structure import CallOrder, LayerReplay, LayerStructure


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
    beside: tuple[dict[str, Tensor], ...] = ({}, {})  # by the layer before, in both windows
    shared: tuple[str, ...] = ()  # the places of what the layers share by now
    returns: dict[str, str] = field(default_factory=dict)

    def layer_called(self, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Take the place of a layer's forward."""
        source, name = self.source, f"{self.source.path}.{index}"
        if index != len(self.layers):
            raise BarberError(f"model calls {name} out of turn: its layers cannot be replayed one after the other")
        model_call = Call(args, kwargs)
        call = source.working([model_call])[0]
        if index > 0:
            self._take_returned(call, index)
        with source.opened(index) as module, forward_of(module, forward):
            structure = source.structure(index)
            order = CallOrder(structure)
            with order:
                output, made, writes = _made(name, module, call)
            if index == 0:
                rest = None if isinstance(output, Tensor) else output[1:]
                self.calls = source.calls(self.ends[:1], rest), source.calls(self.ends[1:], rest)
                self.returned = _depending(module, call, rest) if rest else []
                self.other = (self.calls[1][0].hidden,)
            replay = self._replay(name, call, index)
            known = LayerReplay(replay, order.blocks(), self.shared, writes, dict(self.returns))
            layer = structure.recorded(known)
            other = (*self.other, *replay.values(self.calls[1][index], known.arguments))
            other_call = replay.filled(other)
            other_output = other_call.of(module)
            order.check_matrices()
            _compare(layer, [replay.inputs(call), other], [hidden_of(output), hidden_of(other_output)])
        blocks = [replace(block, members=[], linears={}, replay=None) for block in layer.blocks]
        self.layers.append(replace(known, blocks=blocks))
        self.other = (hidden_of(other_output), *layer.shared_of(other_call, other_output))
        self.shared = tuple(dict.fromkeys((*self.shared, *writes)))
        self.beside = tensors_beside(output), tensors_beside(other_output)
        if index + 1 == len(source.stack):
            raise ReachedError
        _write(model_call, made, writes)
        return as_given(output, model_call.hidden)

    def _take_returned(self, call: Call, index: int) -> None:
        """Carry from layer to layer what the one before has returned for this one, out of its hidden states."""
        expected = self.calls[0][index].tensors()
        for place, tensor in call.tensors().items():
            constant = same(tensor, expected.get(place)) and not self._returns(tensor)
            if constant or place in (call.hidden_place, *self.shared):
                continue
            for key, beside in self.beside[0].items():
                if same(tensor, beside) and key in self.beside[1]:
                    self.returns[place] = key
                    self.layers[-1] = replace(self.layers[-1], returns=dict(self.returns))
                    self.shared = (*self.shared, place)
                    self.other = (*self.other, self.beside[1][key])
                    break

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


def _write(model_call: Call, made: Call, writes: Sequence[str]) -> None:
    """Put what a layer wrote to its mappings into those that the model gives to its layers."""
    arguments = model_call.arguments
    for name in {place.partition(".")[0] for place in writes}:
        arguments[name].update(as_given(made.arguments[name], model_call.hidden))


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
