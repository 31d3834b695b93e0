"""The stage `compare`: producers, rebuilders, patterns and settings on equal terms."""

import shutil
from collections.abc import Sequence
from typing import Any

from ....base.errors import BarberError
from ...cells import Record
from ...compare.settings import CompareSettings
from ...tasks.offline import task_files
from ..shared import SharedSettings
from ..stage import Stage, StageContext, stage


@stage("compare")
class CompareStage(Stage, CompareSettings):
    """Run every cell on the recipe's model and calibration set; what follows works on the dense model again."""

    follows = ("dense",)
    first = "producers"

    def files(self) -> list[str]:
        """Return local task files."""
        return task_files(self.tasks)

    def texts(self) -> list[str]:
        """Return the text of the evaluation."""
        return [self.evaluation]

    def check(self, shared: SharedSettings, earlier: Sequence[Stage]) -> None:
        """Check every cell."""
        from ...compare.cells import cells_of

        cells_of(self.part(CompareSettings), shared.barber_config())

    def run(self, context: StageContext) -> dict[str, Any]:
        """Compare; goes on with the cell it was killed in."""
        from ...compare.runner import run

        def tell(name: str, record: Record, reused: bool) -> None:
            if "perplexity" in record:
                context.log({f"perplexity/{name}": record["perplexity"]["perplexity"]}, None)

        settings, base = self.part(CompareSettings), context.shared.barber_config()
        result = run(context.input_model, context.scratch, settings, base, context.quiet, tell)
        if result.failed:
            name = result.failed[0]
            raise BarberError(f"compare: {name} failed: {result.cells[name]['error']}")
        shutil.copytree(result.output, context.directory, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".lock"))
        perplexities = {name: cell["perplexity"]["perplexity"] for name, cell in result.cells.items()}
        best = min(perplexities, key=perplexities.__getitem__)
        return {
            "cells": len(perplexities), "dense_perplexity": result.dense["perplexity"]["perplexity"],
            "best": best, "best_perplexity": perplexities[best],
        }  # fmt: skip
