"""Documents drawn from a causal LM token by token."""

import json
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...base.devices import random_state
from ...base.errors import BarberError
from ...base.files import write_file
from ...base.output import check_file
from ...models.device import choose_device, working_dtype
from ...models.limits import positions, vocabulary
from ...models.loading import load_model, load_tokenizer, resolve_model
from ..documents import clean
from ..tokens import check_tokens
from ..windows import DEFAULT_LENGTH
from .settings import OwnTextConfig

LENGTH = 512


def own_documents(model: Any, tokenizer: Any, config: OwnTextConfig, quiet: bool = False) -> list[str]:
    """Have a model write documents, `config.tokens` tokens at least in all; the same for a seed on one machine.

    Args:
        model: a transformers causal LM, on the device that it works on.
        tokenizer: of the model.
        config: everything else that decides the text; its `dtype` and `device` are not used.
        quiet: no progress bar.

    Raises:
        BarberError: nothing to start from, a length beyond the model's positions, NaN or Inf in its output, or no text.
    """
    start, ends = start_tokens(tokenizer, config.start), end_tokens(model, tokenizer, config.start)
    check_tokens(start, vocabulary(model), "start", tokenizer)
    length = row_length(start, model.config, config.length)
    documents, written = list[str](), 0
    with (
        random_state(config.seed, model.device),
        tqdm(total=config.tokens, unit="token", desc="own text", disable=quiet or None) as bar,
    ):
        while written < config.tokens:
            count = min(config.batch, ceil((config.tokens - written) / length))
            rows = generate_rows(model, start, count, length, config)
            before = len(documents)
            for row in rows:
                documents += texts_of(row.tolist(), ends, tokenizer)
            if len(documents) == before:
                raise BarberError(f"start {tokenizer.decode(start)!r} is not legal: the model writes nothing behind it")
            written += rows.numel()
            bar.update(rows.numel())
    return documents


def start_tokens(tokenizer: Any, start: str | None) -> Tensor:
    """Return the tokens that the text follows, (tokens,) int64; none are a `BarberError`."""
    if start is not None:
        ids = tokenizer(clean(start), add_special_tokens=False)["input_ids"]
    else:
        special = (tokenizer.bos_token_id, tokenizer.eos_token_id)
        ids = [token for token in special if token is not None][:1]
    if not ids:
        raise BarberError(f"start {start!r} is not legal: it must hold a token, and the tokenizer has no bos or eos")
    return torch.tensor(ids)


def row_length(start: Tensor, model_config: Any, length: int | None) -> int:
    """Return how many tokens are written without a break: `length`, or 512, or what the model has positions for."""
    room = (positions(model_config) or DEFAULT_LENGTH) - len(start)
    if (length or 1) > room:
        raise BarberError(f"length {length} is not legal: the model's positions leave {room} behind the start")
    return length or min(LENGTH, room)


def end_tokens(model: Any, tokenizer: Any, start: str | None) -> set[int]:
    """Return the special tokens that end a document: the model's, the tokenizer's, and `start` if it is one itself."""
    eos = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])}
    if start is not None and start in tokenizer.all_special_tokens:
        ends.add(tokenizer.convert_tokens_to_ids(start))
    return ends - {None}


def generate_rows(model: Any, start: Tensor, count: int, length: int, config: OwnTextConfig) -> Tensor:
    """Sample what follows `start`, `count` times, (count, length) int64; a document's end does not end a row."""
    from transformers import GenerationConfig

    prompt = start.repeat(count, 1).to(model.device)
    settings = GenerationConfig(
        do_sample=True, temperature=config.temperature, top_p=config.top_p, top_k=0, max_new_tokens=length
    )
    own, model.generation_config = model.generation_config, settings  # an end that `settings` lacks must not be used
    try:
        with torch.no_grad():
            if not model(input_ids=prompt[:1]).logits.isfinite().all():
                raise BarberError("model gives NaN or Inf: its weights hold some")
            rows: Tensor = model.generate(prompt, attention_mask=torch.ones_like(prompt))
    finally:
        model.generation_config = own
    return rows[:, len(start) :].cpu()


def texts_of(row: list[int], ends: set[int], tokenizer: Any) -> list[str]:
    """Decode the documents in a run of tokens, cut behind tokens that end one, without special tokens."""
    cuts = [0, *(place + 1 for place, token in enumerate(row) if token in ends), len(row)]
    texts = [tokenizer.decode(row[first:last], skip_special_tokens=True).strip() for first, last in pairwise(cuts)]
    return [text for text in texts if text]


def write_own_text(name: str, output: str | Path, config: OwnTextConfig, overwrite: bool, quiet: bool) -> list[str]:
    """Load a model and write its text to a .jsonl file, `{"text": ...}` a line.

    Raises:
        BarberError: bad input; nothing was written.
    """
    if Path(output).suffix.lower() != ".jsonl":
        raise BarberError(f"output {output} is not legal: a .jsonl file, as --calibration reads it")
    path = check_file(output, overwrite)
    device, reference = choose_device(config.device), resolve_model(name)
    model: Any = load_model(reference, working_dtype(config.dtype, device)).to(device).eval()
    documents = own_documents(model, load_tokenizer(reference), config, quiet)
    write_file(path, "".join(json.dumps({"text": text}) + "\n" for text in documents))
    return documents
