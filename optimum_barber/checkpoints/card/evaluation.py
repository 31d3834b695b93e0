"""Measurements that are kept beside a checkpoint and shown in its card."""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import gettempdir
from typing import Any

from filelock import FileLock

from ...base.errors import BarberError
from ...base.files import digest, read_json, write_file, write_json
from ...base.flag_names import shortened
from ...models.loading import brief
from ..names import CARD_NAME, EVALUATION_NAME
from .body import evaluation_table, windows_text
from .metadata import card_text
from .write import END, EVALUATION, marked

logger = logging.getLogger(__name__)
Row = Mapping[str, Any]
KINDS = {  # of what every measurement holds
    "model": str, "text": str, "split": str, "dtype": str, "sequence_length": int, "windows": int, "available": int,
    "perplexity": float, "dense_baseline": bool,
}  # fmt: skip
PROTOCOL = ("text", "split", "sequence_length", "windows", "available", "dtype", "bos")
DATASETS = {"wikitext2": "Salesforce/wikitext", "ptb": "ptb-text-only/ptb_text_only", "c4": "allenai/c4"}


def record_evaluation(directory: Path, rows: Sequence[Row]) -> None:
    """Keep measurements of a checkpoint in `evaluation.json`, and show them in its card, if that is one of ours.

    A later measurement of the same model and windows replaces the earlier one. Where card or directory do not allow it,
    nothing happens but a warning.

    Args:
        directory: of the checkpoint.
        rows: of `optimum-barber eval --json`: of the checkpoint, and of its dense model.
    """
    if not rows or not marked(card_text(directory), EVALUATION) or (directory / CARD_NAME).is_symlink():
        return
    try:
        with FileLock(Path(gettempdir()) / f"optimum-barber-{digest(str(directory.resolve()))}.lock"):
            merged = {_protocol(row): dict(row) for row in [*read_evaluation(directory), *rows]}
            text = _with_results(card_text(directory), list(merged.values()))
            write_json(directory / EVALUATION_NAME, list(merged.values()))
            write_file(directory / CARD_NAME, text)
    except Exception as error:  # a card that was edited, a folder that cannot be written: the figures stand elsewhere
        logger.warning("the model card of %s stays without these figures: %s", directory, brief(error))


def read_evaluation(directory: Path) -> list[dict[str, Any]]:
    """Return the measurements that are kept beside a checkpoint; none where the file is missing or another one."""
    path = directory / EVALUATION_NAME
    if not path.is_file():
        return []
    try:
        content = read_json(path)
    except BarberError:
        return []
    rows = content if isinstance(content, list) else []
    return [row for row in rows if _is_measurement(row)]


def _is_measurement(row: Any) -> bool:
    if not isinstance(row, dict):
        return False
    return all(isinstance(row.get(name), kind) for name, kind in KINDS.items())


def _protocol(row: Row) -> tuple[Any, ...]:
    """Return what a measurement must share with another one to replace it; of this model the name does not count."""
    measured = row["model"] if row["dense_baseline"] else None
    return (measured, *(row.get(name) for name in PROTOCOL))


def _with_results(text: str, rows: Sequence[Row]) -> str:
    """Return a card with other measurements, in its table and in its front matter; all else stays."""
    from huggingface_hub import ModelCard

    before = EVALUATION + marked(text, EVALUATION) + END
    after = f"{EVALUATION}\n\n" + "\n".join(evaluation_table(rows)) + f"\n\n{END}"
    card = ModelCard(text.replace(before, after), ignore_metadata_errors=True)
    data: Any = card.data
    others = [result for result in data.eval_results or [] if result.metric_type != "perplexity"]
    data.model_name = _title(card.text)
    data.eval_results = [*others, *(_result(row) for row in rows if not row["dense_baseline"])]
    card.content = f"---\n{data.to_yaml()}\n---\n{card.text}"
    return str(card)


def _title(text: str) -> str:
    heading = next((line for line in text.splitlines() if line.startswith("# ")), "# model")
    return re.sub(r"\\(.)", r"\1", heading.removeprefix("# "))


def _result(row: Row) -> Any:
    from huggingface_hub import EvalResult

    name = shortened(row["text"])
    windows = f"{windows_text(row)}, {row['dtype']}"
    return EvalResult(
        task_type="text-generation", dataset_type=DATASETS.get(name, name), dataset_name=name,
        dataset_config=windows, dataset_split=row["split"], metric_type="perplexity",
        metric_value=round(row["perplexity"], 4),
    )  # fmt: skip
