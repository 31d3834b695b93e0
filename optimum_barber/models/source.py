"""Decoder layers one at a time: the store in memory, whose methods the store on disk overrides."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..base.errors import BarberError
from ..tensors.masks import PackedMask
from .activations import Activations, Sample
from .architectures import architecture_of, base_name, check_layer, decoder_stack, layer_blocks
from .blocks import DecoderLayer
from .calls import Call, call_reaching, forward_of
from .file_names import FileNames
from .replay import record_replays
from .structure import LayerReplay, LayerStructure

logger = logging.getLogger(__name__)


class ModelSource:
    """A causal LM as a sequence of decoder layers: in memory, changed in place, one at a time in the working dtype.

    Args:
        model: a transformers causal LM.
        device: where a layer is worked on; None for where the model is.
        dtype: working dtype of weights and activations.
    """

    def __init__(
        self, model: nn.Module, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        self.model = model
        self.architecture = architecture_of(model)
        self.path, self.stack = decoder_stack(model, self.architecture)
        self.home = next(model.parameters()).device
        self.device = torch.device(device) if device is not None else self.home
        self.dtype = dtype
        self.model_type = str(getattr(getattr(model, "config", None), "model_type", "unknown"))
        self.windows = torch.empty(0, 0, dtype=torch.long)
        self._ends: Tensor | None = None  # the windows that were recorded, (2, length)
        self._replays: list[LayerReplay] = []
        self._rest: tuple[Any, ...] | list[Any] | None = None
        for index, layer in enumerate(self.stack):
            check_layer(layer, f"{self.path}.{index}")
        self.names = FileNames.of(model)

    def __len__(self) -> int:
        return len(self.stack)

    @property
    def done(self) -> int:
        """How many layers a stopped run has committed already."""
        return 0

    @torch.no_grad()
    def begin(self, windows: Tensor) -> Iterable[Sample]:
        """What enters layer `done`, for `windows`, (samples, length) int64: hidden states, (1, length, hidden) each.

        Behind them come the tensors that layers before it have written for later ones.

        Raises:
            BarberError: the replay of a layer by its blocks does not give the model's own bits.
        """
        self.record(windows)
        return list(self._embedded(windows))

    def record(self, windows: Tensor) -> None:
        """Record how the model calls its layers and these their blocks, and check that replays are exact."""
        self.windows = windows
        self.model.eval()
        if self._ends is None and self.architecture.generic:
            blocks = layer_blocks(self.stack[0], self.architecture)
            looked_at = ", ".join(f"{name} ({' + '.join(members)})" for name, members in blocks.items())
            message = "%s is not in the table of architectures; the blocks of its first layer are %s"
            logger.warning(message, self.model_type, looked_at)
        others = windows[(windows != windows[0]).any(1)]
        ends = torch.cat([windows[:1], others[-1:] if len(others) else windows[:1]])
        if self._ends is None or not torch.equal(ends, self._ends):
            with self.outer(), experts_one_by_one(self.model):
                self._replays = record_replays(self, ends)
            self._ends = ends

    def outer(self) -> AbstractContextManager[None]:
        """Context manager: the model's weights outside of its layers are there."""
        return nullcontext()

    @contextmanager
    def opened(self, index: int) -> Iterator[nn.Module]:
        """Context manager: the module of a layer on the working device in the working dtype."""
        module = self.stack[index]
        with working_copy(module, self.device, self.dtype):
            yield module

    @contextmanager
    def layer(self, index: int) -> Iterator[DecoderLayer]:
        """Context manager: a layer with its blocks, on the working device in the working dtype."""
        with self.opened(index):
            layer = self.structure(index).recorded(self._replays[index])
            layer.arguments = self._arguments(index)
            with layer.computing_by_linears():
                yield layer

    def layers(self) -> Iterator[DecoderLayer]:
        """All layers in order, to be read."""
        for index in range(len(self)):
            with self.layer(index) as layer:
                yield layer

    def commit(self, index: int, masks: dict[str, PackedMask], hidden: Activations) -> dict[str, PackedMask]:
        """Inside `layer(index)`, keep its weights, masks and outputs `hidden`; return the masks as they are kept."""
        return masks

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter by name, tied ones once."""
        yield from self.model.named_parameters()

    def structure(self, index: int) -> LayerStructure:
        """The blocks and matrices of a layer, which may be without weights."""
        return LayerStructure.of(f"{self.path}.{index}", self.stack[index], self.architecture, self.names)

    @contextmanager
    def computing_by_linears(self) -> Iterator[dict[str, nn.Linear]]:
        """Inside, the whole model computes by its matrices as Linears, which are yielded by name in the files."""
        linears: dict[str, nn.Linear] = {}
        with ExitStack() as stack:
            for index in range(len(self)):
                for matrices in self.structure(index).matrices.values():
                    linears |= matrices.linears
                    for module, forward in matrices.forwards:
                        stack.enter_context(forward_of(module, forward))
            yield linears

    def run(self, window: Tensor) -> Any:
        """Run the model without its head on a window, (1, length) int64."""
        name = base_name(self.model)
        base: Any = self.model.get_submodule(name) if name else self.model
        return base(input_ids=window.to(self.home), use_cache=False)

    def calls(self, window: Tensor, rest: tuple[Any, ...] | list[Any] | None) -> list[Call]:
        """The calls that the model makes of its layers for a window if these returned what they are given.

        `rest` is what they return beside the hidden states; None if they return these alone.
        """
        self._rest = rest
        calls: dict[int, Call] = {}

        def passed_on(index: int, *args: Any, **kwargs: Any) -> Any:
            calls[index] = Call(args, kwargs)
            hidden = calls[index].hidden
            return hidden if rest is None else type(rest)([hidden, *rest])

        with ExitStack() as stack:
            for index, layer in enumerate(self.stack):
                stack.enter_context(forward_of(layer, partial(passed_on, index)))
            self.run(window)
        for index in range(len(self)):
            if index not in calls:
                raise BarberError(f"model never calls {self.path}.{index} for text: its layers cannot be replayed")
        return self.working([calls[index] for index in range(len(self))])

    def working(self, calls: Sequence[Call]) -> list[Call]:
        """The calls on the working device, their floating-point tensors in the working dtype.

        What all of them have, such as the rotary tables, is held once.
        """
        shared: dict[int, Tensor] = {}

        def moved(_: str, tensor: Tensor) -> Tensor:
            if id(tensor) not in shared:
                shared[id(tensor)] = self._working(tensor)
            return shared[id(tensor)]

        return [call.mapped(moved) for call in calls]

    def _arguments(self, index: int) -> list[tuple[Tensor, ...]] | None:
        """What the model itself gives to the windows' calls of a layer where they differ."""
        recorded = self._replays[index]
        if not recorded.arguments:
            return None
        arguments = []
        with self.outer():
            for window in self.windows.split(1):
                call = self.calls(window, self._rest)[index]
                arguments.append(recorded.replay.values(call, recorded.arguments))
        return arguments

    def _embedded(self, windows: Tensor) -> Iterator[Tensor]:
        with self.outer():
            for window in windows.split(1):
                yield self._working(call_reaching(self.stack[0], partial(self.run, window)).hidden)

    def _working(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)


