"""Decoder layers one at a time: the store in memory, whose methods the store on disk overrides."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..tensors.masks import PackedMask
from .activations import Activations
from .architectures import architecture_of, check_layer, decoder_stack
from .blocks import Call, DecoderLayer, call_reaching, forward_of


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
        self.model = model.eval()
        self.architecture = architecture_of(model)
        self.path, self.stack = decoder_stack(model, self.architecture)
        self.home = next(model.parameters()).device
        self.device = torch.device(device) if device is not None else self.home
        self.dtype = dtype
        self.model_type = str(getattr(getattr(model, "config", None), "model_type", "unknown"))
        self._calls: list[Call] = []
        for index, layer in enumerate(self.stack):
            check_layer(layer, f"{self.path}.{index}", self.architecture)

    def __len__(self) -> int:
        return len(self.stack)

    @property
    def done(self) -> int:
        """How many layers a stopped run has committed already."""
        return 0

    @torch.no_grad()
    def begin(self, windows: Tensor) -> Iterable[Tensor]:
        """The hidden states into layer `done`, (1, length, hidden) each, for `windows`, (samples, length) int64."""
        if not self._calls:
            self._record_calls(windows[:1])
        return list(self._embedded(windows))

    @contextmanager
    def layer(self, index: int) -> Iterator[DecoderLayer]:
        """Context manager: a layer on the working device in the working dtype."""
        module = self.stack[index]
        with working_copy(module, self.device, self.dtype):
            yield DecoderLayer.build(f"{self.path}.{index}", module, self._calls[index], self.architecture)

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

    def _embedded(self, windows: Tensor) -> Iterator[Tensor]:
        for window in windows.split(1):
            yield self._working(call_reaching(self.stack[0], partial(self._run, window)).hidden)

    def _run(self, window: Tensor) -> Any:
        base = getattr(self.model, str(self.model.base_model_prefix), self.model)
        return base(input_ids=window.to(self.home), use_cache=False)

    def _record_calls(self, window: Tensor) -> None:
        """Record each layer's call in one pass; only the first layer computes, the others return its output."""
        calls: dict[int, Call] = {}
        outputs: list[Any] = []

        def record(index: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls[index] = Call(args, kwargs)

        with ExitStack() as stack:
            for index, layer in enumerate(self.stack):
                stack.callback(layer.register_forward_pre_hook(partial(record, index), with_kwargs=True).remove)
                if index:
                    stack.enter_context(forward_of(layer, lambda *_, **__: outputs[0]))
            handle = self.stack[0].register_forward_hook(lambda _, __, output: outputs.append(output))
            stack.callback(handle.remove)
            self._run(window)
        shared: dict[int, Any] = {}  # what all layers are called with, such as the rotary tables, is held once

        def working(value: Any) -> Any:
            if id(value) not in shared:
                shared[id(value)] = self._working(value)
            return shared[id(value)]

        self._calls = []
        for index in range(len(self.stack)):
            call = calls[index].template()
            kwargs = {name: working(value) for name, value in call.kwargs.items()}
            self._calls.append(Call(tuple(map(working, call.args)), kwargs))

    def _working(self, value: Any) -> Any:
        """`value` on the working device, floating-point tensors in the working dtype."""
        if isinstance(value, tuple):
            return tuple(map(self._working, value))
        if not isinstance(value, Tensor):
            return value
        return value.to(self.device, self.dtype if value.is_floating_point() else None)


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
