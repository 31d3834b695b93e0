"""What an output takes over from the checkpoint that it was made of: keys of config.json, and small files as they are.

The result then loads wherever its source did, in other versions of transformers too. Code and model cards stay behind.
"""

import json
import os
import shutil
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..base.errors import BarberError
from ..base.files import digest, leads_out, read_json_object, write_json
from ..models.loading import SMALL_FILES, ModelReference, load_config, load_tokenizer
from . import names

MODEL_CONFIG_NAME = "config.json"
TEMPLATES = "additional_chat_templates"  # a folder
LEFT = (  # of the small files: what is written anew, or is of another step
    MODEL_CONFIG_NAME, "*.index.json", "adapter_*", names.SPARSITY_NAME, names.REPORT_NAME, names.STRUCTURE_NAME,
    names.EXPERTS_NAME, names.ORDER_NAME, names.CONFIG_NAME, names.ADAPTER_MASKS_NAME,
    names.EVALUATION_NAME,
)  # fmt: skip
OF_TOKENIZER = (
    "tokenizer*", "vocab*", "merges*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "*.model",
    "*.tiktoken", "*.bpe", "*.spm",
)  # fmt: skip


def source_of(reference: ModelReference | None) -> ModelReference | None:
    """The reference, if it is a directory with a configuration that can be taken over; else None."""
    there = reference and not reference.gguf_file and (reference.directory / MODEL_CONFIG_NAME).is_file()
    return reference if there else None


def files_digest(reference: ModelReference) -> str:
    """Digest names, sizes and times of a model's files, without card and page; reading 100 GB would take minutes."""
    files = [reference.path]
    if not reference.gguf_file:
        files = sorted(reference.directory.iterdir())
    stats = []
    for file in files:
        if file.is_file() and file.name not in names.DESCRIBING:
            stat = file.stat()
            stats.append((file.name, stat.st_size, stat.st_mtime_ns))
    return digest(stats)


def carry_files(source: Path, target: Path) -> None:
    """Copy the small files of a checkpoint: tokenizer, templates, settings, licence."""
    for path in _small_files(source):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)


def _small_files(source: Path) -> Iterator[Path]:
    for folder in (source, source / TEMPLATES):
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            wanted = _matches(path.name, SMALL_FILES) and not _matches(path.name, LEFT)
            foreign = leads_out(path) and path.resolve().name != path.name  # a link to some other file of the machine
            if wanted and not foreign and path.is_file() and os.access(path, os.R_OK):
                yield path


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def carry_config(source: ModelReference, config: Any, target: Path) -> None:
    """Write config.json with the keys and values of the source's; only what was changed in `config` since differs."""
    content = read_json_object(source.directory / MODEL_CONFIG_NAME)
    before, after = _as_json(load_config(source, quantized=True)), _as_json(config)
    dtype, _ = after.pop("dtype", None), before.pop("dtype", None)
    for key in ("torch_dtype", "dtype"):
        if content.get(key) is not None:
            content[key] = dtype
    if before.get("model_type") == after.get("model_type"):
        after["architectures"] = before["architectures"] = None
    _update(content, before, after)
    write_json(target / MODEL_CONFIG_NAME, dict(sorted(content.items())))


def _as_json(config: Any) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return content


def _update(content: dict[str, Any], before: dict[str, Any], after: dict[str, Any]) -> None:
    """Bring `content` to what `after` has changed, added and removed against `before`."""
    for key in before.keys() - after.keys():
        content.pop(key, None)
    for key, value in after.items():
        if key in before and value == before[key]:
            continue
        stated, earlier = content.get(key), before.get(key)
        if isinstance(stated, dict) and isinstance(earlier, dict) and isinstance(value, dict):
            _update(stated, earlier, value)
        else:
            content[key] = value


def save_tokenizer(directory: Path, tokenizer: Any, reference: ModelReference | None) -> None:
    """Write a tokenizer, unless it is the one whose files were carried over."""
    if tokenizer is None or (reference and _same_tokenizer(tokenizer, reference)):
        return
    for path in directory.iterdir():
        if _matches(path.name, OF_TOKENIZER):
            path.unlink()
    tokenizer.save_pretrained(directory)


def _same_tokenizer(tokenizer: Any, reference: ModelReference) -> bool:
    try:
        return source_of(reference) is not None and _parts(tokenizer) == _parts(load_tokenizer(reference))
    except (BarberError, AttributeError):  # there is none, or an object of another kind was given
        return False


def _parts(tokenizer: Any) -> list[Any]:
    """What decides how a tokenizer works, without what its use leaves in it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    for state in ("truncation", "padding"):
        vocabulary.pop(state, None)
    return [vocabulary, tokenizer.special_tokens_map, tokenizer.chat_template, tokenizer.model_max_length]
