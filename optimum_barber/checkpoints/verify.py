"""Checking a pruned checkpoint against its own record: hashes, pattern, counts, and every zero."""

from dataclasses import dataclass, field
from pathlib import Path

from ..base.errors import BarberError
from ..tensors.masks import holds_pattern
from ..tensors.patterns import SparsityPattern
from .record import MaskFile, ModuleSparsity, read_record
from .safetensors import SafetensorsWeights


@dataclass
class Verification:
    """Outcome of a check of masks and zeros."""

    pattern: str
    modules: int = 0  # that were checked
    pruned: int = 0  # weights, by the masks
    zeros: int = 0  # of those, in the checkpoint
    faults: list[str] = field(default_factory=list)  # a line for every module that has one

    def __str__(self) -> str:
        verdict = "FAILED" if self.faults else "all as recorded"
        zeros = f"{self.zeros:,} of {self.pruned:,} zeros kept"
        return f"{self.modules} modules, pattern {self.pattern}, {zeros}: {verdict}"


def verify_checkpoint(directory: str | Path) -> Verification:
    """Check every module of the checkpoint in `directory`.

    Raises:
        BarberError: there is no checkpoint of ours to check.
    """
    directory = Path(directory)
    record = read_record(directory)
    masks = MaskFile(directory / record.masks)
    weights = SafetensorsWeights.open(directory)
    pattern = record.sparsity_pattern()
    outcome = Verification(record.pattern, len(record.modules))
    for name, recorded in record.modules.items():
        try:
            fault = _check(name, recorded, masks, weights, pattern, outcome)
        except BarberError as error:
            fault = str(error)
        if fault:
            outcome.faults.append(fault)
    return outcome


def _check(
    name: str,
    recorded: ModuleSparsity,
    masks: MaskFile,
    weights: SafetensorsWeights,
    pattern: SparsityPattern,
    outcome: Verification,
) -> str | None:
    mask = masks[name]
    if mask.sha256 != recorded.sha256:
        return f"{name}: the mask's hash differs from the recorded one"
    if mask.pruned != recorded.pruned:
        return f"{name}: the mask prunes {mask.pruned} weights, recorded are {recorded.pruned}"
    keep, weight = mask.unpack(), weights.linear(name, recorded.transposed)
    if weight.shape != keep.shape:
        return f"{name}: weight of shape {tuple(weight.shape)} under a mask of shape {tuple(keep.shape)}"
    zeros = int((weight[~keep] == 0).count_nonzero())
    outcome.pruned += mask.pruned
    outcome.zeros += zeros
    if not holds_pattern(keep, pattern):
        return f"{name}: the mask does not hold the pattern {pattern}"
    return f"{name}: {mask.pruned - zeros} of {mask.pruned} zeros are lost" if zeros < mask.pruned else None
