"""Pruned weights as other tools save them: zeros, masks beside the weights, bitmasks; names with another prefix."""

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from ..base.errors import BarberError
from ..tensors.masks import PackedMask
from .weights import CheckpointWeights

ORIGINAL = ".parametrizations.weight.original"
FORMS = {
    ".weight": "zeros in the weights",
    ".weight_packed": "zeros in packed quantized weights",
    ".weight_orig": "weight_orig and weight_mask (torch.nn.utils.prune)",
    ORIGINAL: "a parametrized weight with its mask",
    ".weight.bitmask": "a sparse bitmask (compressed-tensors)",
    ".bitmask": "a sparse bitmask (compressed-tensors)",
}


class ForeignWeights:
    """The pruned Linears of a checkpoint, by the names that they have in the dense base.

    Args:
        weights: the opened checkpoint.
    """

    def __init__(self, weights: CheckpointWeights) -> None:
        self.weights = weights

    @cached_property
    def modules(self) -> dict[str, str]:
        """The ending of the key that holds a weight, out of `FORMS`, by module name in the checkpoint."""
        return {
            key.removesuffix(ending): ending for key in self.weights.files for ending in FORMS if key.endswith(ending)
        }

    def locate(self, name: str) -> str:
        """The module that `name` means in the checkpoint, which may have more or fewer leading parts.

        Raises:
            BarberError: there is none, or there are several.
        """
        if name in self.modules:
            return name
        near = [m for m in self.modules if m.endswith(f".{name}") or name.endswith(f".{m}")]
        if len(near) != 1:
            seen = ", ".join((near or list(self.modules))[:2]) or "no weights at all"
            raise BarberError(f"model {self.weights.name!r} has no weight {name}.weight: it has {seen}")
        return near[0]

    def form(self, name: str) -> str:
        """In what form the weight of a Linear is there, one of `FORMS`."""
        return FORMS[self.modules[self.locate(name)]]

    def linear(self, name: str) -> Tensor:
        """The weight of a Linear, (out, in), exactly zero where it is pruned.

        Raises:
            BarberError: it is not there, or its mask is not.
        """
        module = self.locate(name)
        readers: dict[str, Callable[[str], Tensor]] = {
            ".weight_orig": self._pruned,
            ORIGINAL: self._parametrized,
            ".weight.bitmask": lambda m: self._bitmask(f"{m}.weight"),
            ".bitmask": self._bitmask,
        }
        return readers.get(self.modules[module], self.weights.linear)(module)

    def _pruned(self, module: str) -> Tensor:
        return self._masked(module, f"{module}.weight_orig", [f"{module}.weight_mask"])

    def _parametrized(self, module: str) -> Tensor:
        """Only masks are understood: any other parametrization changes the weight in a way unknown here."""
        start = f"{module}{ORIGINAL}".removesuffix("original")
        masks = [key for key in self.weights.files if key.startswith(start) and key != f"{start}original"]
        if not masks or not all(key.endswith("mask") for key in masks):
            found = ", ".join(masks) or "nothing that was saved"
            raise BarberError(
                f"model {self.weights.name!r}: {module} is parametrized by {found}, expected masks: save it after "
                "torch.nn.utils.parametrize.remove_parametrizations"
            )
        return self._masked(module, f"{start}original", masks)

    def _masked(self, module: str, original: str, masks: list[str]) -> Tensor:
        weight = self.weights.tensor(original)
        for key in masks:
            mask = self.weights.tensor(key)
            if mask.shape != weight.shape:
                got = tuple(mask.shape)
                raise BarberError(
                    f"model {self.weights.name!r}: {key} has shape {got}, its weight {tuple(weight.shape)}"
                )
            weight = torch.where(mask != 0, weight, 0)
        return weight

    def _bitmask(self, start: str) -> Tensor:
        """Kept values row by row, and one bit a weight: each row starts a byte, its first weight in the lowest bit."""
        rows, width = self.weights.tensor(f"{start}.shape").flatten().tolist()
        bits = self.weights.tensor(f"{start}.bitmask")
        keep = PackedMask(bits.flatten(), (rows, bits.shape[-1] * 8)).unpack()[:, :width]
        values = self.weights.tensor(f"{start}.compressed").flatten().float()
        return torch.zeros(rows, width).masked_scatter_(keep, values)
