"""Prune a model of LLaMA-7B's shape on a GPU, and time 2:4 products: seconds, memory, product rate.

    python -m benchmarks.device [--layers 32] [--hidden-size 4096] [--feed-forward 11008] [--samples 128]
        [--sequence-length 2048] [--producers magnitude wanda sparsegpt] [--rebuild barber] [--work DIR]

Writes random bf16 weights to the disk and prunes them from there with each producer and the rebuild. Prints the
seconds, the peak of the device's allocator, and the product rate: the floating-point operations of the forecast's
passes over the seconds.

On CUDA it then compares torch's semi-structured tensors with dense ones: each shape of Linear by the number of tokens,
and prefill and decoding of a whole model. In that model the Linears are semi-structured whose products are faster at
the prefill's number of tokens.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from optimum_barber import BarberConfig, BarberSparsifier
from optimum_barber.base.memory import peak_memory, reset_peak_memory
from optimum_barber.models.architectures import architecture_of, decoder_stack
from optimum_barber.models.loading import empty_model, resolve_model
from optimum_barber.models.measure import latency, timed
from optimum_barber.models.source import ModelSource
from optimum_barber.prune.cost.forecast import forward_flops, work_of
from optimum_barber.tensors.masks import keep_highest
from optimum_barber.tensors.patterns import SparsityPattern

from .streaming import VOCABULARY, write_model
from .table import emit

TOKENS = (1, 16, 64, 256, 1024, 4096)  # at once, of a product


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden-size", type=int, default=4096)
    parser.add_argument("--feed-forward", type=int, default=11008)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--producers", nargs="+", default=["magnitude", "wanda", "sparsegpt"])
    parser.add_argument("--rebuild", default="barber")
    parser.add_argument("--work", type=Path, help="where models are written (default: a temporary directory)")
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    emit(f"{torch.cuda.get_device_name() if cuda else 'CPU'}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        model = Path(folder) / "model"
        shape = {"intermediate": args.feed_forward, "heads": args.heads, "kv_heads": args.heads}
        config = write_model(model, args.layers, args.hidden_size, **shape)
        emit("| producer + rebuild | minutes | peak device memory | TFLOP/s |\n| --- | --- | --- | --- |")
        for producer in args.producers:
            emit(pruned(args, config, model, Path(folder) / producer, producer))
        if cuda:
            products(sorted({(m.out_features, m.in_features) for m in inner_linears(empty_model(config))}))
            whole(config, args.sequence_length)
    return 0


def pruned(args: argparse.Namespace, config: object, model: Path, output: Path, producer: str) -> str:
    """One run from disk to disk; its line."""
    windows = torch.randint(
        0, VOCABULARY, (args.samples, args.sequence_length), generator=torch.Generator().manual_seed(0)
    )
    settings = BarberConfig(producer=producer, sparsity=0.5, rebuild=args.rebuild)
    reset_peak_memory()
    started = time.perf_counter()
    sparsifier = BarberSparsifier(None, None, resolve_model(str(model)), stream="always")
    sparsifier.sparsify(settings, windows, save_dir=output, quiet=True)
    seconds, memory = time.perf_counter() - started, f"{peak_memory() / 2**30:.1f} GiB"
    passes = work_of(settings, settings.sparsity_pattern(), args.samples)[0]
    flops = passes * args.samples * forward_flops(ModelSource(empty_model(config)), args.sequence_length)
    return f"| {producer} + {args.rebuild} | {seconds / 60:.1f} | {memory} | {flops / seconds / 1e12:.2f} |"


def products(shapes: list[tuple[int, int]]) -> None:
    """Dense over semi-structured seconds of each shape of Linear, by tokens at once."""
    emit(f"\n| out × in, by tokens | {' | '.join(map(str, TOKENS))} |\n" + "| --- " * (len(TOKENS) + 1) + "|")
    for out, width in shapes:
        gains = [gain(out, width, tokens) for tokens in TOKENS]
        emit(f"| {out} × {width} | {' | '.join(f'{g:.2f}×' for g in gains)} |")


def gain(out: int, width: int, tokens: int) -> float:
    """Seconds of the dense product over those of the semi-structured one."""
    weight = semi_structured_zeros(torch.randn(out, width, dtype=torch.float16, device="cuda"))
    x = torch.randn(tokens, width, dtype=torch.float16, device="cuda")
    sparse = torch.sparse.to_sparse_semi_structured(weight)
    return median_of(lambda: functional.linear(x, weight)) / median_of(lambda: functional.linear(x, sparse))


def median_of(run: Callable[[], Tensor], repeats: int = 20) -> float:
    """Seconds of one run, after three that do not count."""
    seconds = [timed(run, torch.device("cuda"))[0] for _ in range(repeats + 3)]
    return statistics.median(seconds[3:])


def semi_structured_zeros(weight: Tensor) -> Tensor:
    """The weight with the smaller two of every four set to zero."""
    return weight * keep_highest(weight.abs(), SparsityPattern.parse("2:4", None))


@torch.no_grad()
def whole(config: object, prompt: int) -> None:
    """Prefill and decoding of a model with 2:4 zeros, dense and with the Linears semi-structured that gain."""
    from transformers import AutoModelForCausalLM

    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float16).eval()
    emit("\n| | prefill | decode | Linears semi-structured |\n| --- | --- | --- | --- |")
    prompt = min(prompt, model.config.max_position_embeddings - 1)
    inner = inner_linears(model)
    for linear in inner:
        linear.weight.data = semi_structured_zeros(linear.weight.data)
    told("dense", latency(model, prompt), 0)
    gains = {s: gain(*s, prompt) for s in {(m.out_features, m.in_features) for m in inner}}
    chosen = [linear for linear in inner if gains[linear.out_features, linear.in_features] > 1]
    for linear in chosen:
        linear.weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(linear.weight.data), requires_grad=False)
    told("where they gain", latency(model, prompt), len(chosen))


def told(name: str, found: dict[str, dict[str, float]], linears: int) -> None:
    """One line."""
    prefill, decode = (1000 * found[kind]["median"] for kind in ("prefill", "decode"))
    emit(f"| {name} | {prefill:.1f} ms | {decode:.2f} ms | {linears} |")


def inner_linears(model: nn.Module) -> list[nn.Linear]:
    """Those inside the decoder layers."""
    stack = decoder_stack(model, architecture_of(model))[1]
    return [module for module in stack.modules() if isinstance(module, nn.Linear)]


if __name__ == "__main__":
    sys.exit(main())
