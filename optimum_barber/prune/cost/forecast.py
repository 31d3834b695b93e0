"""How long a run takes, within a factor of 1.5: the work of its methods over one measured rate.

The unit of work is a plain forward pass of the decoder layers over all calibration tokens, whose floating-point
operations (FLOP) torch counts on a model without weights. Files are left out. `COSTS` was fitted to runs on CPUs.
"""

import time
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from ...base.devices import synchronize
from ...models.device import matrix_products
from ...models.linears import matrices_of_model
from ...models.loading import auto_class
from ...models.source import ModelSource
from ...tensors.patterns import SparsityPattern
from ..plan import precision_for
from ..settings import BarberConfig

SWEEP = 100  # FLOP in the time of one operation on a weight, which memory bounds
TIMED = 2**34  # FLOP of the decoder layer that is timed on a CPU, about
SHORTEST = 64  # tokens of the window that is timed, at least
REPEATS = 4  # the first is slower


@dataclass(frozen=True)
class Cost:
    """What a method takes, once and for each of its rounds."""

    passes: float = 0.0  # over all tokens, forward; a gradient pass is about 2.3, the Gram matrices of a block 0.7
    sweeps: float = 0.0  # operations on every weight
    rounds: str = ""  # the setting that holds the number of rounds
    round_passes: float = 0.0
    round_sweeps: float = 0.0
    window_sweeps: float = 0.0  # for each round and calibration window


EVERY_RUN = Cost(2.6, 40)  # dense outputs, outputs under the masks; masks are packed and checked
COSTS = {
    **dict.fromkeys(("magnitude", "wanda", "random"), Cost(sweeps=20)),
    "sparsegpt": Cost(0.5, 400),
    **dict.fromkeys(("existing", "masks", "uniform"), Cost()),
    "owl": Cost(1.5),
    "measured": Cost(1.0, 120),
    "barber": Cost(0, 0, "rounds", 2.9, 130, window_sweeps=2.4),
    "swaps": Cost(3.0, 60, "swaps", round_sweeps=3),
    "gauss-newton": Cost(0.8, 80, "newton_rounds", 4.2, 230, window_sweeps=2.4),
    "besa": Cost(4.7, 60, window_sweeps=8),
    "dsnot": Cost(1.2, 20),
    "least-squares": Cost(5.0, 20, "iterations", round_sweeps=25),
    "gradient": Cost(2.0, 20, "passes", 2.3, window_sweeps=15),
}


def work_of(config: BarberConfig, pattern: SparsityPattern, samples: int) -> tuple[float, float, list[str]]:
    """Passes and sweeps of a run under `pattern`, and its methods that are not in `COSTS`, whose work is missing."""
    rebuild, reconstruct = config.rebuild.under(pattern), config.reconstruct
    settings = {**rebuild.model_dump(), **reconstruct.model_dump(), "": 0}
    passes, sweeps, unknown = EVERY_RUN.passes, EVERY_RUN.sweeps, []
    for method in (config.producer_name, config.allocation, *rebuild.chain, *reconstruct.chain):
        if method not in COSTS:
            unknown.append(method)
            continue
        cost = COSTS[method]
        rounds = settings[cost.rounds]
        passes += cost.passes + rounds * cost.round_passes
        sweeps += cost.sweeps + rounds * (cost.round_sweeps + samples * cost.window_sweeps)
    return passes, sweeps, unknown


def forecast(source: ModelSource, config: BarberConfig, pattern: SparsityPattern, samples: int, length: int) -> str:
    """Say how long a run over so many windows takes on this machine, which is measured for about a second.

    The layers of `source` may be without weights; `pattern` counts, not that of `config`.
    """
    passes, sweeps, unknown = work_of(config, pattern, samples)
    weights = sum(linear.weight.numel() for linear in matrices_of_model(source).values())
    flops = passes * samples * forward_flops(source, length) + SWEEP * sweeps * weights
    with matrix_products(precision_for(config, source)):
        rate = layer_rate(_timed_weights(source), length, source.device)
    line = f"time          {spelled(flops / rate)}, with nothing beside it"
    if unknown:
        line += f"; not included, as unknown: {', '.join(unknown)}"
    return line


def _timed_weights(source: ModelSource) -> list[Tensor]:
    """Return the weights of the first layer's Linears, of experts those of one; they may be without values."""
    weights: list[Tensor] = []
    for matrices in source.structure(0).matrices.values():
        weights += [linear.weight for linear in matrices.linears.values() if not getattr(linear, "expert", None)]
    return weights


@torch.no_grad()
def forward_flops(source: ModelSource, length: int) -> int:
    """FLOP of one forward pass of the decoder layers over a window of `length` tokens.

    Where the model cannot run without weights, they are those of the Linears alone.
    """
    with torch.device("meta"):
        model = auto_class(source.model.config).from_config(source.model.config, trust_remote_code=False)
        tokens, mask = torch.zeros(1, length, dtype=torch.long), torch.zeros(1, 1, length, length)
    decoder = getattr(model, model.base_model_prefix, model)
    for attention_mask in (mask, None):  # most models look into a mask that they make themselves
        linears = ModelSource(model).computing_by_linears()
        with suppress(Exception), linears, FlopCounterMode(display=False) as counter:
            decoder(input_ids=tokens, attention_mask=attention_mask, use_cache=False)
            return int(counter.get_total_flops())
    return sum(2 * length * linear.weight.numel() for linear in matrices_of_model(source).values())


@torch.no_grad()
def layer_rate(weights: list[Tensor], length: int, device: torch.device) -> float:
    """FLOP a second of what a decoder layer with Linears of these shapes computes for a window, best of `REPEATS`."""
    count, hidden = sum(weight.numel() for weight in weights), weights[0].shape[1]
    if device.type == "cpu":
        length = min(length, max(TIMED // (2 * count), SHORTEST))
    weights = [torch.ones(weight.shape, device=device) for weight in weights]
    stream, seconds = torch.ones(1, 1, length, hidden, device=device), []
    for _ in range(REPEATS):
        started = time.perf_counter()
        for weight in weights:
            functional.silu(functional.linear(stream.new_ones(1, length, weight.shape[1]), weight))
        for _ in range(2):
            functional.rms_norm(stream, (hidden,)).add_(stream)
        functional.scaled_dot_product_attention(stream, stream, stream, is_causal=True)
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return (2 * length * count + 4 * length**2 * hidden) / min(seconds)


def spelled(seconds: float) -> str:
    """Write a time in hours, minutes or seconds; a few seconds are not told apart."""
    for unit, size in (("hours", 3600), ("minutes", 60), ("seconds", 1)):
        if seconds >= 5 * size:
            return f"about {seconds / size:.0f} {unit}, within a factor of 1.5"
    return "a few seconds"
