"""SHA-256 of settings, files and folders."""

import hashlib
import json
from pathlib import Path
from typing import Any

from .files import is_there


def digest(content: Any) -> str:
    """Return the SHA-256 of anything that JSON can hold, keys in order."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def of_path(name: str) -> str:
    """Return the SHA-256 of a file, or of a directory's names, sizes and times; a name that is no path as it is."""
    path = Path(name)
    if not is_there(path):
        return name
    if path.is_dir():
        files = [file for file in sorted(path.iterdir()) if file.is_file()]
        return digest([(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files])
    return hashlib.sha256(path.read_bytes()).hexdigest()
