"""Stages that measure: `compare`, `evaluate` and `report`."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from ....base.errors import BarberError
from ....base.files import write_file, write_json
from ...cells import Record
from ...compare.settings import CompareSettings
from ...tasks.offline import task_files
from ..stage import SharedSettings, Stage, StageContext, flat, stage

PROTOCOL = ("perplexity", "sequence_length", "windows", "tasks", "limit", "dtype")


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


@stage("evaluate")
class EvaluateStage(Stage):
    """Measure whatever model the stages before left."""

    follows = ("dense", "pruned", "adapter", "tuned", "quantized")
    first = "perplexity"

    perplexity: list[str] = Field(default_factory=list, description="texts for perplexity: files or registered names")
    sequence_length: int | None = Field(None, ge=2, description="tokens a window; default: the calibration's")
    windows: int | None = Field(None, ge=1, description="spread so many windows over each text; default: all")
    tasks: list[str] = Field(
        default_factory=list, description="lm-eval tasks; choice:FILE.jsonl and rolling:FILE are local ones"
    )
    limit: int | None = Field(None, ge=1, description="rows a task; default: all")
    batch_size: int = Field(1, ge=1, description="of the tasks")
    dtype: str = Field("auto", description="of the computation: auto is float32 on a CPU, else the model's own")
    dense: bool = Field(True, description="measure the dense model too, once a recipe and protocol")

    def files(self) -> list[str]:
        """Return local task files."""
        return task_files(self.tasks)

    def texts(self) -> list[str]:
        """Return texts for perplexity."""
        return self.perplexity

    def check(self, shared: SharedSettings, earlier: Sequence[Stage]) -> None:
        """Refuse a stage that measures nothing."""
        if not self.perplexity and not self.tasks:
            raise BarberError("nothing to measure: give perplexity or tasks")

    def run(self, context: StageContext) -> dict[str, Any]:
        """Measure the model, and the dense one unless an earlier stage did under the same protocol."""
        length = self.sequence_length or context.shared.calibration.sequence_length
        protocol = {name: getattr(self, name) for name in PROTOCOL}
        protocol["sequence_length"] = length
        figures = {"model": self.measure(context.input_model, length, context), "protocol": protocol}
        dense = context.shared.model
        if self.dense and context.input_model != dense:
            figures["dense"] = self._earlier_dense(protocol, context) or self.measure(dense, length, context)
        context.log(flat(figures["model"]), None)
        _show_in_card(context.input_model, figures)
        return figures

    def measure(self, model: str, length: int | None, context: StageContext) -> dict[str, Any]:
        """Return perplexities and task results of one model."""
        from ...tasks.evaluate import evaluate_tasks

        calibration, device = context.shared.calibration, context.shared.device
        figures: dict[str, Any] = {"perplexity": self.perplexities(model, length, context)}
        if self.tasks:
            figures["tasks"] = evaluate_tasks(
                model, self.tasks, limit=self.limit, batch_size=self.batch_size, device=device, dtype=self.dtype,
                seed=calibration.seed, quiet=context.quiet,
            )  # fmt: skip
        return figures

    def perplexities(self, model: str, length: int | None, context: StageContext) -> dict[str, dict[str, Any]]:
        """Return the perplexity of one model by text; it is loaded for these alone."""
        from ...evaluate import Evaluator

        if not self.perplexity:
            return {}
        settings = context.shared.calibration.model_copy(update={"sequence_length": length})
        evaluator = Evaluator(model, settings, self.dtype, context.shared.device)
        windows = {text: evaluator.windows(text, self.windows) for text in self.perplexity}
        return {text: evaluator.perplexity(some, context.quiet) for text, some in windows.items()}

    @staticmethod
    def _earlier_dense(protocol: dict[str, Any], context: StageContext) -> Any:
        """Return figures of the dense model that an earlier stage measured under the same protocol."""
        for figures in context.earlier.values():
            if figures.get("protocol") == protocol and "dense" in figures:
                return figures["dense"]
        return None


def _show_in_card(model: str, figures: dict[str, Any]) -> None:
    """Keep perplexities beside the checkpoint that they are of, and show them in its model card."""
    from ....checkpoints.card import record_evaluation

    rows: list[dict[str, Any]] = []
    for kind in ("dense", "model"):
        for row in figures.get(kind, {}).get("perplexity", {}).values():
            rows.append({"dense_baseline": kind == "dense", **row})
    if Path(model).is_dir():
        record_evaluation(Path(model), rows)


@stage("report")
class ReportStage(Stage):
    """Gather the figures of all stages before."""

    follows = ("dense", "pruned", "adapter", "tuned", "quantized")

    def run(self, context: StageContext) -> dict[str, Any]:
        """Write `report.html`, `report.md` and `report.json`."""
        from ....checkpoints.write import software
        from ...report.html import html
        from ...report.markdown import markdown
        from ...report.recipe_page import recipe_page

        directory = context.directory
        page = recipe_page(context.shared.name, context.settings, context.earlier, directory.parent, software())
        write_file(directory / "report.html", html(page))
        write_file(directory / "report.md", markdown(page))
        write_json(directory / "report.json", context.earlier)
        return {}
