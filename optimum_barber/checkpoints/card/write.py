"""Writing the model card of a checkpoint, out of its records and of the card of its source."""

import json
import logging
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...base.files import write_file
from ...base.flag_names import flags_of, shortened
from ...models.loading import ModelReference, brief
from ..base_model import has_records
from ..names import CARD_NAME
from .body import evaluation_table, limits, loading, sparsity_table, summary, terms, title
from .metadata import card_metadata, card_text, metadata_of
from .records import Records, root_name

logger = logging.getLogger(__name__)
ANY_MARK = "<!-- optimum-barber:"
COMMANDS = f"{ANY_MARK} commands -->"
EVALUATION = f"{ANY_MARK} evaluation -->"
END = f"{ANY_MARK} end -->"
MOST_LINES, LONGEST_LINE = 20, 4000  # of commands that are taken over


@dataclass(frozen=True)
class Step:
    """The step that made a checkpoint.

    Attributes:
        name: a command, or a stage of a recipe.
        settings: those of a command, written as flags; or those of a stage that has no command.
        text: source of the calibration windows, as recorded; None where none were read.
        base: name of the dense model, where the command was given one beside its input.
    """

    name: str
    settings: Any
    text: str | None = None
    base: str | None = None

    def line(self, source: str, output: str) -> str:
        """Return the command that makes `output` of `source`; for a stage of a recipe a comment."""
        if isinstance(self.settings, Mapping):
            return f"# {source} -> {output}, by the recipe stage {json.dumps({self.name: self.settings})}"
        base = ["--base", shortened(self.base)] if self.base else []
        command = shlex.join(["optimum-barber", self.name, source, *base, *flags_of(self.settings), "-o", output])
        return f"{command}  # on windows from Python" if self._has_other_windows() else command

    def _has_other_windows(self) -> bool:
        texts = self.settings.calibration.texts or ["c4"]
        return self.text is not None and self.text != ", ".join(texts)


def write_card(directory: Path, source: ModelReference | None, step: Step) -> None:
    """Write the model card of a checkpoint whose files are all in place.

    Args:
        directory: holds the checkpoint.
        source: the checkpoint that it was made of; its card gives licence, language and the commands before this one.
            None for a model in memory.
        step: what made it.
    """
    write_or_warn(directory, lambda: _card(directory, source, step))


def write_or_warn(directory: Path, card: Callable[[], str]) -> None:
    """Write what `card` returns as the model card of a directory; warn where it cannot be made."""
    try:
        write_file(directory / CARD_NAME, card())
    except Exception as error:  # of whatever a stranger's record or card holds: no run of hours shall end here
        logger.warning("no model card is written: %s", brief(error))


def _card(directory: Path, source: ModelReference | None, step: Step) -> str:
    records, before = Records.read(directory), card_text(source.directory if source else None)
    base_name = root_name(records, source.full_name if source else None)
    metadata = metadata_of(records, base_name, card_metadata(before))
    commands = own_lines(marked(before, COMMANDS))
    commands.append(one_line(step.line(input_name(source, base_name, len(commands)), f"step-{len(commands) + 1}")))
    sections = [f"# {title(records, base_name)}", "\n".join(summary(records, base_name))]
    if records.sparsity is not None:
        sections += ["## Sparsity by part", "\n".join(sparsity_table(records.sparsity))]
    sections += ["## Evaluation", f"{EVALUATION}\n\n" + "\n".join(evaluation_table([])) + f"\n\n{END}"]
    sections += ["## How to load it", "\n".join(loading(records))]
    sections += making(commands)
    sections += [f"Versions: {_versions(records)}. Absolute paths are shortened to their last part."]
    sections += ["## Limits", "\n".join(limits(records)), "## Licence", terms(base_name, metadata)]
    return page(metadata, sections)


def making(commands: Sequence[str]) -> list[str]:
    """Return the section of the commands that made a checkpoint, which later steps take over."""
    return ["## How it was made", "\n".join([COMMANDS, "```bash", *commands, "```", END])]


def page(metadata: Mapping[str, Any], sections: Sequence[str]) -> str:
    """Return front matter and sections as one card."""
    from huggingface_hub import ModelCard, ModelCardData

    content = "\n\n".join(sections)
    return str(ModelCard(f"---\n{ModelCardData(**metadata).to_yaml()}\n---\n\n{content}\n"))


def input_name(source: ModelReference | None, base_name: str | None, steps: int) -> str:
    """Return what the next command calls its input: the last step, the base, or a checkpoint of unknown making."""
    if steps:
        return f"step-{steps}"
    if source is not None and has_records(source.directory):
        return shortened(source.full_name)
    return shortened(base_name or "MODEL")


def one_line(text: str) -> str:
    """Return a command that stays within its line and its fence; a name in it may hold anything."""
    return " ".join(text.splitlines()).replace("`", "")[:LONGEST_LINE]


def own_lines(commands: str) -> list[str]:
    """Return those lines of a card's commands that can be of this program, whoever wrote the card."""
    lines = []
    for line in commands.splitlines():
        if line.startswith(("optimum-barber ", "# ")):
            lines.append(one_line(line))
    return lines[:MOST_LINES]


def _versions(records: Records) -> str:
    for record in (records.sparsity, records.structure, records.experts, records.order):
        if record is not None:
            return ", ".join(f"{name} {version}" for name, version in record.software.items())
    return "not recorded"


def marked(text: str, mark: str) -> str:
    """Return what stands between a mark and its end mark; an empty text where one is missing."""
    _, begin, rest = text.partition(mark)
    content, end, after = rest.partition(ANY_MARK)
    return content if begin and f"{end}{after}".startswith(END) else ""
