"""Masks on a model that is trained: as buffers that any loop keeps, as a Trainer's callback, and as torch has them."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune
from transformers import TrainerCallback

from optimum_barber.base.errors import BarberError
from optimum_barber.models.linears import matrices_of_model, parameters_of_matrices
from optimum_barber.models.source import ModelSource
from optimum_barber.tensors.masks import PackedMask

Place = tuple[nn.Module, str]  # a module, and the name of one of its own parameters
DDP_IGNORES = "_ddp_params_and_buffers_to_ignore"  # by which DistributedDataParallel is told


class AppliedMasks:
    """The masks of a model in training; see `apply_masks`.

    Attributes:
        places: module and parameter name of everything that is masked; the keep mask is the module's buffer
            `NAME_mask`, bool, of the parameter's shape.
    """

    def __init__(self, model: Any, masks: Mapping[str, PackedMask]) -> None:
        self.model = _uncompiled(model)
        self.places: list[Place] = []
        self._handles: list[Any] = []
        _refuse_torchs_masks(self.model)
        keeps = {id(parameter): keep for parameter, keep in keep_of_parameters(self.model, masks)}
        owned = []
        for module, name, parameter in own_parameters(self.model):
            if id(parameter) in keeps:  # of tied modules, the first one holds the mask
                owned.append((module, name, parameter, keeps.pop(id(parameter))))
        for module, name, _, keep in owned:
            _refuse_other_mask(module, name, keep)
        for module, name, parameter, keep in owned:
            module.register_buffer(f"{name}_mask", keep, persistent=False)
            self.places.append((module, name))
            self._handles.append(_hook(parameter, partial(_masked, (module, name))))
        self._leave_to_ranks()
        self.zero()

    def _leave_to_ranks(self) -> None:
        """Have DistributedDataParallel leave the masks alone, which all ranks have: it would send them every pass."""
        owned = {id(module): name for name, module in self.model.named_modules()}
        names = [f"{owned[id(module)]}.{name}_mask" for module, name in self.places]
        ignored = getattr(self.model, DDP_IGNORES, [])
        setattr(self.model, DDP_IGNORES, [*ignored, *names])

    @torch.no_grad()
    def zero(self) -> None:
        """Set every pruned weight to exactly zero."""
        for module, name in self.places:
            module.get_parameter(name).mul_(module.get_buffer(f"{name}_mask"))

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Zero pruned weights after each step, for an optimizer that moves weights whose gradient is zero (Muon)."""
        self._handles.append(optimizer.register_step_post_hook(self._after_step))

    def _after_step(self, *_: Any) -> None:
        self.zero()

    def remove(self) -> None:
        """Take buffers and hooks off the model; the weights stay as they are."""
        for handle in self._handles:
            handle.remove()
        for module, name in self.places:
            module._buffers.pop(f"{name}_mask", None)
        self.places, self._handles = [], []


def _uncompiled(model: Any) -> Any:
    """Return the module that torch.compile has wrapped, or the model itself."""
    return getattr(model, "_orig_mod", model)


def _refuse_torchs_masks(model: nn.Module) -> None:
    if torch_prune.is_pruned(model):
        raise BarberError("model has masks of torch.nn.utils.prune: remove those first (prune.remove)")


def _refuse_other_mask(module: nn.Module, name: str, keep: Tensor) -> None:
    """Refuse a buffer that is there already, unless it is the same mask, as in a copy of a masked model."""
    present = getattr(module, f"{name}_mask", None)
    if present is not None and not (isinstance(present, Tensor) and torch.equal(present, keep)):
        raise BarberError(f"{type(module).__name__} has another {name}_mask already: remove the masks that it has")


def _hook(parameter: nn.Parameter, function: Callable[[Tensor], Tensor]) -> Any:
    """Register a hook on a gradient; on a parameter that is frozen too, which may be trained later."""
    trained = parameter.requires_grad
    parameter.requires_grad_(True)
    handle = parameter.register_hook(function)
    parameter.requires_grad_(trained)
    return handle


def _masked(place: Place, gradient: Tensor) -> Tensor:
    module, name = place
    return gradient * module.get_buffer(f"{name}_mask")


def apply_masks(model: Any, masks: Mapping[str, PackedMask]) -> AppliedMasks:
    """Put keep masks on a model as boolean buffers, so that any training loop keeps the zeros.

    Pruned weights are set to zero and their gradients are zeroed as they arrive: SGD, Adam and whatever else moves a
    weight by its own gradient alone leaves them at zero. For other optimizers see `AppliedMasks.follow`. The buffers
    move with the model and are not saved.

    Args:
        model: a transformers causal LM, changed in place.
        masks: keep mask of each pruned matrix, by its name in the files: `PrunedModel.load(OUT).masks`.

    Raises:
        BarberError: the model has no such matrix, or one of another shape, or masks already.
    """
    return AppliedMasks(model, masks)


def as_torch_pruning(model: Any, masks: Mapping[str, PackedMask]) -> None:
    """Put keep masks on a model as `torch.nn.utils.prune` does, for code that is written for it.

    Each pruned parameter NAME becomes NAME_orig, with a buffer NAME_mask; `prune.is_pruned` and `prune.remove` work.
    Save the model after `prune.remove`: before that its keys are others.

    Raises:
        BarberError: as `apply_masks`.
    """
    model = _uncompiled(model)
    _refuse_torchs_masks(model)
    keeps = {id(parameter): keep for parameter, keep in keep_of_parameters(model, masks)}
    for module, name, parameter in own_parameters(model):
        if hasattr(module, f"{name}_mask"):
            raise BarberError(f"{type(module).__name__} has a {name}_mask already: remove the masks that it has")
        if id(parameter) in keeps:
            torch_prune.custom_from_mask(module, name, keeps.pop(id(parameter)))


def own_parameters(model: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Return every module's own parameters by their names within it; a tied one comes once for each module."""
    owned = []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            owned.append((module, name, parameter))
    return owned


class KeepMasks(TrainerCallback):
    """Keeps pruned weights at exactly zero in a Trainer of transformers, whatever the optimizer.

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
        self._applied: AppliedMasks | None = None
        keep_of_parameters(model, masks)  # refuses what does not fit before any work

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Put the masks on; a training that was interrupted may have left them there."""
        if self._applied is not None:
            self._applied.remove()
        self._applied = apply_masks(self.model, self.masks)

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Zero the pruned weights again."""
        if self._applied is not None:
            self._applied.zero()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Take the masks off."""
        if self._applied is not None:
            self._applied.remove()


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
