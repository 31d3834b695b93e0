"""All records that lie in a checkpoint's directory, opened together."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...base.files import read_json_object
from ..base_model import READERS, has_records, read_if_there
from ..channel_order import ChannelOrder
from ..experts import PrunedExperts
from ..names import REPORT_NAME
from ..record import SparsityConfig
from ..structure import PrunedStructure

LONGEST_CHAIN = 20  # of checkpoints, each made of the one before
CONDITIONAL = "ForConditionalGeneration"  # how transformers names models of images and text


@dataclass(frozen=True)
class Records:
    """What is recorded of one checkpoint, its records in the order of `READERS`; None where a step never happened."""

    config: dict[str, Any]
    report: dict[str, Any]
    sparsity: SparsityConfig | None
    structure: PrunedStructure | None
    experts: PrunedExperts | None
    order: ChannelOrder | None

    @classmethod
    def read(cls, directory: Path) -> "Records":
        """Read `config.json` and every record beside it."""
        config, report = read_json_object(directory / "config.json"), {}
        if (directory / REPORT_NAME).is_file():
            report = read_json_object(directory / REPORT_NAME)
        return cls(config, report, *(read_if_there(directory, file) for file in READERS))

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
