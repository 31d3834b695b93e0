"""LoRA on a pruned Linear: W' = W + s (B A) ⊙ M, so that no pruned weight ever leaves zero."""

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora.layer import Linear, LoraVariant
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from optimum_barber.base.errors import BarberError
from optimum_barber.tensors.masks import PackedMask


def masked_delta(lower: Tensor, upper: Tensor, scale: float, keep: PackedMask) -> Tensor:
    """Compute ΔW = s (B A) ⊙ M: exactly zero where pruned, whatever A and B hold.

    Args:
        lower: A, (rank, in), floating point.
        upper: B, (out, rank), of the same dtype.
        scale: s; alpha / rank, or alpha / sqrt(rank) for rsLoRA.
        keep: M, (out, in), on the device of A and B.

    Returns:
        (out, in), in the dtype of A and B.
    """
    product = upper @ (lower * scale)
    return torch.where(keep.unpack(), product, product.new_zeros(()))


def _delta_linear(x: Tensor, lower: Tensor, upper: Tensor, scale: float, keep: PackedMask) -> Tensor:
    return nn.functional.linear(x, masked_delta(lower, upper, scale, keep).to(x.dtype))


def _changed_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lower: Tensor, upper: Tensor, scale: float, keep: PackedMask
) -> Tensor:
    """Compute x (W + ΔW)ᵀ + b, with W + ΔW rounded to the dtype of W as merging rounds it."""
    changed = (weight + masked_delta(lower, upper, scale, keep)).to(weight.dtype)
    return nn.functional.linear(x, changed, bias)


def _recomputed(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Call `function(*arguments)`; its intermediate results are computed again for the gradient, never kept."""
    result: Tensor = checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    return result


class MaskedLinear(Linear):
    """peft's LoRA layer over one pruned Linear, or its transposed form of GPT-2; every adapter on it is masked.

    `keep`, (out, in), is held at one bit a weight and is no part of any state dict.
    """

    keep_bits: Tensor

    def __init__(self, base_layer: nn.Module, adapter_name: str, keep: PackedMask, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, **kwargs)
        self.register_buffer("keep_bits", keep.bits.to(base_layer.get_parameter("weight").device), persistent=False)
        self.keep_shape = keep.shape
        self.fan_in_fan_out = isinstance(base_layer, Conv1D)  # its weight is (in, out)
        self.cast_input_dtype_enabled = False  # the delta takes the dtype of the input, not the other way round

    @property
    def keep(self) -> PackedMask:
        """The keep mask, on the device of the layer."""
        return PackedMask(self.keep_bits, self.keep_shape)

    @property
    def lora_variants(self) -> dict[tuple[str, ...], type[LoraVariant] | None]:
        """Plain LoRA means masked LoRA here; there is no other."""
        return {(): MaskedVariant}

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Multiply by W + ΔW, bit for bit as after merging; with dropout, peft's own sum of two products."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        plain = not (args or kwargs or self.disable_adapters or self.merged) and len(active) == 1
        if not plain or (self.training and not isinstance(self.lora_dropout[active[0]], nn.Identity)):
            output: Tensor = super().forward(x, *args, **kwargs)
            return output
        bias = self.get_base_layer().bias
        return _recomputed(_changed_linear, x, self._weight(), bias, *self.factors(active[0]), self.keep)

    def _weight(self) -> Tensor:
        weight: Tensor = self.get_base_layer().get_parameter("weight")
        return weight.t() if self.fan_in_fan_out else weight

    def get_delta_weight(self, adapter: str) -> Tensor:
        """ΔW of an adapter, of the shape of the layer's weight, float32, zero where pruned."""
        delta = masked_delta(*self.factors(adapter), self.keep).detach()
        return delta.t() if self.fan_in_fan_out else delta

    def factors(self, adapter: str) -> tuple[Tensor, Tensor, float]:
        """A, B and s of an adapter."""
        lower, upper = self.lora_A[adapter].get_parameter("weight"), self.lora_B[adapter].get_parameter("weight")
        return lower, upper, self.scaling[adapter]


class MaskedVariant(LoraVariant):
    """Replaces peft's own forward and merge; `module` is always a `MaskedLinear`."""

    def supports_lora_conversion(self) -> bool:
        """A low-rank approximation of the masked change would fill zeros."""
        return False

    @staticmethod
    def init(module: Any, adapter_name: str, *, config: Any = None, **kwargs: Any) -> None:
        """Refuse a configuration that knows of no mask, and would be saved without one."""
        if not getattr(config, "mask_fingerprint", None):
            raise BarberError(
                f"adapter {adapter_name!r} lies on a pruned Linear, but its configuration has no mask: "
                "make it by dataclasses.replace from the configuration of the model's masked adapter"
            )

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """W + ΔW as a new tensor, rounded once, to the dtype of W."""
        return (orig_weight + module.get_delta_weight(active_adapter)).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        """W + ΔW in place."""
        orig_weight.data += module.get_delta_weight(active_adapter)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """W - ΔW; kept weights come back up to rounding, pruned ones exactly."""
        return (orig_weight - module.get_delta_weight(active_adapter)).to(orig_weight.dtype)

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """`result` + dropout(x) ΔWᵀ."""
        x = module.lora_dropout[active_adapter](x)
        return result + _recomputed(_delta_linear, x, *module.factors(active_adapter), module.keep)
