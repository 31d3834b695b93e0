"""Settings and fingerprints as tables."""

from collections.abc import Iterable, Mapping
from typing import Any

from ...checkpoints.record import SparsityConfig
from .page import Table, Value


def flattened(content: Any, prefix: str = "") -> dict[str, Value]:
    """Nested settings as one level; lists of plain values in one cell, a switch as yes or no."""
    if isinstance(content, Mapping):
        return _flattened_items(content.items(), prefix)
    if isinstance(content, list | tuple):
        if any(isinstance(item, Mapping | list) for item in content):
            return _flattened_items(enumerate(content, 1), prefix)
        return {prefix[:-1]: ", ".join(map(str, content)) or None}
    if isinstance(content, bool):
        content = "yes" if content else "no"
    if not isinstance(content, int | float | str):
        content = None
    return {prefix[:-1]: content}


def _flattened_items(items: Iterable[tuple[Any, Any]], prefix: str) -> dict[str, Value]:
    flat: dict[str, Value] = {}
    for key, value in items:
        flat |= flattened(value, f"{prefix}{key}.")
    return flat


def settings_table(title: str, content: Mapping[str, Any], folded: bool = False) -> Table:
    """One row for each setting."""
    rows: list[list[Value]] = []
    for name, value in flattened(content).items():
        rows.append([name, None if value is None else str(value)])
    return Table(title, ["setting", "value"], rows, folded)


def record_tables(record: SparsityConfig) -> list[Table]:
    """All of a `sparsity_config.json`; the modules come last and folded."""
    content = record.model_dump()
    rows: list[list[Value]] = []
    for name, module in content.pop("modules").items():
        shape = f"{module['shape'][0]} × {module['shape'][1]}"
        rows.append([name, shape, module["pruned"], module["sparsity"], module["sha256"]])
    return [
        settings_table("Settings", {"mask_fingerprint": record.fingerprint, **content}),
        Table("Fingerprints of the masks", ["Linear", "shape", "pruned", "sparsity", "SHA-256"], rows, folded=True),
    ]


def plain_rows(content: Mapping[str, Any]) -> list[list[Value]]:
    """The numbers and texts among `content`, one row each; switches are left out."""
    rows: list[list[Value]] = []
    for name, value in content.items():
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            rows.append([name.replace("_", " "), value])
    return rows
