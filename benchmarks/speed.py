"""How much of the machine's product rate a run reaches, and how well its time is predicted.

    python -m benchmarks.speed [--model MODEL] [--calibration TEXT] [--samples 16] [--sequence-length 512]

Prints, for the settings of `benchmarks.one_pass`, a Markdown table: the passes that a run needs, in floating-point
operations of one plain forward pass; its product rate within these passes and over the whole run, as a share of what
one large float32 product reaches; and the time that `--dry-run` would say, beside the measured one.
"""

import platform
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from optimum_barber.base.memory import return_freed_buffers
from optimum_barber.models.source import ModelSource
from optimum_barber.prune import pipeline
from optimum_barber.prune.cost.rates import predict
from optimum_barber.prune.cost.work import BlockShape, Tokens, Work, shapes_of, total
from optimum_barber.prune.plan import make_plan
from optimum_barber.prune.trial import Trial

from .one_pass import SETTINGS, Measured, arguments, config_of, measure, opened, plain_seconds

SIDE = 3072  # of the large product
COLUMNS = (
    "setting", "plain pass", "run", "ratio", "passes needed", "rate within them", "rate over the run", "predicted",
    "off by",
)  # fmt: skip


def product_rate(repeats: int = 7) -> float:
    """FLOP a second of one large square float32 product, the best of some."""
    left, right = torch.rand(SIDE, SIDE), torch.rand(SIDE, SIDE)
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - started)
    return 2 * SIDE**3 / min(seconds)


@torch.no_grad()
def plain_flops(model: nn.Module, windows: torch.Tensor) -> float:
    """FLOP of one plain forward pass over all windows, LM head included, by torch's counter."""
    known = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops}
    with FlopCounterMode(display=False, custom_mapping=known) as counter:
        model(windows[:1], use_cache=False)
    return float(len(windows) * counter.get_total_flops())


def attention_flops(query: tuple[int, ...], key: tuple[int, ...], *_: Any, **__: Any) -> int:
    """Of scores and their product with the values, which torch does not count on the CPU; nothing masked is spared."""
    batch, heads, length, width = query
    return 4 * batch * heads * length * key[2] * width


@dataclass
class Passes:
    """Passes over samples.

    Attributes:
        seconds: of all of them.
        alone: the shapes of the block's Linears, for each pass in which the closing one alone ran.
    """

    seconds: float = 0.0
    alone: list[frozenset[tuple[int, int]]] = field(default_factory=list)


def needed_flops(source: ModelSource, windows: torch.Tensor, name: str, found: Measured, passes: Passes) -> float:
    """FLOP of the passes and Gram matrices that the run's reports tell of."""
    config = config_of(name)
    tokens = Tokens(*windows.shape, source.model.config.hidden_size)
    shapes = shapes_of(source.stack, source.path, source.architecture, tokens.hidden)
    everything = total(
        shape.forward(tokens) * (1 + report.forward_passes)
        + shape.gradient(tokens) * report.gradient_passes
        + gathered(shape, tokens, config.rebuild.chain, report.rounds)
        for shape, report in zip(shapes, found.reports, strict=True)
    )
    spared = {frozenset(shape.linears): (shape.forward(tokens) + shape.last(tokens) * -1.0).flops for shape in shapes}
    return everything.flops - sum(spared[linears] for linears in passes.alone)


def gathered(shape: BlockShape, tokens: Tokens, chain: list[str], rounds: list[dict[str, Any]]) -> Work:
    """The Gram matrices of swaps, and of the closing Linear in as many rounds of gauss-newton as there were."""
    if "gauss-newton" not in chain:
        return shape.grams(tokens) * chain.count("swaps")
    newton = shape.closing_grams(tokens) * sum("length" in record for record in rounds)
    return newton + shape.inner_grams(tokens)


@contextmanager
def timed_passes() -> Iterator[Passes]:
    """The passes over samples inside the block."""
    found = Passes()

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if function.__name__ == "_forward_pass" and args[2] is not args[0].forward:
                found.alone.append(frozenset(tuple(linear.weight.shape) for linear in args[0].linears.values()))
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                found.seconds += time.perf_counter() - started

        return run

    with ExitStack() as stack:
        for owner, name in (
            (pipeline, "watch"),
            (Trial, "_pass"),
            (Trial, "error_on_every"),
        ):
            stack.enter_context(patch.object(owner, name, timed(getattr(owner, name))))
        yield found


def predicted(source: ModelSource, windows: torch.Tensor, name: str) -> float:
    """Seconds, without what only a run from disk to disk does."""
    config = config_of(name)
    stages = predict(source, make_plan(config, source), config, tuple(windows.shape), 0, Path())
    return sum(seconds or 0.0 for stage, seconds in stages.items() if "write" not in stage)


def row(name: str, model: nn.Module, windows: torch.Tensor, rate: float) -> list[str]:
    """One run, one row of the table."""
    source = ModelSource(model)
    plain, flops = plain_seconds(model, windows), plain_flops(model, windows)
    expected = predicted(source, windows, name)
    with timed_passes() as passes:
        found = measure(name, model, windows)
    needed = needed_flops(source, windows, name, found, passes)
    return [
        name,
        f"{plain:.1f} s ({flops / plain / rate:.0%})",
        f"{found.seconds:.1f} s",
        f"{found.seconds / plain:.2f}",
        f"{needed / flops:.2f}",
        f"{needed / passes.seconds / rate:.0%}",
        f"{needed / found.seconds / rate:.0%}",
        f"{expected:.1f} s",
        f"{expected / found.seconds - 1:+.0%}",
    ]


def machine() -> str:
    """Processor, threads, versions and commit."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, commit {commit or 'unknown'}"


def page(args: Namespace) -> str:
    """The table with what it was measured on."""
    load, windows = opened(args)
    rate = product_rate()
    rows = [row(name, load(), windows, rate) for name in ([args.only] if args.only else SETTINGS)]
    head = f"{args.model}, {args.samples} × {args.sequence_length} tokens; {machine()}; {date.today()}"
    lines = [f"| {' | '.join(cells)} |" for cells in (COLUMNS, ["---"] * len(COLUMNS), *rows)]
    return f"{head}\n\nA {SIDE}² float32 product: {rate / 1e9:.0f} GFLOP/s, of which rates are shares.\n\n" + (
        "\n".join(lines) + "\n"
    )


def main() -> int:
    """Run the benchmark."""
    parser = arguments(__doc__)
    parser.add_argument("--append", type=Path, metavar="FILE", help="write the table behind what the file holds")
    args = parser.parse_args()
    return_freed_buffers()
    found = page(args)
    sys.stdout.write(found)
    if args.append:
        with args.append.open("a", encoding="utf-8") as file:
            file.write("\n" + found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
