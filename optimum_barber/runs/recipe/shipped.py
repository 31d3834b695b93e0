"""Recipes by name: those that ship with the package."""

from importlib.resources import files
from pathlib import Path

from ...base.errors import BarberError, unknown_name


def find_recipe(name: str) -> Path:
    """The file of a recipe: a path, or the name of one that ships with the package.

    Raises:
        BarberError: neither; names the nearest shipped ones.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    shipped = shipped_recipes()
    if name in shipped:
        return shipped[name]
    raise BarberError(f"{unknown_name('recipe', name, shipped)}, or a YAML file")


def shipped_recipes() -> dict[str, Path]:
    """The recipes that ship with the package, by name."""
    folder = Path(str(files("optimum_barber.recipes")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
