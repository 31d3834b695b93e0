"""The dense model that a pruned or shrunk one learns from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimum_barber.base.errors import BarberError
from optimum_barber.checkpoints.experts import read_experts
from optimum_barber.checkpoints.names import EXPERTS_NAME, STRUCTURE_NAME
from optimum_barber.checkpoints.pruned import PrunedModel
from optimum_barber.checkpoints.structure import read_structure
from optimum_barber.models.limits import vocabulary
from optimum_barber.models.loading import ModelReference, load_config, load_model, resolve_model


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
        name = str(base) if base is not None else recorded_name(opened)
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

    def load(self, student: Any) -> Any:
        """Load it, frozen, in the dtype and on the device of the model that learns from it."""
        dtype = str(student.dtype).removeprefix("torch.")
        model: Any = load_model(self.reference, dtype)
        return model.to(student.device).requires_grad_(False).eval()


def recorded_name(opened: PrunedModel) -> str | None:
    """Return the name of the dense model in the records of a checkpoint, None where they name none."""
    directory = opened.reference.directory
    name: str | None = None
    if (directory / STRUCTURE_NAME).is_file():
        name = read_structure(directory).base_model["name"]
    elif (directory / EXPERTS_NAME).is_file():
        name = read_experts(directory).base_model["name"]
    elif opened.record is not None:
        name = opened.record.base_model["name"]
    return name
