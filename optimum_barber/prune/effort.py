"""What `effort` stands for: the chain of rebuilders and the allocation that cost least, as usual, or most."""

from dataclasses import dataclass, field
from typing import Any

AUTO = "auto"
UNIFORM = "uniform"


@dataclass(frozen=True)
class Effort:
    """The settings that an effort names; docs/choosing.md tells when to take which.

    Attributes:
        unstructured: rebuilders for masks without a pattern.
        grouped: rebuilders within N:M groups, where Barber has no budget to move.
        with_barber: rebuilders where a setting of Barber is given, under any pattern.
        allocation: of the sparsity over the blocks, for unstructured masks that are not there already.
        allocation_args: its arguments.
    """

    unstructured: str
    grouped: str
    with_barber: str
    allocation: str = UNIFORM
    allocation_args: dict[str, Any] = field(default_factory=dict)

    def rebuild(self, semi_structured: bool, barber: bool) -> str:
        """The chain of rebuilders under a pattern; `barber`: one of its settings is given."""
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
