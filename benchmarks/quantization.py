"""Quantize a pruned model in several ways, on the same calibration windows, and evaluate each: one table.

    python -m benchmarks.quantization --model OUT --calibration calibration.txt --evaluation wikitext2-test.raw.txt
        [--rows gptq aptq 'aptq average_bits=3.5' 'gptq bits=2'] [--group-size 64] [--samples 16]
        [--sequence-length 512] [--windows 40] [--seed 0]

A row names a method, and further settings as KEY=VALUE. Perplexity is of the checkpoint as it is read back.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from optimum_barber import perplexity
from optimum_barber.checkpoints.verify import verify_checkpoint
from optimum_barber.integrations.quantization.quantize import quantize_model
from optimum_barber.integrations.quantization.settings import QuantizeSettings
from optimum_barber.models.loading import load_model, load_tokenizer, resolve_model

from .table import add_windows, emit, evaluation_windows, windows_to_calibrate

ROWS = ["gptq", "aptq", "aptq average_bits=3.5", "aptq average_bits=5", "gptq bits=8"]
COLUMNS = ("method", "bits in the mean", "perplexity", "zeros lost", "seconds")


def main() -> int:
    """Run the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a pruned checkpoint")
    parser.add_argument("--evaluation", nargs="+", required=True, help="one text or several")
    parser.add_argument("--rows", nargs="+", default=ROWS)
    parser.add_argument("--group-size", type=int, default=64)
    add_windows(parser)
    args = parser.parse_args()

    tokenizer = load_tokenizer(resolve_model(args.model))
    calibration = windows_to_calibrate(args, tokenizer)
    evaluations = [evaluation_windows(text, args, tokenizer) for text in args.evaluation]

    def measured(model: str | Path) -> str:
        opened = load_model(resolve_model(str(model)), quantized=True)
        return " / ".join(f"{perplexity(opened, windows, quiet=True).perplexity:.2f}" for windows in evaluations)

    emit(f"| {' | '.join(COLUMNS)} |\n" + "| --- " * len(COLUMNS) + "|")
    emit(f"| not quantized | | {measured(args.model)} | | |")
    with TemporaryDirectory() as folder:
        for index, row in enumerate(args.rows):
            method, *further = row.split()
            settings = {}
            for word in further:
                key, value = word.split("=")
                settings[key] = json.loads(value)
            output, started = Path(folder) / f"{index}", time.perf_counter()
            chosen = QuantizeSettings.model_validate({"method": method, "group_size": args.group_size, **settings})
            figures = quantize_model(args.model, output, chosen, calibration, quiet=True)
            seconds = time.perf_counter() - started
            outcome = verify_checkpoint(output)
            lost = outcome.pruned - outcome.zeros
            emit(f"| {row} | {figures['bits']:.3f} | {measured(output)} | {lost:,} | {seconds:.0f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
