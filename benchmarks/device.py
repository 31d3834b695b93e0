"""One check of a GPU in ten minutes at most: tests, pruning at LLaMA-7B's shape, 2:4 products, smaller models, ranks.

    python -m benchmarks.device [--parts tests ranks products prune shrink others] [--minutes 9.5] [--precision auto]
        [--layers 32] [--hidden-size 4096] [--feed-forward 11008] [--heads 32] [--samples 128] [--sequence-length 2048]
        [--device auto] [--work DIR]

Needs no network and no files: weights are random. Every part prints its lines as soon as it has them. A part that fails
says so in one line, and one for which no time is left says that; the others go on. The exit status is 1 if one failed.

- `tests`: the suite's tests marked `gpu`.
- `ranks`: sums, broadcasts and gathers of one process through NCCL (gloo on a CPU) equal those of no group.
- `products`: seconds of dense products over those of torch's semi-structured tensors, by shape and number of tokens;
  then prefill and decoding of a model whose Linears are semi-structured where that is faster. CUDA only.
- `prune`: Wanda alone, and with the default rebuild, from disk to disk. `others`: magnitude and SparseGPT alone.
  Minutes, peak of the device's memory, and by stage the seconds, the passes and the rate at which they were computed,
  beside the rate of one large product in the same precision. A gradient pass counts as three forward passes.
- `shrink`: prefill and decoding of the model without 20 and 50 % of its heads and channels.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from optimum_barber import BarberConfig, BarberShrinker, BarberSparsifier, ShrinkConfig
from optimum_barber.base.devices import COLLECTIVES
from optimum_barber.base.memory import peak_memory, reset_peak_memory
from optimum_barber.base.ranks import RankGroup
from optimum_barber.models.architectures import architecture_of, decoder_stack
from optimum_barber.models.device import choose_device, matrix_products, product_precision
from optimum_barber.models.loading import empty_model, resolve_model
from optimum_barber.models.measure import latency, timed
from optimum_barber.models.source import ModelSource
from optimum_barber.prune.cost.forecast import forward_flops

from .semi_structured import faster_shapes, median_of, semi_structured_zeros
from .streaming import VOCABULARY, llama, write_model
from .table import emit

SQUARE = {"cpu": 1024}  # width of the product that gives the peak rate; 8192 on other devices
GRADIENT_PASS = 3  # forward passes
REMOVED = (0.2, 0.5)
PROMPT = 1024  # tokens
ROOT = Path(__file__).resolve().parents[1]


class Check:
    """What all parts share: settings, device, folder, and the time that is left."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        self.device = choose_device(args.device)
        self.precision = product_precision(args.precision, self.device)
        self.ends = time.monotonic() + 60 * args.minutes
        shape = args.layers, args.hidden_size, args.feed_forward, args.heads, args.heads
        self.shape, self.config = shape, llama(*shape)

    @property
    def left(self) -> float:
        """Seconds."""
        return self.ends - time.monotonic()

    def still_time(self, *_: object) -> None:
        """Raise if no time is left; a callback of every block."""
        if self.left < 0:
            raise TimeoutError("no time left")

    def model(self) -> Path:
        """The checkpoint, written when it is first asked for."""
        path = self.folder / "model"
        if not path.exists():
            seconds, _ = timed(partial(write_model, path, *self.shape, repeated=True), torch.device("cpu"))
            emit(f"model: {self.args.layers} layers, {self.args.hidden_size} wide, written in {seconds:.0f} s")
        return path

    def on_device(self) -> Any:
        """A model of the shape with random weights, on the device, in 16 bits."""
        from transformers import AutoModelForCausalLM

        with self.device:
            return AutoModelForCausalLM.from_config(self.config, dtype=torch.bfloat16).eval()


