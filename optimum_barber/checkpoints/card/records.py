"""All records that lie in a checkpoint's directory, opened together."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...base.files import read_json_object
from ..channel_order import ChannelOrder, read_order
from ..experts import PrunedExperts, read_experts
from ..names import EXPERTS_NAME, ORDER_NAME, REPORT_NAME, SPARSITY_NAME, STRUCTURE_NAME
from ..record import SparsityConfig, read_record
from ..structure import PrunedStructure, read_structure

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
    def base_name(self) -> str | None:
        """The name of the model that the first recorded step was given; None for one in memory."""
        for record in (self.structure, self.experts, self.sparsity, self.order):
            if record is not None:
                name: str | None = record.base_model["name"]
                return name
        return None

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The steps after the masks were made, or after the cut where there are none."""
        for record in (self.sparsity, self.structure, self.experts):
            if record is not None:
                return record.steps
        return []

    @property
    def quantized(self) -> bool:
        """True if the weights are packed."""
        return "quantization_config" in self.config

    @property
    def image_text(self) -> bool:
        """True for a language model inside a model of images and text."""
        architectures = self.config.get("architectures") or [""]
        return str(architectures[0]).endswith(CONDITIONAL)
