"""lm-eval tasks out of local files: `choice:FILE.jsonl` and `rolling:FILE`, checked row by row, no network."""

import json
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ...base.errors import BarberError
from ...base.files import is_file
from ...text.documents import decoded
from ...text.sources import read_texts

Rows = list[dict[str, Any]]


class _ChoiceRow(BaseModel):
    """One line of a `choice:` file; other fields are left out."""

    model_config = ConfigDict(strict=True)

    question: str = Field(min_length=1)
    choices: list[Annotated[str, Field(min_length=1)]] = Field(min_length=2)
    gold: int = Field(ge=0, description="position of the right choice, from 0")

    @model_validator(mode="after")
    def _check(self) -> "_ChoiceRow":
        if self.gold >= len(self.choices):
            raise ValueError(f"gold {self.gold} is none of the {len(self.choices)} choices, which count from 0")
        return self


def _choice_rows(path: str) -> Rows:
    lines = decoded(path, "task file").split("\n")
    rows = [_choice_row(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise BarberError(f"task file {path} is empty")
    return rows


def _choice_row(path: str, number: int, line: str) -> dict[str, Any]:
    try:
        return _ChoiceRow.model_validate_json(line).model_dump()
    except ValidationError as error:
        fault = error.errors()[0]
        message = fault["msg"].removeprefix("Value error, ")
        if fault["loc"]:
            message = f"{'.'.join(map(str, fault['loc']))}: {message}"
        raise BarberError(f"task file {path}, line {number}: {message}") from None


def _rolling_rows(path: str) -> Rows:
    """Read the documents of a text file (one) or of a JSON file (its field `text`), without blank ones."""
    return [{"text": text} for text in read_texts(path, "evaluation") if text.strip()]


KINDS: dict[str, Callable[[str], Rows]] = {"choice": _choice_rows, "rolling": _rolling_rows}


def task_files(tasks: Sequence[str]) -> list[str]:
    """Return the files of the local tasks among `tasks`."""
    paths = []
    for task in tasks:
        kind, _, path = task.partition(":")
        if kind in KINDS:
            paths.append(path)
    return paths


def _offline_task(name: str, folder: Path, number: int) -> dict[str, Any] | None:
    """Return the lm-eval configuration of `KIND:FILE`, its rows written into `folder`; None for lm-eval's own tasks."""
    kind, colon, path = name.partition(":")
    if not colon:
        return None
    if kind not in KINDS:
        raise BarberError(f"task {name!r} is not legal: {':FILE, '.join(KINDS)}:FILE, or a name")
    if not is_file(path):
        raise BarberError(f"task {name!r}: there is no file {path!r}")
    data = folder / f"{number}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in KINDS[kind](path)), encoding="utf-8")
    template = files(__package__).joinpath("templates", f"{kind}.yaml")
    config: dict[str, Any] = yaml.safe_load(template.read_text("utf-8"))
    config["task"] = Path(path).stem
    config["dataset_kwargs"] = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "datasets")}
    config["metadata"]["source"] = str(Path(path).absolute())
    return config


def offline_tasks(names: Sequence[str], folder: Path) -> list[str | dict[str, Any]]:
    """Put lm-eval configurations in the place of `KIND:FILE`, and leave other names as they are.

    The rows go into `folder`, for as long as the tasks live.

    Raises:
        BarberError: an unknown kind, a missing file, a bad row; or two files that give a task of the same name.
    """
    tasks: list[str | dict[str, Any]] = []
    for number, name in enumerate(names):
        tasks.append(_offline_task(name, folder, number) or name)
    taken: set[str] = set()
    for task in tasks:
        name = task if isinstance(task, str) else task["task"]
        if name in taken:
            raise BarberError(f"two tasks are called {name!r}: name each task once, rename a file")
        taken.add(name)
    return tasks
