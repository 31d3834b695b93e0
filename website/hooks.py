"""Pages that do not lie in docs/: the README, results and changes as they are, and the reference out of the code."""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from pydantic import BaseModel

ROOT = Path(__file__).resolve().parents[1]
ELSEWHERE = {  # page -> file of the repository
    "index.md": "README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
    "results.md": "benchmarks/RESULTS.md",
    "history.md": "benchmarks/HISTORY.md",
}
FENCE = re.compile(r"(^```.*?^```[ \t]*$)", re.M | re.S)
LINK = re.compile(r"\[([^\]]+)\]\(([^)\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie elsewhere, and those that are generated."""
    for page, source in ELSEWHERE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    files.append(File.generated(config, "python.md", content=python_reference()))
    files.append(File.generated(config, "stages.md", content=stage_reference()))
    return files


def on_page_markdown(markdown: str, page: Any, files: Files, **_: Any) -> str:
    """Point links between files of the repository to pages; those to other files become plain text."""
    source = source_of(page.file.src_uri)
    pages = {source_of(file.src_uri): file.src_uri for file in files.documentation_pages()}

    def relinked(match: re.Match[str]) -> str:
        text, target = match.groups()
        path, mark, anchor = target.partition("#")
        if "://" in target or not path:
            return match[0]
        place = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        return f"[{text}]({pages[place]}{mark}{anchor})" if place in pages else text

    parts = FENCE.split(markdown)
    return "".join(part if part.startswith("```") else LINK.sub(relinked, part) for part in parts)


def source_of(page: str) -> str:
    """Return the file of the repository that a page is made of."""
    return ELSEWHERE.get(page, f"docs/{page}")


def python_reference() -> str:
    """Return a page with every public name, by its docstring; of settings also the fields."""
    import optimum_barber

    lines = ["# Python", "", "All of these are imported from `optimum_barber`.", ""]
    for name, home in optimum_barber._HOME.items():
        path = f"optimum_barber.{home}".replace("optimum_barber.integrations", "integrations")
        lines += [f"::: {path}.{name}", ""]
        kind = getattr(optimum_barber, name)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            lines += [*field_table(kind), ""]
    return "\n".join(lines)


def stage_reference() -> str:
    """Return a page with the fields of every stage of a recipe, and the recipes that come with the package."""
    from optimum_barber.runs.recipe.stage import STAGES

    lines = ["# Stages of recipes", "", "How recipes are written and run: [recipes](recipes.md).", ""]
    for name in STAGES:
        lines += [f"## {name}", "", first_paragraph(STAGES[name].__doc__), "", *field_table(STAGES[name]), ""]
    lines += ["## Recipes that come with the package", ""]
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        lines += [f"### {path.name}", "", "```yaml", path.read_text(encoding="utf-8").rstrip(), "```", ""]
    return "\n".join(lines)


def field_table(kind: type[BaseModel]) -> list[str]:
    """Return a table of the fields of settings."""
    if not kind.model_fields:
        return []
    lines = ["| Setting | Default | Meaning |", "| --- | --- | --- |"]
    for name, field in kind.model_fields.items():
        default = "required" if field.is_required() else default_text(field.get_default(call_default_factory=True))
        lines.append(f"| `{name}` | {default} | {cell(field.description or '')} |")
    return lines


def first_paragraph(text: str | None) -> str:
    """Return the first paragraph of a docstring in one line."""
    return " ".join((text or "").split("\n\n")[0].split())


def default_text(value: Any) -> str:
    """Return a default as a recipe would have it."""
    if value is None or value == [] or value == {}:
        return ""
    if hasattr(value, "model_dump"):
        return "see below"
    return f"`{cell(value)}`"


def cell(value: Any) -> str:
    """Return text that stays within its cell."""
    return str(value).replace("|", "\\|").replace("\n", " ").replace("*", "\\*").replace("<", "&lt;")
