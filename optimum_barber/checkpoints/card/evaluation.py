"""Measurements that are kept beside a checkpoint and shown in its card."""

import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...base.errors import BarberError
from ...base.files import read_json, write_file, write_json
from ...base.flag_names import shortened
from ..names import CARD_NAME, EVALUATION_NAME
from .body import evaluation_table, windows_text
from .metadata import card_text
from .write import END, EVALUATION, marked

logger = logging.getLogger(__name__)
Row = Mapping[str, Any]
PLACE = ("text", "split", "sequence_length", "windows", "available", "dtype", "bos", "dense_baseline")
DATASETS = {"wikitext2": "Salesforce/wikitext", "ptb": "ptb-text-only/ptb_text_only", "c4": "allenai/c4"}


def record_evaluation(directory: Path, rows: Sequence[Row]) -> None:
    """Keep measurements of a checkpoint in `evaluation.json`, and show them in its card, if that is one of ours.

    A later measurement of the same windows replaces the earlier one. Where the directory cannot be written, nothing
    happens but a warning.

    Args:
        directory: of the checkpoint.
        rows: of `optimum-barber eval --json`: of the checkpoint, and of its dense model.
    """
    text = card_text(directory)
    if EVALUATION not in text or not rows or (directory / CARD_NAME).is_symlink():
        return
    if not os.access(directory, os.W_OK):
        logger.warning("%s cannot be written: its model card stays without these figures", directory)
        return
    merged = {_place(row): dict(row) for row in [*read_evaluation(directory), *rows]}
    write_json(directory / EVALUATION_NAME, list(merged.values()))
    write_file(directory / CARD_NAME, _with_results(text, list(merged.values())))


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
    return [row for row in rows if isinstance(row, dict) and {*PLACE, "perplexity"} - {"bos"} <= row.keys()]


def _place(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in PLACE)


def _with_results(text: str, rows: Sequence[Row]) -> str:
    """Return a card with other measurements, in its table and in its front matter; all else stays."""
    from huggingface_hub import ModelCard

    before = EVALUATION + marked(text, EVALUATION) + END
    after = f"{EVALUATION}\n\n" + "\n".join(evaluation_table(rows)) + f"\n\n{END}"
    card = ModelCard(text.replace(before, after), ignore_metadata_errors=True)
    data: Any = card.data
    data.model_name = _title(text)
    data.eval_results = [_result(row) for row in rows if not row["dense_baseline"]]
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
