"""SHA-256 of settings, files and folders."""

import hashlib
import json
from pathlib import Path
from typing import Any

from .files import is_there


def digest(content: Any) -> str:
    """SHA-256 of anything that JSON can hold, keys in order."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def of_path(name: str) -> str:
    """The SHA-256 of a file; of a directory names, sizes and times; of anything else its name."""
    path = Path(name)
    if not is_there(path):
        return name
    if path.is_dir():
        return digest([(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(path.iterdir()) if f.is_file()])
    return hashlib.sha256(path.read_bytes()).hexdigest()
