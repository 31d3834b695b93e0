"""The front matter of a model card: what the Hub files a model under."""

from pathlib import Path
from typing import Any

from ...base.files import leads_out
from ..names import CARD_NAME
from .records import Records

OWN_TAG = "optimum-barber"
CARRIED = ("language", "license", "license_name", "license_link", "pipeline_tag")  # from the card of the source
LARGEST_CARD = 2**20  # bytes


def metadata_of(records: Records, source: dict[str, Any]) -> dict[str, Any]:
    """Return the front matter of a checkpoint's card; `source` is that of the checkpoint that it was made of."""
    content = {name: source[name] for name in CARRIED if source.get(name)}
    content.setdefault("pipeline_tag", "image-text-to-text" if records.image_text else "text-generation")
    base = base_model_of(records, source)
    if base is not None:
        content["base_model"] = base
    return {**content, "library_name": "transformers", "tags": tags_of(records)}


def base_model_of(records: Records, source: dict[str, Any]) -> str | list[str] | None:
    """Return the Hub's name of the base model: as recorded, or as a card of ours stated it before."""
    if is_hub_id(records.base_name):
        return records.base_name
    stated: str | list[str] | None = source.get("base_model")
    return stated if OWN_TAG in (source.get("tags") or []) else None


def is_hub_id(name: str | None) -> bool:
    """True for a name under which a model lies on the Hub; False for a path, a package, or no name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    if name is None or Path(name).is_absolute():
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
        tags += ["pruning", "sparsity", records.sparsity.producer["name"]]
        if records.sparsity.sparsity_pattern().semi_structured:
            tags.append(records.sparsity.pattern)
        if records.sparsity.rebuild is not None:
            tags.append("llm-barber")
    if records.structure is not None or records.experts is not None:
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
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def card_metadata(text: str) -> dict[str, Any]:
    """Return the front matter of a card that a stranger may have written; empty where it is none."""
    from huggingface_hub import ModelCard

    if not text.startswith("---"):
        return {}
    try:
        return dict(ModelCard(text, ignore_metadata_errors=True).data.to_dict())
    except Exception:  # whatever a stranger's YAML makes the library raise: a card decides nothing
        return {}