@contextmanager
def experts_one_by_one(model: nn.Module) -> Iterator[None]:
    """Inside, a model computes and adds up its experts in their order, as its own code does, and not by a kernel."""
    name = "_experts_implementation"
    before: dict[int, tuple[Any, str]] = {}
    for part in model.modules():
        config = getattr(part, "config", None)
        if getattr(config, name, None):
            before.setdefault(id(config), (config, getattr(config, name)))
    for config, _ in before.values():
        setattr(config, name, "eager")
    try:
        yield
    finally:
        for config, implementation in before.values():
            setattr(config, name, implementation)


@contextmanager
def working_copy(module: nn.Module, device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
    """Move floating-point weights of `module` to `device` and `dtype`, without gradients, and back to what each was."""
    tensors = [*module.parameters(), *module.buffers()]
    before = [(tensor.device, tensor.dtype) for tensor in tensors]
    gradients = [(parameter, parameter.grad) for parameter in module.parameters()]
    for parameter, _ in gradients:
        parameter.grad = None
    for tensor in tensors:
        tensor.data = tensor.data.to(device, dtype if tensor.is_floating_point() else None)
    try:
        yield
    finally:
        for tensor, (home, kind) in zip(tensors, before, strict=True):
            tensor.data = tensor.data.to(home, kind)
        for parameter, gradient in gradients:
            parameter.grad = gradient
