"""Compare scorers of experts: perplexity of a mixture of experts that lost some of them.

    python -m benchmarks.experts --model MODEL --calibration TEXT --evaluation TEXT [--remove 0.25]

Prints a Markdown table with a row a scorer, and the dense model's perplexity above it.
"""

import argparse
import sys
import time

from optimum_barber import BarberShrinker, ShrinkConfig, perplexity
from optimum_barber.models.loading import load_model, load_tokenizer, resolve_model
from optimum_barber.shrink.experts import EXPERT_SCORERS

from .table import emit, windows_of


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--remove", type=float, nargs="+", default=[0.25])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--windows", type=int, default=40)
    args = parser.parse_args()
    reference = resolve_model(args.model)
    tokenizer, model = load_tokenizer(reference), load_model(reference, "float32")
    evaluation, calibration = windows_of(args, tokenizer)
    emit(f"dense {perplexity(model, evaluation, quiet=True).perplexity:.2f}")
    emit("| removed | scorer | experts | perplexity | seconds |\n| --- | --- | --- | --- | --- |")
    for share in args.remove:
        for scorer in EXPERT_SCORERS:
            started = time.perf_counter()
            config = ShrinkConfig(scorer=scorer, remove_experts=share)
            result = BarberShrinker(model, tokenizer).shrink(config, calibration, quiet=True)
            seconds = time.perf_counter() - started
            experts = result.report["experts"]
            value = perplexity(result.model, evaluation, quiet=True).perplexity
            kept = f"{experts['after']} of {experts['before']}"
            emit(f"| {share:g} | {scorer} | {kept} | {value:.2f} | {seconds:.1f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
