"""Documents as people have them: text files, JSON, chat messages, nulls."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..base.errors import BarberError
from ..models.loading import brief

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
SURROGATE = re.compile("[\ud800-\udfff]")


def decoded(path: str, kind: str = "text") -> str:
    """Read a UTF-8 file without its byte order mark; line ends of all systems become newlines.

    Raises:
        BarberError: it cannot be read, or is not UTF-8; `kind` is what the error calls it.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig", errors="surrogatepass")
    except OSError as error:
        raise BarberError(f"{kind} {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise BarberError(f"{kind} {path} is not UTF-8 (byte {error.start}): save it as UTF-8") from None
    if 3 * text.count("\0") > len(text):
        raise BarberError(f"{kind} {path} is mostly NUL characters, as UTF-16 is: save it as UTF-8")
    return text


def file_documents(path: str, field: str, tokenizer: Any = None) -> list[str]:
    """Return the documents of a text file (one) or of a .jsonl, .ndjson or .json file (many); nulls are left out.

    Args:
        path: of the file.
        field: of an object, the one that holds the document.
        tokenizer: whose chat template turns messages into text.

    Raises:
        BarberError: the file is bad or empty, or a line or item of it is.
    """
    text = decoded(path)
    documents = [clean(text)]
    if Path(path).suffix.lower() in JSON_SUFFIXES:
        documents = []
        for place, record in _records(path, text):
            document = plain_text(record, field, tokenizer, place)
            if document is not None:
                documents.append(document)
    if not any(document.strip() for document in documents):
        raise BarberError(f"text {path} is empty")
    return documents


def plain_text(item: Any, field: str, tokenizer: Any, place: str) -> str | None:
    """Return the text of a document: a string, chat messages, or an object whose `field` is one of these.

    None for null, which pandas calls NaN. A lone surrogate, which no UTF-8 holds, becomes U+FFFD.

    Raises:
        BarberError: it is something else; `place` is what the error calls it.
    """
    item = of_field(item, field)
    if item is None or (isinstance(item, float) and item != item):
        return None
    if isinstance(item, str):
        return clean(item)
    if isinstance(item, list) and item and all(map(_is_message, item)):
        return clean(_chat_text(item, tokenizer, place))
    holds = f"an object of {', '.join(map(str, item))}" if isinstance(item, Mapping) else type(item).__name__
    raise BarberError(
        f"{place} has no text field {field!r}: legal are a text, messages of {{role, content}}, or an object with one "
        f"of these under that name, not {holds}"
    )


def of_field(item: Any, field: str) -> Any:
    """Return an object's `field`, and whatever else as it is."""
    return item[field] if isinstance(item, Mapping) and field in item else item


def clean(text: str) -> str:
    """Return the text with pairs of surrogates joined, and U+FFFD for lone ones, which no tokenizer takes."""
    if not SURROGATE.search(text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _is_message(item: Any) -> bool:
    return isinstance(item, Mapping) and "role" in item and "content" in item


def _chat_text(messages: list[Any], tokenizer: Any, place: str) -> str:
    """Put chat messages into the tokenizer's template, without the BOS at its beginning, which windows decide on."""
    if not getattr(tokenizer, "chat_template", None):
        raise BarberError(f"{place} holds chat messages, and the tokenizer has no chat template for them: give texts")
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # whatever a template raises
        raise BarberError(f"{place} does not fit the tokenizer's chat template: {brief(error)}") from None
    return text.removeprefix(tokenizer.bos_token or "")


def _records(path: str, text: str) -> Iterator[tuple[str, Any]]:
    """Yield the place and value of each line, or of each item of the array that a .json file may be."""
    if Path(path).suffix.lower() == ".json" and text.lstrip().startswith("["):
        for number, record in enumerate(_parsed(text, f"text {path}"), 1):
            yield f"text {path}, item {number}", record
        return
    for number, line in enumerate(text.split("\n"), 1):
        place = f"text {path}, line {number}"
        line = line.strip().removeprefix("\ufeff")  # of a file behind another one
        if line:
            yield place, _parsed(line, place)


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text, parse_int=float)  # an int of more than 4,300 digits is refused
    except json.JSONDecodeError as error:
        raise BarberError(f"{place} is no JSON: {error.msg}") from None
    except RecursionError:
        raise BarberError(f"{place} is no legal JSON: it is nested too deeply") from None
