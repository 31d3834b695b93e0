"""The stage `report`: what the stages before measured, as a page of HTML, Markdown and JSON."""

import json
from typing import Any

from ..stage import Stage, Work, stage


@stage("report")
class ReportStage(Stage):
    """Gather the figures of all stages before."""

    follows = ("dense", "pruned", "adapter", "tuned", "quantized")

    def run(self, work: Work) -> dict[str, Any]:
        """Write `report.html`, `report.md` and `report.json`."""
        from ....checkpoints.write import software
        from ...report.html import html
        from ...report.markdown import markdown
        from ...report.recipe_page import recipe_page
        from ..runner import flat_settings

        output = work.directory.parent
        page = recipe_page(work.recipe.name, flat_settings(work.recipe), work.earlier, output, software())
        (work.directory / "report.html").write_text(html(page), encoding="utf-8")
        (work.directory / "report.md").write_text(markdown(page), encoding="utf-8")
        (work.directory / "report.json").write_text(json.dumps(work.earlier, indent=2) + "\n", encoding="utf-8")
        return {}
