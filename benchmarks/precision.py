"""Measure what less exact matrix products change: seconds, masks and perplexity of a default run at every precision.

    python -m benchmarks.precision [--model MODEL] [--calibration TEXT] [--evaluation TEXT] [--device cuda]

Prints a line of a Markdown table for each precision of `torch.set_float32_matmul_precision`: seconds of pruning, the
share of mask bits that equal those of `highest`, in the first decoder layer and in all, and perplexity. The device
decides what a precision means, and whether it differs from the others at all.
"""

import sys
import time
from collections.abc import Mapping

from torch import Tensor

from optimum_barber import BarberConfig, BarberSparsifier
from optimum_barber.base.fields import PRECISIONS
from optimum_barber.models.loading import load_tokenizer, resolve_model
from optimum_barber.text.perplexity import perplexity
from optimum_barber.text.sources import read_texts
from optimum_barber.text.tokens import Encoder
from optimum_barber.text.windows import consecutive_windows

from .one_pass import arguments, opened
from .table import emit


def agreement(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The share of bits in which the masks agree."""
    same = sum(int((one[name] == other[name]).count_nonzero()) for name in one)
    return same / sum(mask.numel() for mask in one.values())


def first_layer(masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The masks of decoder layer 0."""
    return {name: mask for name, mask in masks.items() if ".0." in name}


def main() -> int:
    """Run the benchmark."""
    parser = arguments(__doc__)
    parser.add_argument("--evaluation", default="pydoc")
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    load, calibration = opened(args)
    encoder = Encoder(load_tokenizer(resolve_model(args.model)), bos="once")
    text = encoder.tokens(read_texts(args.evaluation, "evaluation"))
    evaluation = consecutive_windows(text, args.sequence_length, args.windows, args.evaluation)
    emit("| precision | seconds | agree, first layer | agree, all layers | perplexity |\n" + "| --- " * 5 + "|")
    exact: dict[str, Tensor] = {}
    for precision in PRECISIONS[1:]:
        model = load()
        config = BarberConfig(sparsity=0.5, precision=precision, device=args.device)
        started = time.perf_counter()
        found = BarberSparsifier(model).sparsify(config, calibration, quiet=True)
        seconds = time.perf_counter() - started
        masks = {name: mask.unpack() for name, mask in found.masks.items()}
        exact = exact or masks
        shares = [agreement(first_layer(masks), first_layer(exact)), agreement(masks, exact)]
        told = " | ".join(f"{100 * share:.3f} %" for share in shares)
        emit(f"| {precision} | {seconds:.1f} | {told} | {perplexity(model, evaluation, quiet=True).perplexity:.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
