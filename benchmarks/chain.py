"""Run the whole chain on the demo model: Wanda 2:4, Barber, LoRA, merge, int4 by GPTQ and by round-to-nearest.

    python -m benchmarks.chain --calibration calibration.txt --evaluation wikitext2-test.raw.txt \\
        --task choice:arc-easy-test.jsonl [--output runs/chain-benchmark]

Round-to-nearest runs first, GPTQ second. The second run reuses every earlier stage of the first. Prints the report,
the zeros after each stage, and the time.
"""

import argparse
import sys
import time
from pathlib import Path

from optimum_barber.base.bars import hidden_bars
from optimum_barber.cli.terminal import hush_transformers
from optimum_barber.runs.recipe import RunResult, run_recipe

RECIPE = Path(__file__).with_name("chain.yaml")
METHODS = ("round-to-nearest", "gptq")


@hidden_bars()
def main() -> int:
    """Run both methods and print what they gave."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", default="pydoc")
    parser.add_argument("--evaluation", default="pydoc")
    parser.add_argument("--task", required=True)
    parser.add_argument("--output", default="runs/chain-benchmark")
    args = parser.parse_args()
    hush_transformers(quiet=False)
    settings = [
        f"variables.calibration={args.calibration}",
        f"variables.evaluation={args.evaluation}",
        f"variables.tasks=['{args.task}']",
        f"output={args.output}",
    ]
    for method in METHODS:
        started = time.perf_counter()
        result = run_recipe(RECIPE, [*settings, f"quantize.method={method}"])
        sys.stdout.write(f"\n{method}, {(time.perf_counter() - started) / 60:.1f} minutes\n{zeros(result)}")
        sys.stdout.write((result.output / "11-report" / "report.md").read_text(encoding="utf-8"))
        sys.stdout.flush()
    return 0


def zeros(result: RunResult) -> str:
    """Zeros kept of those pruned after each stage that made a model."""
    lines = [
        f"{name:<14} {figures['zeros']:,} of {figures['pruned']:,} zeros kept"
        for name, figures in result.stages.items()
        if "zeros" in figures
    ]
    return "\n".join(lines) + "\n\n"


if __name__ == "__main__":
    sys.exit(main())