def main(argv: list[str] | None = None) -> int:
    """Run the parts in order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=9.5)
    parser.add_argument("--precision", default="auto", help="of float32 products while pruning")
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--work", type=Path, help="where models are written (default: a temporary directory)")
    args = parser.parse_args(argv)
    failed = 0
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        check = Check(args, Path(folder))
        emit(f"{name_of(check.device)}, torch {torch.__version__}, parts {' '.join(args.parts)}")
        for name in args.parts:
            started = time.monotonic()
            try:
                check.still_time()
                PARTS[name](check)
            except Exception as error:
                failed += 1
                emit(f"{name}: failed, {type(error).__name__}: {' '.join(str(error).split())[:300]}")
            emit(f"{name}: {time.monotonic() - started:.0f} s, {max(check.left, 0):.0f} s left\n")
    return int(failed > 0)


def name_of(device: torch.device) -> str:
    """What the device is called."""
    if device.type == "cpu":
        return f"CPU, {torch.get_num_threads()} threads"
    return str(torch.get_device_module(device).get_device_name(device))


def tests(check: Check) -> None:
    """Run the tests marked `gpu`; print the summary of pytest."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "tests/test_cuda.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=max(check.left, 1))
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    for line in lines[-1:] if done.returncode in (0, 5) else lines[-15:]:
        emit(f"tests: {line.strip()}")
    if done.returncode not in (0, 5):  # 5: none was collected
        raise RuntimeError(f"pytest ended with {done.returncode}")


def ranks(check: Check) -> None:
    """Compare the verbs of one rank with their arguments."""
    backend = COLLECTIVES.get(check.device.type, "gloo")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    group = RankGroup(check.device)
    try:
        tensor = torch.randn(512, 256, dtype=torch.float64, device=check.device)
        keep = tensor > 0
        same = torch.equal(group.sum(tensor.clone()), tensor) and torch.equal(group.broadcast(keep), keep)
        same &= torch.equal(group.spread(lambda rows: tensor[rows].clone(), tensor, tile=128), tensor)
        same &= group.gather([1.5, 2.0]) == [1.5, 2.0]
        group.wait()
        emit(f"ranks: one process through {backend}: {'the same bits' if same else 'DIFFERS'}")
    finally:
        group.close()
        dist.destroy_process_group()
    if not same:
        raise RuntimeError("collectives change bits")


def prune(check: Check) -> None:
    """Wanda alone and with the default rebuild."""
    runs(check, [("wanda", "none"), ("wanda", "auto")])


def others(check: Check) -> None:
    """Magnitude and SparseGPT alone."""
    runs(check, [("magnitude", "none"), ("sparsegpt", "none")])


def runs(check: Check, chosen: list[tuple[str, str]]) -> None:
    """Prune by each; a line a run, and one for each of its stages."""
    model, peak = check.model(), peak_rate(check)
    emit(f"one product of {width_of(check)}³ in precision {check.precision}: {peak / 1e12:.2f} TFLOP/s")
    emit(
        "| producer, rebuild | stage | minutes | passes | TFLOP/s | of one product | peak GiB |\n" + "| --- " * 7 + "|"
    )
    for producer, rebuild in chosen:
        pruned(check, model, producer, rebuild, peak)


def pruned(check: Check, model: Path, producer: str, rebuild: str, peak: float) -> None:
    """One run from disk to disk."""
    args, output = check.args, check.folder / "out"
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(0, VOCABULARY, (args.samples, args.sequence_length), generator=generator)
    method = {} if rebuild == "auto" else {"rebuild": {"method": rebuild}}
    settings = BarberConfig(
        producer=producer, sparsity=0.5, device=str(check.device), precision=check.precision, **method
    )
    reset_peak_memory()
    sparsifier = BarberSparsifier(None, None, resolve_model(str(model)), stream="always")
    run = partial(sparsifier.sparsify, settings, windows, output, True, [check.still_time], quiet=True)
    try:
        seconds, result = timed(run, check.device)
    finally:
        for left in check.folder.glob("out*"):
            shutil.rmtree(left)
    label, memory = f"{producer}, {rebuild}", f"{peak_memory() / 2**30:.1f}"
    in_blocks = 0.0
    for stage, share in shares_of(check).items():
        reports = [report for report in result.reports if report.block.endswith(stage)]
        passes = sum(report.forward_passes + GRADIENT_PASS * report.gradient_passes for report in reports)
        spent = sum(report.seconds for report in reports)
        in_blocks += spent
        rate = passes / len(reports) * share * args.samples / spent
        emit(
            f"| {label} | {stage} | {spent / 60:.2f} | {passes / len(reports):.1f} | {rate / 1e12:.2f} "
            f"| {100 * rate / peak:.0f} % | |"
        )
    emit(f"| {label} | files, checks, embedding | {(seconds - in_blocks) / 60:.2f} | | | | |")
    emit(f"| {label} | all | {seconds / 60:.2f} | | | | {memory} |")


