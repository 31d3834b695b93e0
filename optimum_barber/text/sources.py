"""Calibration and evaluation text: files, and names in a registry."""

import importlib.util
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from ..base.errors import BarberError, MissingExtraError
from ..base.files import is_file
from ..base.registry import Registry
from .documents import file_documents

TextSource = Callable[[str], Sequence[str]]
TEXTS: Registry[TextSource] = Registry("text", "optimum_barber.calibration")
BY_DOCUMENT = frozenset(["c4"])  # too large to be joined; the papers sample them document by document
HUB_SPLITS = {"calibration": "train", "evaluation": "test"}


@TEXTS.register("pydoc")
def pydoc_texts(split: str) -> list[str]:
    """Return the topics of CPython's own documentation in alphabetical order: 80 % calibration, 20 % evaluation."""
    from pydoc_data.topics import topics

    texts = [topics[name] for name in sorted(topics)]
    ends = list(accumulate(map(len, texts)))
    cut = bisect_left(ends, 0.8 * ends[-1]) + 1
    return texts[:cut] if split == "calibration" else texts[cut:]


def _hub(split: str, field: str, path: str, **where: Any) -> Sequence[str]:
    """Return one column of a data set on the hub, after one short request whether it is there."""
    if importlib.util.find_spec("datasets") is None:
        raise MissingExtraError(f"text {path!r} from the hub (a file or 'pydoc' does not)", "eval")
    from datasets import load_dataset
    from huggingface_hub import HfApi, constants

    try:
        if not constants.HF_HUB_OFFLINE:
            HfApi().repo_info(path, repo_type="dataset", timeout=10)
        documents: Sequence[str] = load_dataset(path, split=split, **where)[field]
        return documents
    except Exception as error:  # whatever the network stack raises
        raise BarberError(
            f"text {path!r} cannot be had from the hub ({str(error).strip().splitlines()[0]}); "
            "give a file, or 'pydoc', which is always there"
        ) from None


@TEXTS.register("c4")
def c4_texts(split: str) -> Sequence[str]:
    """Return C4 as the papers use it: the first training shard, or the first 1,100 validation documents."""
    if split == "calibration":
        return _hub("train", "text", path="allenai/c4", data_files={"train": "en/c4-train.00000-of-01024.json.gz"})
    files = {"validation": "en/c4-validation.00000-of-00008.json.gz"}
    return list(_hub("validation", "text", path="allenai/c4", data_files=files)[:1100])


@TEXTS.register("wikitext2")
def wikitext2_texts(split: str) -> Sequence[str]:
    """Return WikiText-2 raw: its training or its test split."""
    return _hub(HUB_SPLITS[split], "text", path="Salesforce/wikitext", name="wikitext-2-raw-v1")


@TEXTS.register("ptb")
def ptb_texts(split: str) -> Sequence[str]:
    """Return Penn Treebank: its training or its test split."""
    return _hub(HUB_SPLITS[split], "sentence", path="ptb-text-only/ptb_text_only")


def is_registered(source: str) -> bool:
    """True if `source` means a registered text: a file of that name goes first, a folder does not."""
    return source in TEXTS and not is_file(source)


def text_files(sources: Iterable[str]) -> list[Path]:
    """Return the sources that are files: a run that reads them must not write there."""
    return [Path(source) for source in sources if is_file(source)]


def split_by_document(sources: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split sources into those that are sampled document by document, and those that are joined."""
    sampled, joined = [], []
    for source in sources:
        if source in BY_DOCUMENT and is_registered(source):
            sampled.append(source)
        else:
            joined.append(source)
    return sampled, joined


def text_faults(sources: Iterable[str]) -> list[str]:
    """Return one line for each text that is neither a file nor registered."""
    known = ", ".join(TEXTS)
    missing = [source for source in sources if source not in TEXTS and not is_file(source)]
    return [f"text {source!r} is neither a file nor one of {known}" for source in missing]


def read_texts(source: str, split: str, field: str = "text", tokenizer: Any = None) -> Sequence[Any]:
    """Return the documents of a file, as `file_documents` does, or of a registered text, as it has them.

    Raises:
        BarberError: missing, empty, not UTF-8, or a line without the field.
    """
    if is_registered(source):
        return TEXTS[source](split)
    for fault in text_faults([source]):
        raise BarberError(fault)
    return file_documents(source, field, tokenizer)
