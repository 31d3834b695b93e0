"""Settings and fingerprints as tables."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ...checkpoints.record import SparsityConfig
from .page import Table, Value


def flattened(content: Any, prefix: str = "") -> dict[str, Value]:
    """Nested settings as one level; lists of plain values in one cell, a switch as yes or no."""
    if isinstance(content, Mapping):
        return {k: v for key, value in content.items() for k, v in flattened(value, f"{prefix}{key}.").items()}
    if isinstance(content, list | tuple):
        if any(isinstance(item, Mapping | list) for item in content):
            return {k: v for n, item in enumerate(content, 1) for k, v in flattened(item, f"{prefix}{n}.").items()}
        return {prefix[:-1]: ", ".join(map(str, content)) or None}
    if isinstance(content, bool):
        content = "yes" if content else "no"
    return {prefix[:-1]: content if isinstance(content, int | float | str) else None}


def settings_table(title: str, content: Mapping[str, Any]) -> Table:
    """One row a setting."""
    rows: list[list[Value]] = [[k, None if v is None else str(v)] for k, v in flattened(content).items()]
    return Table(title, ["setting", "value"], rows)


def record_tables(record: SparsityConfig) -> list[Table]:
    """All of a `sparsity_config.json`, the modules aside, which come last and folded."""
    content = record.model_dump()
    modules = content.pop("modules")
    rows: Sequence[Sequence[Value]] = [
        [name, f"{m['shape'][0]} × {m['shape'][1]}", m["pruned"], m["sparsity"], m["sha256"]]
        for name, m in modules.items()
    ]
    return [
        settings_table("Settings", {"mask_fingerprint": record.fingerprint, **content}),
        Table("Fingerprints of the masks", ["Linear", "shape", "pruned", "sparsity", "SHA-256"], rows, folded=True),
    ]


def plain_rows(content: Mapping[str, Any], leave: Iterable[str] = ()) -> list[list[Value]]:
    """The plain values among `content`, a row each."""
    return [
        [name.replace("_", " "), value]
        for name, value in content.items()
        if name not in leave and isinstance(value, int | float | str) and not isinstance(value, bool)
    ]
