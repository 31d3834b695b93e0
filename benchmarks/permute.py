"""Measure what an order of channels gives N:M masks: perplexity over several seeds, with and without a rebuild.

    python -m benchmarks.permute --calibration TEXT --evaluation TEXT [TEXT ...] [--model MODEL] [--pattern 2:4]
        [--rebuilds none default] [--seeds 3] [--samples 16] [--sequence-length 512] [--windows 40]

A seed chooses the calibration windows, by which the model is permuted and pruned with Wanda. Prints a Markdown row for
each rebuild and order: the model's own, or by `permute` with the kinds of channels that are named. Each has, by text,
the mean perplexity over the seeds and the standard deviation among them, and the mean seconds of the permutation and of
the pruning.
"""

import statistics
import sys
import time
from argparse import Namespace
from typing import Any

from optimum_barber import BarberConfig, BarberPermuter, BarberSparsifier, PermuteConfig
from optimum_barber.base.memory import return_freed_buffers
from optimum_barber.models.loading import load_model, load_tokenizer, resolve_model
from optimum_barber.text.perplexity import perplexity
from optimum_barber.text.tokens import Encoder
from optimum_barber.text.windows import TokenWindows, calibration_windows

from .one_pass import arguments
from .table import REBUILDS, emit, evaluation_windows

ORDERS: list[list[str]] = [[], ["channels", "values"], ["channels", "values", "stream"]]


def main() -> int:
    """Run the benchmark."""
    parser = arguments(__doc__)
    parser.add_argument("--evaluation", nargs="+", default=["pydoc"])
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--rebuilds", nargs="+", default=["none", "default"], choices=REBUILDS)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    return_freed_buffers()
    tokenizer = load_tokenizer(resolve_model(args.model))
    texts = [evaluation_windows(name, args, tokenizer) for name in args.evaluation]
    figures: dict[tuple[str, str], list[list[float]]] = {}
    for seed in range(args.seeds):
        for kinds in ORDERS:
            for rebuild, row in figures_of(kinds, seed, texts, tokenizer, args).items():
                figures.setdefault((rebuild, " ".join(kinds) or "the model's own"), []).append(row)
    names = [name.rpartition("/")[2] for name in args.evaluation]
    columns = ["rebuild", "order", *names, "permute, s", "prune, s"]
    emit(f"| {' | '.join(columns)} |\n" + "| --- " * len(columns) + "|")
    for (rebuild, order), rows in sorted(figures.items()):
        cells = [spread(list(column)) for column in zip(*rows, strict=True)]
        emit(f"| {rebuild} | {order} | {' | '.join(cells)} |")
    return 0


def figures_of(
    kinds: list[str], seed: int, texts: list[TokenWindows], tokenizer: Any, args: Namespace
) -> dict[str, list[float]]:
    """Permute once, prune by every rebuild: perplexity of each text, seconds to permute, seconds to prune."""
    shape = {"samples": args.samples, "length": args.sequence_length}
    windows = calibration_windows([args.calibration], Encoder(tokenizer), seed=seed, **shape)
    model = load_model(resolve_model(args.model), "float32")
    started = time.perf_counter()
    if kinds:
        BarberPermuter(model).permute(PermuteConfig(pattern=args.pattern, kinds=kinds), windows.tokens, quiet=True)
    permuted = time.perf_counter() - started
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows = {}
    for rebuild in args.rebuilds:
        model.load_state_dict(weights)
        config = BarberConfig(producer="wanda", pattern=args.pattern, rebuild=REBUILDS[rebuild])
        started = time.perf_counter()
        BarberSparsifier(model).sparsify(config, windows.tokens, quiet=True)
        seconds = time.perf_counter() - started
        measured = [perplexity(model, text, quiet=True).perplexity for text in texts]
        rows[rebuild] = [*measured, permuted, seconds]
        emit(f"seed {seed}, {' '.join(kinds) or 'own order'}, {rebuild}: {measured}")
    return rows


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.2f} ± {deviation:.2f}"


if __name__ == "__main__":
    sys.exit(main())
