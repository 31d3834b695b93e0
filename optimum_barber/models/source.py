"""Where decoder layers come from. The pipeline sees only this interface; a model in memory is one source."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..tensors.masks import PackedMask
from .activations import Activations
from .architectures import Architecture, architecture_of, check_layer, decoder_stack
from .blocks import Call, DecoderLayer, call_reaching, forward_of


class LayerSource(Protocol):
    """A causal LM as a sequence of decoder layers, each at hand only while it is worked on."""

    def begin(self, windows: Tensor) -> Iterable[Tensor]:
        """The hidden states that enter the first of `layers`, one (1, length, hidden) tensor a window."""

    def layers(self) -> Iterator[DecoderLayer]:
        """The decoder layers in order, weights in the working dtype; changes are kept when the next is asked for."""

    def keep(self, masks: dict[str, PackedMask], hidden: Activations) -> dict[str, PackedMask]:
        """Take the masks of the layer at hand and what enters the next one; the same masks, where they lie now."""

    def __len__(self) -> int:
        """How many decoder layers there are."""


class ModelSource:
    """A model in memory, changed in place, one decoder layer at a time in the working dtype on `device`.

    Args:
        model: a transformers causal LM.
        device: where a layer is worked on; None for where the model is.
        dtype: working dtype of weights and activations.
    """

    def __init__(
        self, model: nn.Module, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        self.model = model.eval()
        self.architecture: Architecture = architecture_of(model)
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

    @torch.no_grad()
    def begin(self, windows: Tensor) -> Iterable[Tensor]:
        """Embed `windows`, (samples, length) int64, and record how the model calls each of its layers."""
        if not self._calls:
            self._record_calls(windows[:1])
        return list(self._embedded(windows))

    def layers(self) -> Iterator[DecoderLayer]:
        """Each layer on the working device in the working dtype; restored when the next is asked for."""
        for index, (module, call) in enumerate(zip(self.stack, self._calls, strict=True)):
            with working_copy(module, self.device, self.dtype):
                yield DecoderLayer.build(f"{self.path}.{index}", module, call, self.architecture)

    def keep(self, masks: dict[str, PackedMask], hidden: Activations) -> dict[str, PackedMask]:
        """The masks as they are: everything stays in memory."""
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
        """One pass in which only the first layer computes: the others give its output on, in its own form."""
        handles, seen = [], {}
        for index, layer in enumerate(self.stack):
            handles.append(
                layer.register_forward_pre_hook(
                    lambda _, args, kwargs, i=index: seen.update({i: Call(args, kwargs)}), with_kwargs=True
                )
            )
        handles.append(self.stack[0].register_forward_hook(lambda _, __, output: seen.update({-1: output})))
        try:
            with _passing_on(self.stack[1:], lambda: seen[-1]):
                self._run(window)
        finally:
            for handle in handles:
                handle.remove()
        moved: dict[int, Any] = {}  # what all layers are given, such as the rotary tables, is held once
        self._calls = [self._adapted(seen[index].template(), moved) for index in range(len(self.stack))]

    def _adapted(self, call: Call, moved: dict[int, Any]) -> Call:
        def working(value: Any) -> Any:
            if id(value) not in moved:
                moved[id(value)] = self._working(value)
            return moved[id(value)]

        return Call(tuple(map(working, call.args)), {k: working(v) for k, v in call.kwargs.items()})

    def _working(self, value: Any) -> Any:
        """`value` on the working device, floating-point tensors in the working dtype."""
        if isinstance(value, tuple):
            return tuple(map(self._working, value))
        if not isinstance(value, Tensor):
            return value
        return value.to(self.device, self.dtype if value.is_floating_point() else None)


@contextmanager
def _passing_on(layers: nn.ModuleList, output: Any) -> Iterator[None]:
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(forward_of(layer, lambda *_, **__: output()))
        yield


@contextmanager
def working_copy(module: nn.Module, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
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
