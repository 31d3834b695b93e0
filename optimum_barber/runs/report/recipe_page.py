"""The page of a recipe's run: its stages, its evaluations, and every pruning in it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...base.files import beside, read_json
from ...checkpoints.names import REPORT_NAME, SPARSITY_NAME
from ...checkpoints.record import read_record
from ..recipe.stage import MODEL, RUN_NAME, read_stage
from .checkpoint_page import run_sections
from .comparison import COMPARE_NAME, comparison_page
from .page import Bars, Page, Rows, Section, Table, as_text, flattened, settings_table

Stages = Mapping[str, Mapping[str, Any]]


def run_page(directory: Path) -> Page:
    """The page of a run's directory."""
    run = read_json(directory / RUN_NAME)
    for stage in run["stages"]:
        beside(directory / RUN_NAME, stage)
    return recipe_page(run["name"], run.get("settings") or {}, run["stages"], directory, run["software"])


def recipe_page(
    name: str, settings: Mapping[str, Any], stages: Stages, output: Path, software: Mapping[str, str]
) -> Page:
    """The page from a run's parts: `settings` are of one level, `output` is the run's directory."""
    sections = [Section("Stages", [_stage_table(stages)]), Section("Evaluation", _evaluation_items(stages))]
    fingerprints: Rows = []
    for stage in stages:
        sections += _stage_sections(output, stage)
        fingerprints.append([stage, read_stage(output / stage).get("fingerprint")])
    tables = [
        settings_table("Settings of the recipe", settings),
        Table("Fingerprints of the stages", ["stage", "SHA-256"], fingerprints),
        settings_table("Versions", software),
    ]
    sections.append(Section("Settings and fingerprints", [table for table in tables if table.rows]))
    return Page(f"{name}: report of a recipe", f"Model: {settings.get('model', 'not recorded')}.", sections)


def _stage_sections(output: Path, stage: str) -> list[Section]:
    """The section of a stage that pruned or compared; none of another."""
    sections = []
    model = output / stage / MODEL
    if (model / SPARSITY_NAME).is_file() and (model / REPORT_NAME).is_file():
        report = read_json(model / REPORT_NAME)
        if report.get("blocks"):
            sections.append(Section(stage, run_sections(read_record(model), report)))
    if (output / stage / COMPARE_NAME).is_file():
        sections.append(Section(stage, comparison_page(output / stage).sections))
    return sections


def _stage_table(stages: Stages) -> Table:
    rows: Rows = []
    for stage, figures in stages.items():
        parts = []
        for key, value in figures.items():
            if key != "seconds" and isinstance(value, int | float | str):
                parts.append(f"{key} {as_text(value)}")
        rows.append([stage, float(figures.get("seconds", 0)), ", ".join(parts)])
    return Table("Stages", ["stage", "seconds", "figures"], rows)


def _evaluation_items(stages: Stages) -> list[Any]:
    evaluations = {stage: figures for stage, figures in stages.items() if "protocol" in figures}
    measures: Rows = []
    for figures in evaluations.values():
        measures += _measures_of("dense", figures.get("dense") or {})
    for stage, figures in evaluations.items():
        measures += _measures_of(stage, figures["model"])
    if not measures:
        return ["Not measured: the recipe has no evaluate stage."]
    measures = list(map(list, dict.fromkeys(map(tuple, measures))))
    return [*_perplexity_bars(measures), Table("Measures", ["model at", "measure", "value"], measures)]


def _measures_of(model: str, figures: Mapping[str, Any]) -> Rows:
    """One model's perplexities and task results: model, measure and value."""
    measures: Rows = []
    for text, result in figures.get("perplexity", {}).items():
        name = f"perplexity, {text}, {result['windows']} windows of {result['sequence_length']}"
        measures.append([model, name, result["perplexity"]])
    for task, metrics in figures.get("tasks", {}).get("results", {}).items():
        for name, value in flattened(metrics).items():
            measures.append([model, f"{task}, {name}", value])
    return measures


def _perplexity_bars(measures: Sequence[Sequence[Any]]) -> list[Bars]:
    """One chart for each text on which a model other than the dense one was measured."""
    by_measure: dict[str, dict[str, Any]] = {}
    for model, measure, value in measures:
        if measure.startswith("perplexity"):
            by_measure.setdefault(measure, {})[model] = value
    charts = []
    for measure, values in by_measure.items():
        dense = values.pop("dense", None)
        if values:
            reference = ("dense", dense) if dense is not None else None
            charts.append(Bars("Perplexity", measure, "perplexity", values, reference, log=True))
    return charts