def shares_of(check: Check) -> dict[str, float]:
    """FLOP of a forward pass over a window in the attention and the MLP of all layers."""
    model, args = empty_model(check.config), check.args
    total = forward_flops(ModelSource(model), args.sequence_length)
    mlp = 2 * args.sequence_length * 3 * args.hidden_size * args.feed_forward * args.layers
    return {"attention": total - mlp, "mlp": mlp}


def width_of(check: Check) -> int:
    """Width of the matrices whose product gives the peak rate."""
    return SQUARE.get(check.device.type, 8192)


def peak_rate(check: Check) -> float:
    """FLOP a second of one large float32 product in the precision of the runs."""
    width = width_of(check)
    left, right = torch.randn(2, width, width, device=check.device)
    with matrix_products(check.precision):
        return 2 * width**3 / median_of(lambda: left @ right, check.device, 5)


def products(check: Check) -> None:
    """Where semi-structured products are faster, and what that makes of a model."""
    if check.device.type != "cuda":
        emit("products: torch's semi-structured tensors need CUDA")
        return
    shapes = sorted({(m.out_features, m.in_features) for m in inner_linears(empty_model(check.config))})
    faster = faster_shapes(shapes, PROMPT, check.device)
    model, chosen = check.on_device(), 0
    for linear in inner_linears(model):
        linear.weight.data = semi_structured_zeros(linear.weight.data)
    told("2:4 zeros, dense products", latency(model, prompt_of(check)))
    for linear in inner_linears(model):
        if (linear.out_features, linear.in_features) in faster:
            sparse = torch.sparse.to_sparse_semi_structured(linear.weight.data)
            linear.weight, chosen = nn.Parameter(sparse, requires_grad=False), chosen + 1
    told(f"2:4 zeros, {chosen} Linears semi-structured", latency(model, prompt_of(check)))


@torch.no_grad()
def shrink(check: Check) -> None:
    """Latency of the model, and of smaller ones."""
    model = check.on_device()
    told("dense", latency(model, prompt_of(check)))
    for share in REMOVED:
        config = ShrinkConfig(scorer="magnitude", remove=share, device=str(check.device))
        small = BarberShrinker(model).shrink(config, latency=False, quiet=True).model
        told(f"without {100 * share:.0f} %", latency(small.to(check.device), prompt_of(check)))


def prompt_of(check: Check) -> int:
    """Tokens of the prompt whose prefill is timed."""
    return min(PROMPT, check.args.sequence_length)


def told(name: str, measured: dict[str, Any]) -> None:
    """One line of a latency."""
    prefill, decode = (1000 * measured[kind]["median"] for kind in ("prefill", "decode"))
    emit(f"| {name} | {measured['prompt']} tokens | prefill {prefill:.1f} ms | decode {decode:.2f} ms |")


def inner_linears(model: nn.Module) -> list[nn.Linear]:
    """Those inside the decoder layers."""
    stack = decoder_stack(model, architecture_of(model))[1]
    return [module for module in stack.modules() if isinstance(module, nn.Linear)]


PARTS = {
    "tests": tests,
    "ranks": ranks,
    "products": products,
    "prune": prune,
    "shrink": shrink,
    "others": others,
}
SIZES = {
    "layers": 32,
    "hidden-size": 4096,
    "feed-forward": 11008,
    "heads": 32,
    "samples": 128,
    "sequence-length": 2048,
}

if __name__ == "__main__":
    sys.exit(main())
