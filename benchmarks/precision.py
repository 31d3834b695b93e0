"""Measure what rounded matrix products change: the masks, and perplexity over several seeds.

    python -m benchmarks.precision --calibration TEXT --evaluation TEXT [TEXT ...] [--model MODEL] [--device cuda]
        [--precision medium] [--producers wanda magnitude] [--patterns unstructured 2:4] [--seeds 3]
        [--samples 16] [--sequence-length 512] [--windows 40] [--layers N]

Prunes by each producer and pattern with products in float32 and in the other precision, by default the one that `auto`
is on the device. Prints a Markdown row for each: the share of mask bits that agree, the least of the seeds, and for
each text the mean perplexity over the seeds, with the standard deviation among them, at both precisions, and how much
the means differ. A seed chooses the calibration windows.

A row `nudged` says how much of that is chance: it compares float32 with float32 on weights that differ by 1e-6 of each.
"""

import statistics
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from optimum_barber import BarberConfig, BarberSparsifier
from optimum_barber.base.fields import PRECISIONS
from optimum_barber.models.device import choose_device, product_precision
from optimum_barber.models.loading import load_model, load_tokenizer, resolve_model
from optimum_barber.text.perplexity import perplexity
from optimum_barber.text.tokens import Encoder
from optimum_barber.text.windows import TokenWindows, calibration_windows

from .one_pass import arguments, first_layers
from .table import emit, evaluation_windows

EXACT = "highest"
NUDGED = "nudged"  # float32 products of other weights
NUDGE = 1e-6  # of each weight, times a normal deviate
Measured = tuple[dict[str, Tensor], list[float]]  # keep masks by Linear; perplexity by text


def main() -> int:
    """Run the benchmark."""
    parser = arguments(__doc__)
    parser.add_argument("--evaluation", nargs="+", default=["pydoc"])
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", choices=PRECISIONS, default="auto")
    parser.add_argument("--producers", nargs="+", default=["wanda", "magnitude"])
    parser.add_argument("--patterns", nargs="+", default=["unstructured", "2:4"])
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    rounded = product_precision(args.precision, choose_device(args.device))
    tokenizer = load_tokenizer(resolve_model(args.model))
    texts = [evaluation_windows(name, args, tokenizer) for name in args.evaluation]
    columns = ["producer", "pattern", "against", "masks agree"]
    columns += [f"{name.rpartition('/')[2]}: {EXACT} | against | change" for name in args.evaluation]
    emit(f"| {' | '.join(columns)} |\n" + "| --- " * (4 + 3 * len(texts)) + "|")
    for producer in args.producers:
        for pattern in args.patterns:
            for row in rows_of(producer, pattern, [rounded, NUDGED], texts, args):
                emit(row)
    return 0


def rows_of(
    producer: str, pattern: str, others: Sequence[str], texts: list[TokenWindows], args: Namespace
) -> Iterator[str]:
    """Float32 beside each of the others, under every seed."""
    config = config_of(producer, pattern, args)
    exact = [measure(config, EXACT, seed, texts, args) for seed in range(args.seeds)]
    for name in others:
        other = [measure(config, name, seed, texts, args) for seed in range(args.seeds)]
        agreements = [agreement(one[0], two[0]) for one, two in zip(exact, other, strict=True)]
        cells = [producer, pattern, name, f"{100 * min(agreements):.2f} %"]
        for index in range(len(texts)):
            cells.append(told([run[1][index] for run in exact], [run[1][index] for run in other]))
        yield f"| {' | '.join(cells)} |"


def config_of(producer: str, pattern: str, args: Namespace) -> BarberConfig:
    """The default rebuild of a producer's masks, at 50 % or N:M."""
    sparsity = 0.5 if pattern == "unstructured" else None
    return BarberConfig(producer=producer, sparsity=sparsity, pattern=pattern, device=args.device)


def measure(config: BarberConfig, precision: str, seed: int, texts: list[TokenWindows], args: Namespace) -> Measured:
    """One run of the dense model, loaded anew."""
    reference = resolve_model(args.model)
    model: Any = first_layers(load_model(reference, "float32"), args.layers)
    shape = {"samples": args.samples, "length": args.sequence_length}
    windows = calibration_windows([args.calibration], Encoder(load_tokenizer(reference)), seed=seed, **shape)
    if precision == NUDGED:
        nudge(model)
        precision = EXACT
    config = config.model_copy(update={"precision": precision})
    result = BarberSparsifier(model).sparsify(config, windows.tokens, quiet=True)
    masks = {name: mask.unpack() for name, mask in result.masks.items()}
    return masks, [perplexity(model, text, quiet=True).perplexity for text in texts]


@torch.no_grad()
def nudge(model: nn.Module) -> None:
    """Change every weight by about `NUDGE` of it, the same way each time."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.mul_(1 + NUDGE * torch.randn(parameter.shape, generator=generator))


def agreement(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The share of bits in which the masks agree."""
    same = sum(int((one[name] == other[name]).count_nonzero()) for name in one)
    return same / sum(mask.numel() for mask in one.values())


def told(exact: Sequence[float], other: Sequence[float]) -> str:
    """Three cells: perplexity at both precisions over the seeds, and how much the mean changes."""
    change = 100 * (statistics.mean(other) / statistics.mean(exact) - 1)
    return f"{over_seeds(exact)} | {over_seeds(other)} | {change:+.2f} %"


def over_seeds(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


if __name__ == "__main__":
    sys.exit(main())
