"""Whether a run from disk to disk fits on this machine, and the page that `--dry-run` prints."""

from dataclasses import replace
from pathlib import Path

from ...base.memory import free_disk, free_memory
from ...base.output import partial_of
from ...models.device import choose_device
from ..cost import needs as cost
from ..cost.forecast import forecast
from ..cost.needs import GIB, Needs
from ..plan import Run
from ..rebuild_settings import EXCHANGING
from .disk import DiskCheckpoint, DiskSource


def fitting_needs(checkpoint: DiskCheckpoint, run: Run, activations: str, output: Path) -> Needs:
    """What the run takes with activations in memory, disk or where they fit; raises BarberError if it does not fit."""
    samples, length = run.windows.tokens.shape
    device = run.source.device
    free = free_memory()
    free_on_device = free_memory(device) if device.type != "cpu" else None
    if free is not None:
        free //= run.plan.ranks.local
    needs = replace(
        estimate(checkpoint, samples, length, _gram_copies(run)),
        batch_size=run.config.batch_size,
        device=device.type != "cpu",
        ranks=run.plan.ranks.count,
        copies=cost.TRAINED_COPIES if "gradient" in run.config.reconstruct.chain else cost.LAYER_COPIES,
    )
    needs = cost.with_place(cost.with_batch_size(needs, free_on_device), activations, free)
    kept = sum(512 * path.stat().st_blocks for path in partial_of(output).rglob("*") if path.is_file())
    cost.check_fit(needs, free, free_on_device, free_disk(output) + kept)
    return needs


def estimate(checkpoint: DiskCheckpoint, samples: int, length: int, grams: int = 0) -> Needs:
    """What a run over so many windows of so many tokens takes, with so many copies of a block's Gram matrices."""
    source = DiskSource(checkpoint, choose_device("cpu"))
    hidden = checkpoint.model.config.get_text_config().hidden_size
    stored, written = checkpoint.weights.entries, checkpoint.written
    size = sum(entry.bytes for entry in written.values())
    largest_outer = 0  # of a tensor outside of the layers: what is made in memory, not mapped, while it is read
    for name in source.names_outside_layers():
        copied = 0
        if checkpoint.weights.unpacks:
            copied += stored[name].bytes
        if written[name].dtype != stored[name].dtype:
            copied += written[name].bytes
        largest_outer = max(largest_outer, copied)
    needs = cost.needs_of(source, hidden, samples, length, size, grams)
    return replace(needs, largest_outer_tensor=largest_outer)


def _gram_copies(run: Run) -> int:
    """The producer's copy, and those of later steps."""
    exchanging = not EXCHANGING.isdisjoint(run.config.rebuild.chain)
    solving = exchanging or "least-squares" in run.config.reconstruct.chain
    reordered = exchanging and run.plan.pattern.semi_structured
    return int("gram" in run.plan.producer.needs) + int(solving) + int(reordered)


def preview(checkpoint: DiskCheckpoint, run: Run, activations: str, output: Path) -> str:
    """What a run would take, as a page; it is refused as in `fitting_needs`."""
    needs = fitting_needs(checkpoint, run, activations, output)
    samples, length = run.windows.tokens.shape
    memory, disk = (free_memory() or 0) / GIB, free_disk(output) / GIB
    lines = [
        f"calibration   {samples} windows of {length} tokens of {run.windows.source}",
        f"precision     {run.config.precision} of float32 products",
        *needs.lines(),
        f"free          {memory:.2f} GiB of memory, {disk:.2f} GiB of disk: it fits",
    ]
    if run.plan.ranks.count == 1:  # the forecast is of one process
        lines.append(forecast(run.source, run.config, run.plan.pattern, samples, length))
    return "\n".join(lines) + "\n"
