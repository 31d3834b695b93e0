"""Check of whatever a run wrote: a pruned, shrunk, permuted, merged or quantized checkpoint, or an adapter."""

from dataclasses import dataclass
from pathlib import Path

from ..base.errors import BarberError
from ..checkpoints.names import ADAPTER_CONFIG_NAME, EXPERTS_NAME, ORDER_NAME, SPARSITY_NAME, STRUCTURE_NAME
from ..checkpoints.verify import Verification, verify_checkpoint
from ..shrink.audit import CutAudit, audit_cut
from ..shrink.experts import audit_experts
from ..shrink.order_audit import audit_order


@dataclass
class ProductVerification(Verification):
    """Outcome of a check of a shrunk checkpoint, which may have masks too, or of a permuted one.

    Attributes:
        cut: the audit of what was removed or permuted, whose faults are among `faults`.
    """

    cut: CutAudit | str | None = None

    def __str__(self) -> str:
        if self.cut is None:
            return super().__str__()
        return f"{self.cut}\n{super().__str__()}" if self.modules else str(self.cut)


def verify_product(directory: str | Path, base: str | None = None, weights: bool = True) -> Verification:
    """Check whatever a stage wrote: a checkpoint, or an adapter on its base.

    Args:
        directory: of the checkpoint or the adapter.
        base: the dense model to compare a shrunk or permuted one with; None for the recorded one, if it is at hand.
        weights: whether to compare such a one with its dense model at all.

    Raises:
        BarberError: there is nothing of ours to check, or an adapter and its base do not belong together.
    """
    directory = Path(directory)
    if (directory / ADAPTER_CONFIG_NAME).is_file():
        from optimum_barber.integrations.lora.checkpoint import verify_adapter

        return verify_adapter(directory)
    if (directory / EXPERTS_NAME).is_file():
        return _verified_experts(directory, base, weights)
    if (directory / ORDER_NAME).is_file():
        permuted, faults = audit_order(directory, base, weights)
        return ProductVerification("dense", 0, 0, 0, faults, permuted)
    if not (directory / STRUCTURE_NAME).is_file():
        if base is not None:
            raise BarberError(f"base goes with a shrunk or permuted checkpoint: {directory} has no {STRUCTURE_NAME}")
        return verify_checkpoint(directory)
    cut = audit_cut(directory, base, weights)
    masks = verify_checkpoint(directory) if (directory / SPARSITY_NAME).is_file() else Verification("dense")
    faults = [*cut.faults, *masks.faults]
    return ProductVerification(masks.pattern, masks.modules, masks.pruned, masks.zeros, faults, cut)


def _verified_experts(directory: Path, base: str | None, weights: bool) -> ProductVerification:
    """Check a checkpoint that lost experts; under masks, if it has any, its weights are not the dense ones."""
    masked = (directory / SPARSITY_NAME).is_file()
    checked, faults = audit_experts(directory, base, weights and not masked)
    masks = verify_checkpoint(directory) if masked else Verification("dense")
    return ProductVerification(
        masks.pattern, masks.modules, masks.pruned, masks.zeros, [*faults, *masks.faults], checked
    )
