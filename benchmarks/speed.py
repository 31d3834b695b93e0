"""Measure a run's share of the machine's product rate, and compare its time with the forecast.

    python -m benchmarks.speed [--model MODEL] [--calibration TEXT] [--samples 16] [--sequence-length 512]

Prints a Markdown table for the settings of `benchmarks.one_pass`: the passes of a run, in floating-point operations of
one plain forward pass; its product rate, as a share of the rate of one large float32 product; and the forecast of
`--dry-run` beside the measured time.
"""

import platform
import subprocess
import sys
import time
from argparse import Namespace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from optimum_barber.base.memory import return_freed_buffers
from optimum_barber.models.source import ModelSource
from optimum_barber.prune.cost.forecast import forecast

from .one_pass import SETTINGS, arguments, config_of, measure, opened, plain_seconds

SIDE = 3072  # of the large product
COLUMNS = (
    "setting", "plain pass", "run", "ratio", "passes by torch's count", "rate", "forecast",
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
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        model(windows[:1], use_cache=False)
    return float(len(windows) * counter.get_total_flops())


def attention_flops(query: tuple[int, ...], key: tuple[int, ...], *_: Any, **__: Any) -> int:
    """Of scores and their product with the values, which torch does not count on the CPU; nothing masked is spared."""
    batch, heads, length, width = query
    return 4 * batch * heads * length * key[2] * width


COUNTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops}


def row(name: str, model: nn.Module, windows: torch.Tensor, rate: float) -> list[str]:
    """One run, one row of the table."""
    config, (samples, length) = config_of(name), windows.shape
    expected = forecast(ModelSource(model), config, config.sparsity_pattern(), samples, length)
    plain, flops = plain_seconds(model, windows), plain_flops(model, windows)
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        run = measure(name, model, windows)
    counted = counter.get_total_flops()
    return [
        name,
        f"{plain:.1f} s ({flops / plain / rate:.0%})",
        f"{run.seconds:.1f} s",
        f"{run.seconds / plain:.2f}",
        f"{counted / flops:.2f}",
        f"{counted / run.seconds / rate:.0%}",
        expected.removeprefix("time").strip(),
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
    result = page(args)
    sys.stdout.write(result)
    if args.append:
        with args.append.open("a", encoding="utf-8") as file:
            file.write("\n" + result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
