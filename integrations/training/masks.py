"""Masks that any trainer of transformers keeps."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from optimum_barber.base.errors import BarberError
from optimum_barber.models.linears import matrices_of_model, parameters_of_matrices
from optimum_barber.models.source import ModelSource
from optimum_barber.tensors.masks import PackedMask


class KeepMasks(TrainerCallback):
    """Keeps pruned weights at exactly zero, whatever the optimizer.

    Their gradients are zeroed as they arrive, so that they count neither in the optimizer's moments nor in the norm by
    which gradients are clipped; after each step they are zeroed themselves.

    Args:
        model: the causal LM that is trained.
        masks: keep mask of each pruned matrix, by its name in the files.

    Raises:
        BarberError: the model has no such matrix, or one of another shape.
    """

    def __init__(self, model: Any, masks: Mapping[str, PackedMask]) -> None:
        self.model, self.masks = model, masks
        self._keeps: list[tuple[nn.Parameter, Tensor]] = []
        self._handles: list[Any] = []
        keep_of_parameters(model, masks)  # refuses what does not fit before any work

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Look the parameters up, on the device where they are now."""
        self._keeps = keep_of_parameters(self.model, self.masks)
        for parameter, keep in self._keeps:
            if parameter.requires_grad:
                self._handles.append(parameter.register_hook(keep.mul))

    @torch.no_grad()
    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Zero the pruned weights again."""
        for parameter, keep in self._keeps:
            parameter.mul_(keep)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Let go of the gradients."""
        for handle in self._handles:
            handle.remove()


def keep_of_parameters(model: Any, masks: Mapping[str, PackedMask]) -> list[tuple[nn.Parameter, Tensor]]:
    """Return each parameter that holds a pruned matrix, and its keep mask, bool and of its shape.

    A parameter may hold several matrices: experts, or query, key and value in one.

    Raises:
        BarberError: the model has no such matrix, or one of another shape.
    """
    source = ModelSource(model)
    matrices, parameters = matrices_of_model(source), parameters_of_matrices(source)
    keeps: dict[int, tuple[nn.Parameter, Tensor]] = {}
    for name, mask in masks.items():
        if name not in matrices:
            raise BarberError(f"model has no Linear {name}, for which there is a mask")
        weight, parameter = matrices[name].weight, parameters[name]
        if tuple(weight.shape) != tuple(mask.shape):
            raise BarberError(f"{name} has shape {tuple(weight.shape)}, its mask {tuple(mask.shape)}")
        _, keep = keeps.setdefault(id(parameter), (parameter, torch.ones_like(parameter, dtype=torch.bool)))
        place = weight.storage_offset() - parameter.storage_offset()
        keep.as_strided(weight.shape, weight.stride(), place).copy_(mask.unpack())
    return list(keeps.values())
