"""The page of a recipe's run: its stages, what was evaluated, and every pruning within."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...base.files import read_json
from ...checkpoints.names import REPORT_NAME, SPARSITY_NAME
from ...checkpoints.record import read_record
from ..recipe.directory import RUN_NAME, read_stage
from ..recipe.stage import MODEL
from .checkpoint_page import run_sections
from .comparison import COMPARE_NAME, comparison_page
from .page import Bars, Page, Section, Table, Value, plainly
from .settings import flattened, settings_table

Stages = Mapping[str, Mapping[str, Any]]


def run_page(directory: Path) -> Page:
    """The page of a run's directory."""
    run = read_json(directory / RUN_NAME)
    return recipe_page(run["name"], run.get("settings") or {}, run["stages"], directory, run["software"])


def recipe_page(
    name: str, settings: Mapping[str, Any], stages: Stages, output: Path, software: Mapping[str, str]
) -> Page:
    """The page out of a run's parts.

    Args:
        name: of the recipe.
        settings: of the recipe, as one level.
        stages: figures by stage.
        output: the run's directory.
        software: versions.
    """
    sections = [Section("Stages", [stage_table(stages)]), Section("Evaluation", evaluation_items(stages))]
    for stage in stages:
        model = output / stage / MODEL
        if (model / SPARSITY_NAME).is_file() and (model / REPORT_NAME).is_file():
            report = read_json(model / REPORT_NAME)
            if report.get("blocks"):
                sections.append(Section(stage, list(run_sections(read_record(model), report))))
        if (output / stage / COMPARE_NAME).is_file():
            sections.append(Section(stage, list(comparison_page(output / stage).sections)))
    prints: list[list[Value]] = [[stage, read_stage(output / stage).get("fingerprint")] for stage in stages]
    tables = [
        settings_table("Settings of the recipe", settings),
        Table("Fingerprints of the stages", ["stage", "SHA-256"], prints),
        settings_table("Versions", software),
    ]
    sections.append(Section("Settings and fingerprints", [table for table in tables if table.rows]))
    return Page(f"{name}: report of a recipe", f"Model: {settings.get('model', 'not recorded')}.", sections)


def stage_table(stages: Stages) -> Table:
    """One row a stage; what was evaluated has its own table."""
    rows: list[list[Value]] = []
    for directory, figures in stages.items():
        plain = {k: v for k, v in figures.items() if k != "seconds" and isinstance(v, int | float | str)}
        said = ", ".join(f"{key} {plainly(value)}" for key, value in plain.items())
        rows.append([directory, float(figures.get("seconds", 0)), said])
    return Table("Stages", ["stage", "seconds", "figures"], rows)


def evaluation_items(stages: Stages) -> list[Any]:
    """A table of all measures, and bars of each text's perplexity."""
    measured = {directory: figures for directory, figures in stages.items() if "protocol" in figures}
    found = [row for figures in measured.values() for row in rows("dense", figures.get("dense") or {})]
    found += [row for directory, figures in measured.items() for row in rows(directory, figures["model"])]
    if not found:
        return ["Not measured: the recipe has no evaluate stage."]
    unique = [list(row) for row in dict.fromkeys(map(tuple, found))]
    charts = []
    for measure in dict.fromkeys(str(row[1]) for row in unique if str(row[1]).startswith("perplexity")):
        values: dict[str, Any] = {str(row[0]): row[2] for row in unique if row[1] == measure}
        dense = values.pop("dense", None)
        line = ("dense", dense) if dense is not None else None
        if values:
            charts.append(Bars("Perplexity", measure, "perplexity", values, line, log=True))
    return [*charts, Table("Measures", ["model at", "measure", "value"], unique)]


def rows(model: str, figures: Mapping[str, Any]) -> list[list[Value]]:
    """One model's perplexities and task results."""
    found: list[list[Value]] = [
        [model, f"perplexity, {text}, {v['windows']} windows of {v['sequence_length']}", v["perplexity"]]
        for text, v in figures.get("perplexity", {}).items()
    ]
    for task, metrics in figures.get("tasks", {}).get("results", {}).items():
        found += [[model, f"{task}, {name}", value] for name, value in flattened(metrics).items()]
    return found
