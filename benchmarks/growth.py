"""Measure how the time of a default run grows with tokens, layers and width.

    python -m benchmarks.growth [--repeats 3]

Prunes LLaMAs of random parameters: one, and three more with four times its windows, twice its layers and twice its
width. Each is pruned `--repeats` times, one after the other in turn. Prints a Markdown row for each: the least of the
seconds, by what that is the first one's, and the growth that is expected at most.
"""

import argparse
import sys
import time
from dataclasses import dataclass, replace

import torch

from optimum_barber import BarberConfig, BarberSparsifier
from optimum_barber.base.memory import return_freed_buffers

from .table import emit


@dataclass(frozen=True)
class Size:
    """A run: its model and calibration windows of 256 tokens; `most` is the growth that is expected at most."""

    name: str
    windows: int = 8
    layers: int = 3
    hidden: int = 512
    most: float = 1.0


FIRST = Size("8 × 256 tokens, 3 layers, width 512")
SIZES = [
    FIRST,
    replace(FIRST, name="tokens × 4", windows=32, most=4.0),
    replace(FIRST, name="layers × 2", layers=6, most=2.0),
    replace(FIRST, name="width × 2", hidden=1024, most=8.0),
]


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    return_freed_buffers()
    seconds: dict[str, list[float]] = {size.name: [] for size in SIZES}
    seconds_of(FIRST)  # warms up
    for _ in range(args.repeats):
        for size in SIZES:
            seconds[size.name].append(seconds_of(size))
    emit("| run | seconds | growth | expected at most |\n| --- | --- | --- | --- |")
    for size in SIZES:
        least = min(seconds[size.name])
        emit(f"| {size.name} | {least:.1f} | {least / min(seconds[FIRST.name]):.2f} | {size.most:g} |")
    return 0


def seconds_of(size: Size) -> float:
    """Prune a random LLaMA of the size, Wanda at 50 % with the default rebuild."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=size.hidden, intermediate_size=size.hidden * 11 // 4, num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // 64, num_key_value_heads=size.hidden // 128, vocab_size=4096,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    windows = torch.randint(0, config.vocab_size, (size.windows, 256))
    started = time.perf_counter()
    BarberSparsifier(model).sparsify(BarberConfig(sparsity=0.5), windows, quiet=True)
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
