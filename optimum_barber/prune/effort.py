"""The settings that an effort stands for: the chain of rebuilders and the allocation."""

from dataclasses import dataclass, field
from typing import Any

AUTO = "auto"
UNIFORM = "uniform"


@dataclass(frozen=True)
class Effort:
    """The settings that an effort names; docs/choosing.md tells when to take which.

    Attributes:
        unstructured: rebuilders of unstructured masks.
        grouped: rebuilders of N:M masks, where barber cannot move weights between groups.
        with_barber: rebuilders under any pattern if a setting of barber differs from its default.
        allocation: allocation for unstructured masks that the producer does not bring.
    """

    unstructured: str
    grouped: str
    with_barber: str
    allocation: str = UNIFORM
    allocation_args: dict[str, Any] = field(default_factory=dict)

    def rebuild(self, semi_structured: bool, barber: bool) -> str:
        """Return the chain of rebuilders; `barber`: a setting of barber differs from its default."""
        if barber:
            return self.with_barber
        return self.grouped if semi_structured else self.unstructured


EFFORTS = {
    "fast": Effort("swaps", "swaps", "barber+swaps"),
    "default": Effort("barber+swaps", "swaps+gauss-newton", "barber+swaps"),
    "best": Effort(
        "barber+swaps+gauss-newton",
        "swaps+gauss-newton",
        "barber+swaps+gauss-newton",
        allocation="measured",
        allocation_args={"spread": 0.15},
    ),
}
