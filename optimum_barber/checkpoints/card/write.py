"""Writing the model card of a checkpoint, out of its records and of the card of its source."""

import json
import logging
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...base.files import write_file
from ...base.flag_names import flags_of, shortened
from ...models.loading import ModelReference, brief
from ..names import CARD_NAME
from .body import evaluation_table, limits, loading, sparsity_table, summary, terms, title
from .metadata import card_metadata, card_text, metadata_of
from .records import Records

logger = logging.getLogger(__name__)
COMMANDS = "<!-- optimum-barber: commands -->"
EVALUATION = "<!-- optimum-barber: evaluation -->"
END = "<!-- optimum-barber: end -->"


@dataclass(frozen=True)
class Made:
    """The step that made a checkpoint.

    Attributes:
        step: its name: a command, or a stage of a recipe.
        settings: those of a command, written as flags; or those of a stage that has no command.
        base: name of the dense model, where the command was given one beside its input.
    """

    step: str
    settings: Any
    base: str | None = None

    def line(self, source: str, output: str) -> str:
        """Return the command that makes `output` of `source`; for a stage of a recipe a comment."""
        if isinstance(self.settings, Mapping):
            return f"# {source} -> {output}, recipe stage: {json.dumps({self.step: self.settings})}"
        base = ["--base", shortened(self.base)] if self.base else []
        return shlex.join(["optimum-barber", self.step, source, *base, *flags_of(self.settings), "-o", output])


def write_card(directory: Path, source: ModelReference | Path | None, made: Made) -> None:
    """Write the model card of a checkpoint whose files are all in place.

    Args:
        directory: holds the checkpoint.
        source: the checkpoint that it was made of, or its directory: its card gives licence, language and the commands
            before this one. None for a model in memory.
        made: the step.
    """
    try:
        text = _card(directory, source.directory if isinstance(source, ModelReference) else source, made)
    except Exception as error:  # of whatever a stranger's record or card holds: no run of hours shall end here
        logger.warning("no model card is written: %s", brief(error))
        return
    write_file(directory / CARD_NAME, text)


def _card(directory: Path, source: Path | None, made: Made) -> str:
    from huggingface_hub import ModelCard, ModelCardData

    records, before = Records.read(directory), card_text(source)
    metadata = metadata_of(records, card_metadata(before))
    data = ModelCardData(**metadata)
    commands = marked(before, COMMANDS)
    earlier = [line for line in commands.splitlines() if line.strip() and not line.startswith("```")]
    name = shortened(records.base_name or "MODEL") if not earlier else f"step-{len(earlier)}"
    line = made.line(name, f"step-{len(earlier) + 1}")
    one_line = " ".join(line.splitlines()).replace("`", "")  # a name may hold anything
    content = _body(records, [*earlier, one_line], metadata.get("license"))
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{content}"))


def _body(records: Records, commands: list[str], licence: Any) -> str:
    sections = [f"# {title(records)}", "\n".join(summary(records))]
    if records.sparsity is not None:
        sections += ["## Sparsity by part", "\n".join(sparsity_table(records.sparsity))]
    sections += ["## Evaluation", f"{EVALUATION}\n\n" + "\n".join(evaluation_table([])) + f"\n\n{END}"]
    sections += ["## How to load it", "\n".join(loading(records))]
    sections += ["## How it was made", "\n".join([COMMANDS, "```bash", *commands, "```", END])]
    sections += [f"Versions: {_versions(records)}. Absolute paths are shortened to their last part."]
    sections += ["## Limits", "\n".join(limits(records))]
    sections += ["## Licence", terms(records, licence)]
    return "\n\n".join(sections) + "\n"


def _versions(records: Records) -> str:
    for record in (records.sparsity, records.structure, records.experts, records.order):
        if record is not None:
            return ", ".join(f"{name} {version}" for name, version in record.software.items())
    return "not recorded"


def marked(text: str, mark: str) -> str:
    """Return what stands between a mark and the end mark after it; an empty text where they are missing."""
    _, begin, rest = text.partition(mark)
    content, end, _ = rest.partition(END)
    return content if begin and end else ""
