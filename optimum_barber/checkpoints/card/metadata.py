"""The front matter of a model card: what the Hub files a model under."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...base.files import is_there, leads_out
from ..names import CARD_NAME
from .records import Records

OWN_TAG = "optimum-barber"
CARRIED = ("language", "license", "license_name", "license_link", "pipeline_tag")  # from the card of the source
LARGEST_CARD = 2**20  # bytes
LONGEST = 200  # characters of a value that is taken over, and values of a list


def metadata_of(records: Records, base_name: str | None, source: dict[str, Any]) -> dict[str, Any]:
    """Return the front matter of a checkpoint's card.

    Args:
        records: of the checkpoint.
        base_name: of the model at the beginning of the chain.
        source: front matter of the checkpoint that it was made of.
    """
    content = carried_over(source)
    content.setdefault("pipeline_tag", "image-text-to-text" if records.image_text else "text-generation")
    base = base_model_of(base_name, source)
    if base is not None:
        content["base_model"] = base
    return {**content, "library_name": "transformers", "tags": tags_of(records)}


def carried_over(source: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the front matter of a source passes on: language, licence and pipeline tag."""
    content: dict[str, Any] = {}
    for name in CARRIED:
        value = carried(source.get(name))
        if value:
            content[name] = value
    return content


def carried(value: Any) -> str | list[str] | None:
    """Return a value of a stranger's card, if it is a short text or a list of such; else None."""
    if isinstance(value, list):
        texts = [part for part in map(carried, value[:LONGEST]) if isinstance(part, str)]
        return texts or None
    legal = isinstance(value, str) and len(value) <= LONGEST and value.isprintable()
    return value if legal else None


def base_model_of(base_name: str | None, source: dict[str, Any]) -> str | list[str] | None:
    """Return the Hub's name of the base model: the name itself, or what a card of ours stated before."""
    if is_hub_id(base_name):
        return base_name
    tags = source.get("tags")
    ours = isinstance(tags, list) and OWN_TAG in tags
    return carried(source.get("base_model")) if ours else None


def is_hub_id(name: str | None) -> bool:
    """True for a name under which a model lies on the Hub; False for a path, a package, or no name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    if name is None or Path(name).is_absolute() or is_there(name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def tags_of(records: Records) -> list[str]:
    """Return the tags by which such models are looked for."""
    tags = [OWN_TAG]
    if records.sparsity is not None:
        tags += ["pruning", "sparsity", str(records.sparsity.producer.get("name"))]
        if records.sparsity.sparsity_pattern().semi_structured:
            tags.append(records.sparsity.pattern)
        if records.sparsity.rebuild is not None:
            tags.append("llm-barber")
    if records.is_cut:
        tags += ["pruning", "structured-pruning"]
    if records.quantized:
        tags.append("compressed-tensors")
    return list(dict.fromkeys(tags))


def card_text(directory: Path | None) -> str:
    """Return a directory's card; an empty text where there is none that can be read, or a link to another file."""
    if directory is None:
        return ""
    path = directory / CARD_NAME
    try:
        if not path.is_file() or leads_out(path) or path.stat().st_size > LARGEST_CARD:
            return ""
        return path.read_text(encoding="utf-8-sig").lstrip()
    except (OSError, UnicodeDecodeError):
        return ""


def card_metadata(text: str) -> dict[str, Any]:
    """Return the front matter of a card that a stranger may have written; empty where it is none."""
    from huggingface_hub import ModelCard

    front = text.partition("---")[2].partition("\n---")[0]
    if not text.startswith("---") or re.search(r"(^|\s)[&*]\w", front):  # aliases can grow without bound
        return {}
    try:
        return dict(ModelCard(text, ignore_metadata_errors=True).data.to_dict())
    except Exception:  # whatever a stranger's YAML makes the library raise: a card decides nothing
        return {}
