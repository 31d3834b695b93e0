"""The cells of a sweep on disk: a file each, put in place whole, and taken again where its settings are the same."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...base.files import write_json
from ...base.fingerprint import digest, of_path
from ...models.loading import ModelReference
from ...shrink.settings import ShrinkConfig
from ..recipe.fingerprint import of_model
from .settings import SweepConfig

FOLDER = "cells"
DENSE = "dense"


@dataclass(frozen=True)
class Cell:
    """One model to be measured.

    Attributes:
        name: of its file.
        config: what is cut out of the dense model; None for the dense model itself.
        fingerprint: of all that decides the result.
    """

    name: str
    config: ShrinkConfig | None
    fingerprint: str

    def result(self, output: Path) -> dict[str, Any] | None:
        """What was measured before under the same settings; None where nothing was."""
        path = output / FOLDER / f"{self.name}.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        found: dict[str, Any] | None = content.get("result") if content.get("fingerprint") == self.fingerprint else None
        return found

    def put(self, output: Path, result: dict[str, Any]) -> None:
        """Write the result beside and put it in place."""
        (output / FOLDER).mkdir(exist_ok=True)
        settings = self.config.model_dump(mode="json") if self.config else None
        content = {"fingerprint": self.fingerprint, "settings": settings, "result": result}
        write_json(output / FOLDER / f"{self.name}.json", content)


def cells_of(config: SweepConfig, reference: ModelReference) -> list[Cell]:
    """All cells, the dense model first.

    Their fingerprints cover the model's files, the content of the texts, and the settings but for the other cells'.
    """
    protocol = {name: getattr(config, name) for name in ("evaluation", "windows", "sequence_length", "latency")}
    texts = [of_path(name) for name in (config.evaluation, *config.calibration)]
    shared = [of_model(reference.name), protocol, texts, config.device, config.dtype, config.text_field]
    cells = [Cell(DENSE, None, digest(shared))]
    for cut in config.cells():
        name = f"{cut.scorer}-{cut.remove:g}-{cut.samples}"
        cells.append(Cell(name, cut, digest([shared, cut.model_dump(mode="json")])))
    return cells
