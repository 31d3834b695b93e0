"""How large, how costly and how fast a causal LM is: parameters, bytes, MACs a token, prefill and decode latency."""

import copy
import inspect
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from ..base.devices import synchronize
from ..base.errors import BarberError
from .bounds import EXPERTS_PER_TOKEN
from .limits import positions
from .loading import empty_model


def experts_per_token(config: Any) -> int | None:
    """Return how many experts see a token by a model's configuration; None where it does not say."""
    text = config.get_text_config()
    numbers = [getattr(text, name, None) for name in EXPERTS_PER_TOKEN]
    return next((number for number in numbers if isinstance(number, int)), None)


def size_of(model: nn.Module) -> dict[str, int]:
    """Count parameters and bytes of the weights, tied ones once."""
    parameters = list(model.parameters())
    return {
        "parameters": sum(p.numel() for p in parameters),
        "weight_bytes": sum(p.numel() * p.element_size() for p in parameters),
    }


@torch.no_grad()
def macs_per_token(config: Any, tokens: int) -> float:
    """Count multiply-accumulates a token in a forward pass over a window of `tokens`, with the LM head.

    Counted by torch on the meta device, with eager attention, whose products over all (query, key) pairs it sees.
    """
    from torch.utils.flop_counter import FlopCounterMode

    model = empty_model(copy.deepcopy(config), attn_implementation="eager")
    window = torch.zeros((1, tokens), dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(input_ids=window, attention_mask=torch.ones_like(window), use_cache=False)
    return counter.get_total_flops() / 2 / tokens


@torch.no_grad()
def latency(model: Any, prompt: int, batch: int = 1, repeats: int = 5, warmup: int = 2) -> dict[str, Any]:
    """Measure the seconds of the prefill of a prompt, and of decoding one token after it.

    Args:
        model: the causal LM, on the device to measure.
        prompt: tokens of the prompt, at least 1.
        batch: sequences at once.
        repeats: measurements, for their median and their spread, largest less smallest.
        warmup: runs before them that do not count.
    """
    most = positions(model.config) or prompt + 1
    if not 1 <= prompt < most:
        raise BarberError(f"latency prompt {prompt} is not legal: 1 to {most - 1} tokens, one is decoded after it")
    device = next(model.parameters()).device
    ids = torch.randint(0, model.config.vocab_size, (batch, prompt), generator=torch.Generator().manual_seed(0))
    ids = ids.to(device)

    def prefill() -> Any:
        return model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values

    def decode(cache: Any) -> Any:
        return model(input_ids=ids[:, -1:], **{cache_argument(model): cache}, use_cache=True, logits_to_keep=1)

    prefills, decodes = [], []
    for _ in range(warmup + repeats):
        seconds, cache = timed(prefill, device)
        prefills.append(seconds)
        decodes.append(timed(partial(decode, cache), device)[0])
    return {
        "batch": batch, "prompt": prompt, "repeats": repeats, "warmup": warmup, "device": str(device),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."), "threads": torch.get_num_threads(),
        "prefill": _spread(prefills[warmup:]), "decode": _spread(decodes[warmup:]),
    }  # fmt: skip


def cache_argument(model: Any) -> str:
    """Return what a model's forward pass calls its cache, which transformers renamed in 5.24."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def timed(run: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Return the seconds that `run()` takes, the device's queue empty before and after, and its result."""
    synchronize(device)
    started = time.perf_counter()
    result = run()
    synchronize(device)
    return time.perf_counter() - started, result


def _spread(seconds: list[float]) -> dict[str, float]:
    return {"median": statistics.median(seconds), "spread": max(seconds) - min(seconds)}
