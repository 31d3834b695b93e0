"""The stage `report`: what the stages before measured, as a page of HTML, Markdown and JSON."""

from typing import Any

from ....base.files import write_file, write_json
from ..stage import Stage, StageContext, stage


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
