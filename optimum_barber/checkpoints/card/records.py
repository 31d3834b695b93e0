"""All records that lie in a checkpoint's directory, opened together."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...base.files import is_file, read_json_object
from ..channel_order import ChannelOrder, read_order
from ..experts import PrunedExperts, read_experts
from ..names import EXPERTS_NAME, ORDER_NAME, REPORT_NAME, SPARSITY_NAME, STRUCTURE_NAME
from ..record import SparsityConfig, read_record
from ..structure import PrunedStructure, read_structure

RECORDS = (SPARSITY_NAME, STRUCTURE_NAME, EXPERTS_NAME, ORDER_NAME)
LONGEST_CHAIN = 20  # of checkpoints, each made of the one before
CONDITIONAL = "ForConditionalGeneration"  # how transformers names models of images and text


@dataclass(frozen=True)
class Records:
    """What is recorded of one checkpoint; None where a step never happened."""

    config: dict[str, Any]
    sparsity: SparsityConfig | None
    structure: PrunedStructure | None
    experts: PrunedExperts | None
    order: ChannelOrder | None
    report: dict[str, Any]

    @classmethod
    def read(cls, directory: Path) -> "Records":
        """Read `config.json` and every record beside it."""
        report = directory / REPORT_NAME
        return cls(
            read_json_object(directory / "config.json"),
            read_record(directory) if (directory / SPARSITY_NAME).is_file() else None,
            read_structure(directory) if (directory / STRUCTURE_NAME).is_file() else None,
            read_experts(directory) if (directory / EXPERTS_NAME).is_file() else None,
            read_order(directory) if (directory / ORDER_NAME).is_file() else None,
            read_json_object(report) if report.is_file() else {},
        )

    @property
    def recorded_name(self) -> str | None:
        """The name of the model that the last recorded cut, order or pruning was given; None for one in memory."""
        for record in (self.sparsity, self.structure, self.experts, self.order):
            if record is not None:
                name: Any = record.base_model.get("name")
                return name if isinstance(name, str) else None
        return None

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The steps after the first one: a cut's record goes on through all of them, that of masks begins later."""
        for record in (self.structure, self.experts, self.sparsity):
            if record is not None:
                return record.steps
        return []

    @property
    def is_cut(self) -> bool:
        """True if heads, channels or experts are gone."""
        return self.structure is not None or self.experts is not None

    @property
    def quantized(self) -> bool:
        """True if the weights are packed."""
        return "quantization_config" in self.config

    @property
    def image_text(self) -> bool:
        """True for a language model inside a model of images and text."""
        architectures = self.config.get("architectures") or [""]
        return str(architectures[0]).endswith(CONDITIONAL)


def root_name(records: Records, source: str | None) -> str | None:
    """Return the name of the model at the beginning of a chain of checkpoints, as far back as they lie here.

    Args:
        records: of the last checkpoint.
        source: name of the checkpoint that it was made of, for one without a record of its own; None for a model in
            memory.
    """
    name = records.recorded_name or source
    for _ in range(LONGEST_CHAIN):
        if name is None or not has_records(Path(name)):
            return name
        name = Records.read(Path(name)).recorded_name or name
    return name


def has_records(directory: Path) -> bool:
    """True if a directory holds a checkpoint that this program made of another one."""
    return any(is_file(directory / record) for record in RECORDS)
