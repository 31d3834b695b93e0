"""The stage `compare`: producers, rebuilders, patterns and settings on equal terms."""

import shutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from ....base.errors import BarberError
from ....base.fields import one_line
from ...compare.settings import CompareSettings
from ..stage import Stage, Work, stage

if TYPE_CHECKING:
    from ..schema import Recipe


@stage("compare")
class CompareStage(Stage, CompareSettings):
    """Run every cell on the recipe's model and calibration set; what follows works on the dense model again."""

    follows = ("dense",)

    def files(self) -> list[str]:
        """Local task files."""
        return [task.split(":", 1)[1] for task in self.tasks if task.split(":", 1)[0] in ("choice", "rolling")]

    def texts(self) -> list[str]:
        """The text of the evaluation."""
        return [self.evaluation]

    def settings(self) -> CompareSettings:
        """The settings of the comparison alone."""
        return CompareSettings(**{name: getattr(self, name) for name in CompareSettings.model_fields})

    def faults(self, recipe: "Recipe") -> list[tuple[str, str]]:
        """Every fault of every cell."""
        from ...compare.cells import cells_of

        try:
            cells_of(self.settings(), recipe.config())
        except ValidationError as error:
            return [("producers", str(one_line(error)))]
        except BarberError as error:
            return [("producers", line) for line in str(error).splitlines()]
        return []

    def run(self, work: Work) -> dict[str, Any]:
        """Compare; goes on with the cell it was killed in."""
        from ...compare.runner import run

        def tell(name: str, record: Mapping[str, Any], reused: bool) -> None:
            if "perplexity" in record:
                work.log({f"perplexity/{name}": record["perplexity"]["perplexity"]}, None)

        done = run(work.model, work.scratch, self.settings(), work.recipe.config(), work.quiet, tell)
        if done.failed:
            raise BarberError(f"compare: {done.failed[0]} failed: {done.cells[done.failed[0]]['error']}")
        shutil.copytree(done.output, work.directory, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".lock"))
        found = {name: cell["perplexity"]["perplexity"] for name, cell in done.cells.items()}
        best = min(found, key=lambda name: found[name])
        dense = done.dense["perplexity"]["perplexity"]
        return {"cells": len(found), "dense_perplexity": dense, "best": best, "best_perplexity": found[best]}
