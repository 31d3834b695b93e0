"""The dense model that a pruned or shrunk one learns from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from optimum_barber.base.errors import BarberError
from optimum_barber.checkpoints.base_model import recorded_base
from optimum_barber.checkpoints.names import EXPERTS_NAME, SPARSITY_NAME, STRUCTURE_NAME
from optimum_barber.checkpoints.pruned import PrunedModel
from optimum_barber.models.limits import vocabulary
from optimum_barber.models.loading import ModelReference, load_config, load_model, local_model, resolve_model

OF_LOSSES = (STRUCTURE_NAME, EXPERTS_NAME, SPARSITY_NAME)  # records of what was lost: a cut comes before masks


@dataclass(frozen=True)
class DenseModel:
    """A dense model that is known, but not loaded."""

    reference: ModelReference

    @classmethod
    def of(cls, opened: PrunedModel, base: str | Path | None = None) -> "DenseModel":
        """Return `base`, or the model that the records of a checkpoint name: the one before any cut.

        Raises:
            BarberError: there is no such record, or the model has another vocabulary.
        """
        name = str(base) if base is not None else recorded_name(opened.reference.directory)
        if name is None:
            raise BarberError(
                f"{opened.reference.full_name} does not say which dense model it was made from: give it as base"
            )
        dense = cls(resolve_model(name))
        own, other = vocabulary(opened.model), vocabulary(load_config(dense.reference))
        if own != other:
            raise BarberError(f"base {name!r} has a vocabulary of {other} tokens, the model has {own}")
        return dense

    @property
    def name(self) -> str:
        """Its full name."""
        return self.reference.full_name

    def load(self, dtype: str, device: torch.device) -> Any:
        """Load it, frozen."""
        model: Any = load_model(self.reference, dtype)
        return model.to(device).requires_grad_(False).eval()


def recorded_name(directory: Path) -> str | None:
    """Return the dense model that the records of a checkpoint name, None where they name none.

    A record may name a checkpoint that was cut itself: its own record is followed, where it is on this machine.
    """
    seen: set[Path] = set()
    name = recorded_base(directory, OF_LOSSES)
    while name is not None:
        reference = local_model(name)
        if reference is None or reference.directory in seen:
            break
        seen.add(reference.directory)
        earlier = recorded_base(reference.directory, OF_LOSSES)
        if earlier is None:
            break
        name = earlier
    return name
