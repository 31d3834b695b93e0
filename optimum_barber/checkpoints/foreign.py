"""Pruned weights as other tools save them: zeros, masks beside the weights, bitmasks; names with another prefix."""

from collections.abc import Collection
from functools import cached_property

import torch
from torch import Tensor

from ..base.errors import BarberError
from ..tensors.masks import PackedMask
from .safetensors import SafetensorsWeights

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
    """The pruned Linears of an opened checkpoint, by the names that they have in the dense base."""

    def __init__(self, weights: SafetensorsWeights) -> None:
        self.weights = weights

    @cached_property
    def modules(self) -> dict[str, str]:
        """The ending of the key that holds a weight, out of `FORMS`, by module name in the checkpoint."""
        modules = {}
        for key in self.weights.entries:
            for ending in FORMS:
                if key.endswith(ending):
                    modules[key.removesuffix(ending)] = ending
        return modules

    def locate(self, name: str) -> str:
        """The one module called `name`, with more or fewer leading parts; raises BarberError if there is none."""
        if name in self.modules:
            return name
        near = [m for m in self.modules if m.endswith(f".{name}") or name.endswith(f".{m}")]
        if len(near) != 1:
            seen = ", ".join((near or list(self.modules))[:2]) or "no weights at all"
            raise BarberError(f"model {self.weights.name!r} has no weight {name}.weight: it has {seen}")
        return near[0]

    def other_expert(self, known: Collection[str]) -> str | None:
        """Return the first expert of a layer of the model that is none of its Linears `known`; None if all are."""
        names = list(self.modules)
        for key, entry in self.weights.entries.items():
            if len(entry.shape) == 3:
                names += [f"{key.removesuffix('.weight')}.{index}" for index in range(entry.shape[0])]
        kinds = set(map(_any_expert, known))
        return next((name for name in names if name not in known and _any_expert(name) in kinds), None)

    def form(self, name: str) -> str:
        """The form in which the weight of a Linear is stored, one of `FORMS`."""
        if self.weights.has_expert(name):
            return FORMS[".weight"]
        return FORMS[self.modules[self.locate(name)]]

    def linear(self, name: str, transposed: bool = False) -> Tensor:
        """The weight of a Linear, (out, in), zero where it is pruned; raises BarberError if part is missing.

        `transposed` if the files have (in, out).
        """
        weight = self.weights.linear(name) if self.weights.has_expert(name) else self._stored(self.locate(name))
        return weight.t() if transposed else weight

    def _stored(self, module: str) -> Tensor:
        ending = self.modules[module]
        if ending == ".weight_orig":
            return self._masked(module, f"{module}.weight_orig", [f"{module}.weight_mask"])
        if ending == ORIGINAL:
            return self._parametrized(module)
        if ending.endswith(".bitmask"):
            return self._bitmask(module + ending.removesuffix(".bitmask"))
        return self.weights.linear(module)

    def _parametrized(self, module: str) -> Tensor:
        """Only masks are understood: any other parametrization changes the weight in a way unknown here."""
        start = f"{module}{ORIGINAL}".removesuffix("original")
        masks = [key for key in self.weights.entries if key.startswith(start) and key != f"{start}original"]
        if not masks or not all(key.endswith("mask") for key in masks):
            others = ", ".join(masks) or "nothing that was saved"
            raise BarberError(
                f"model {self.weights.name!r}: {module} is parametrized by {others}, expected masks: save it after "
                "torch.nn.utils.parametrize.remove_parametrizations"
            )
        return self._masked(module, f"{start}original", masks)

    def _masked(self, module: str, original: str, masks: list[str]) -> Tensor:
        weight = self.weights.tensor(original)
        for key in masks:
            mask = self.weights.tensor(key)
            if mask.shape != weight.shape:
                shapes = f"{tuple(mask.shape)}, its weight {tuple(weight.shape)}"
                raise BarberError(f"model {self.weights.name!r}: {key} has shape {shapes}")
            weight = torch.where(mask != 0, weight, 0)
        return weight

    def _bitmask(self, start: str) -> Tensor:
        """Kept values row by row, and one bit a weight: each row starts a byte, its first weight in the lowest bit."""
        rows, width = self.weights.tensor(f"{start}.shape").flatten().tolist()
        bits = self.weights.tensor(f"{start}.bitmask")
        keep = PackedMask(bits.flatten(), (rows, bits.shape[-1] * 8)).unpack()[:, :width]
        values = self.weights.tensor(f"{start}.compressed").flatten().float()
        return torch.zeros(rows, width).masked_scatter_(keep, values)


def _any_expert(name: str) -> str:
    """The name without its numbers but the layer's, which is the first."""
    kept: list[str] = []
    numbered = False
    for part in name.split("."):
        kept.append("#" if numbered and part.isdecimal() else part)
        numbered = numbered or part.isdecimal()
    return ".".join(kept)
