"""The stage `report`: what the stages before measured, as a page of Markdown and JSON."""

import json
from collections.abc import Mapping
from typing import Any

from ..stage import Stage, Work, stage
from .evaluate import flat


@stage("report")
class ReportStage(Stage):
    """Gather the figures of all stages before."""

    follows = ("dense", "pruned", "adapter", "tuned", "quantized")

    def run(self, work: Work) -> dict[str, Any]:
        """Write `report.md` and `report.json`."""
        (work.directory / "report.md").write_text(
            page(work.recipe.name, work.recipe.model, work.earlier), encoding="utf-8"
        )
        (work.directory / "report.json").write_text(json.dumps(work.earlier, indent=2) + "\n", encoding="utf-8")
        return {}


def page(name: str, model: str, stages: Mapping[str, Mapping[str, Any]]) -> str:
    """A table of the stages and one of what was evaluated."""
    lines = [f"# {name}", "", f"Model: {model}", "", "| stage | seconds | figures |", "| --- | --- | --- |"]
    for directory, figures in stages.items():
        plain = {key: value for key, value in flat(dict(figures)).items() if key != "seconds" and "/" not in key}
        said = ", ".join(f"{key} {plainly(value)}" for key, value in plain.items())
        lines.append(f"| {directory} | {figures.get('seconds', 0):.1f} | {said} |")
    measured = {directory: figures for directory, figures in stages.items() if "protocol" in figures}
    found = [row for figures in measured.values() for row in rows("dense", figures.get("dense", {}))]
    found += [row for directory, figures in measured.items() for row in rows(directory, figures["model"])]
    if found:
        lines += ["", "| model at | measure | value |", "| --- | --- | --- |", *dict.fromkeys(found)]
    return "\n".join(lines) + "\n"


def rows(model: str, figures: Mapping[str, Any]) -> list[str]:
    """Markdown rows of one model's perplexities and task results."""
    found = [
        f"| {model} | perplexity, {text}, {v['windows']} windows of {v['sequence_length']} | {v['perplexity']:.3f} |"
        for text, v in figures.get("perplexity", {}).items()
    ]
    for task, metrics in figures.get("tasks", {}).get("results", {}).items():
        found += [f"| {model} | {task}, {name} | {plainly(value)} |" for name, value in metrics.items()]
    return found


def plainly(value: float) -> str:
    """A count in full, anything else to six digits."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
