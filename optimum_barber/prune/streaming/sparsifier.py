"""From disk to disk: a checkpoint is pruned one decoder layer at a time, and a stopped run goes on where it was."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from ...base.errors import BarberError, UnfinishedError
from ...base.files import write_json
from ...base.output import STATE_DIRECTORY, alone, check_output, full_disk, partial_of, shown, staged
from ...base.rank_group import all_ranks
from ...base.ranks import Ranks
from ...checkpoints.names import INDEX_NAME
from ...checkpoints.pruned import carry_structure
from ...checkpoints.record import MaskFile, read_record
from ...checkpoints.shards import Entry
from ...checkpoints.verify import verify_checkpoint
from ...checkpoints.write import pointer, save_record, software
from ...models.device import choose_device
from ...models.loading import ModelReference, load_tokenizer, resolve_model
from ...tensors.budget import Shares
from ...text.windows import TokenWindows
from ..cost.needs import (
    GIB,
    LAYER_COPIES,
    TRAINED_COPIES,
    Needs,
    batched,
    check_fit,
    free_device_memory,
    free_disk,
    free_memory,
    needs_of,
    placed,
)
from ..cost.rates import predict
from ..cost.timing import table
from ..pipeline import BlockReport, Plan
from ..rebuild_settings import EXCHANGING
from ..settings import BarberConfig
from ..sparsifier import BarberSparsifier, Callback, SparsifyResult
from .disk import DiskSource, skeleton, stored_weights, why_whole
from .progress import Follower, OutputShards, Progress


class StreamingSparsifier(BarberSparsifier):
    """Prunes a checkpoint from disk to disk, the same bits as in memory; a decoder layer is resident at a time.

    Args:
        reference: a GGUF file, or a local directory or hub snapshot of safetensors files.
        tokenizer: as in `BarberSparsifier`.
        dtype: of the result; auto keeps the checkpoint's, float16 for GGUF.

    Attributes:
        whole: why the model can only be pruned as a whole in memory; None where it can be streamed.

    Raises:
        BarberError: the files are damaged.
    """

    reference: ModelReference

    def __init__(self, reference: ModelReference, tokenizer: Any = None, dtype: str = "auto") -> None:
        self.weights = stored_weights(reference)
        super().__init__(skeleton(reference, self.weights, dtype), tokenizer, reference)
        self.whole = why_whole(self.model, self.weights)

    @classmethod
    def from_pretrained(cls, model: str | Path, dtype: str = "auto") -> Self:
        """Open a hub id, a directory, a GGUF file or `installed:PACKAGE`, without reading a weight."""
        reference = resolve_model(str(model))
        found = cls(reference, None, dtype)
        found.tokenizer = load_tokenizer(reference)
        return found

    def sparsify(
        self,
        config: BarberConfig,
        calibration: Sequence[str] | Tensor | TokenWindows | None = None,
        save_dir: str | Path | None = None,
        overwrite: bool = False,
        callbacks: Sequence[Callback] = (),
        quiet: bool = False,
        ranks: Ranks | None = None,
        *,
        resume: bool = False,
        activations: str = "auto",
    ) -> SparsifyResult:
        """Prune the checkpoint into `save_dir`, seen by all ranks; each layer is durable there as soon as it is done.

        Args:
            config: everything that decides the masks.
            calibration: as in `BarberSparsifier.sparsify`.
            save_dir: where the checkpoint goes; made in `save_dir.partial`, renamed at the end.
            overwrite: whether `save_dir` may hold something already, or a stopped run be thrown away.
            callbacks: called with each block's report, on every rank.
            quiet: no progress bar.
            ranks: as in `BarberSparsifier.sparsify`.
            resume: go on with a stopped run of the same settings, if there is one.
            activations: where calibration activations lie: memory, disk, or auto.

        Raises:
            BarberError: bad input, or what the machine has not; nothing was written.
            UnfinishedError: the disk or the device's memory is full, or another rank has ended; what is done is kept.
        """
        if save_dir is None:
            raise BarberError("streaming writes as it goes: save_dir is missing")
        output = check_output(save_dir, overwrite, self.inputs(config), resume)
        with all_ranks(choose_device(config.device), ranks) as together:
            source, plan, windows = self.plan(config, calibration, together)
            config = config.under(plan.pattern, plan.exact)
            assert isinstance(source, DiskSource)
            needs = self.needs(config, plan, windows, activations, output)
            with self._progress(output, resume, self._settings(config, source, windows), together) as progress:
                plan.scratch, plan.batch_size = progress.directory if needs.place == "disk" else None, needs.batch_size
                shares = progress.shares = self._share_out(config, source, plan, windows, quiet, progress.shares)
                source.progress = progress
                earlier = [BlockReport(**report) for report in progress.reports]
                told: list[Callback] = [lambda report: progress.reports.append(asdict(report)), *callbacks]
                _, reports = self._prune(config, source, plan, windows, told, quiet, earlier)
                if together.first:
                    self._finish(config, source, plan, windows, progress, reports, shares)
            together.wait()
        record = read_record(shown(output))
        return SparsifyResult(MaskFile(output / record.masks), record, reports, shares)

    def _source(self, device: torch.device) -> DiskSource:
        """The checkpoint; refused where it must be loaded whole."""
        if self.whole:
            raise BarberError(f"model {self.reference.name!r} cannot be streamed: {self.whole}")
        return DiskSource(self.model, self.weights, device)

    def preview(self, config: BarberConfig, save_dir: str | Path, activations: str = "auto") -> str:
        """What a run would take, as a page; everything is checked as it would be, nothing is written.

        Raises:
            BarberError: bad input, or what the machine has not.
        """
        output = Path(save_dir).expanduser().resolve()
        with all_ranks(choose_device(config.device)) as together:
            source, plan, windows = self.plan(config, ranks=together)
            needs = self.needs(config, plan, windows, activations, output)
        samples, length = windows.tokens.shape
        memory, disk = free_memory(), free_disk(output)
        lines = [f"calibration   {samples} windows of {length} tokens of {windows.source}", *needs.lines()]
        lines.append(f"free          {(memory or 0) / GIB:.2f} GiB of memory, {disk / GIB:.2f} GiB of disk: it fits")
        if together.count == 1:  # the time that several take is not foretold
            lines += table(predict(source, plan, config, (samples, length), needs.checkpoint, output))
        return "\n".join(lines) + "\n"

    def needs(self, config: BarberConfig, plan: Plan, windows: TokenWindows, activations: str, output: Path) -> Needs:
        """What the run takes, with activations where they fit.

        Raises:
            BarberError: it does not fit on this machine.
        """
        samples, length = windows.tokens.shape
        device = choose_device(config.device)
        free, left = free_memory(), free_disk(output) + held(partial_of(output))
        memory = None if free is None else free // plan.ranks.local
        found = replace(
            self.estimate(samples, length, gram_copies(config, plan)),
            batch_size=config.batch_size, device=device.type != "cpu", ranks=plan.ranks.count,
            copies=TRAINED_COPIES if "gradient" in config.reconstruct.chain else LAYER_COPIES,
        )  # fmt: skip
        on_device = free_device_memory(device)
        found = placed(batched(found, on_device), activations, memory)
        check_fit(found, memory, on_device, left)
        return found

    def estimate(self, samples: int, length: int, grams: int = 0) -> Needs:
        """What a run over so many windows of so many tokens takes."""
        source = DiskSource(self.model, self.weights, choose_device("cpu"))
        hidden = self.model.config.get_text_config().hidden_size
        written, stored = self._entries(), self.weights.entries
        size = sum(entry.bytes for entry in written.values())
        made = {  # in memory: what comes out of a file's blocks, and what is not of the dtype that is written
            name: stored[name].bytes * self.weights.unpacks + entry.bytes * (entry.dtype != stored[name].dtype)
            for name, entry in written.items()
        }
        found = needs_of(source.stack, source.architecture, hidden, samples, length, size, grams)
        return replace(found, around=max((made[name] for name in source.others()), default=0))

    @contextmanager
    def _progress(self, output: Path, resume: bool, settings: Mapping[str, Any], ranks: Ranks) -> Iterator[Progress]:
        """What was done and will be; what can be resumed stays when the machine fails, and goes when the input does."""
        state = partial_of(output) / STATE_DIRECTORY
        if not ranks.first:
            ranks.wait()
            yield Follower(shown(state), settings, ranks)
            return
        layout = self.weights.layout
        with staged(output, resume) as partial, alone(partial, STATE_DIRECTORY), full_disk(partial):
            progress = Progress(state, settings, ranks)  # may refuse, and then no file has been touched
            try:
                with OutputShards(partial, layout.files, self._entries(), layout.metadata) as progress.shards:
                    ranks.wait()
                    yield progress
            except UnfinishedError:
                raise
            except BarberError:  # no resumed run would fare better
                progress.discard()
                raise

    def _finish(
        self,
        config: BarberConfig,
        source: DiskSource,
        plan: Plan,
        windows: TokenWindows,
        progress: Progress,
        reports: list[BlockReport],
        shares: Shares,
    ) -> None:
        """Write everything that is no decoder layer; the state goes when the checkpoint has been checked."""
        for name in source.others():
            progress.write(name, self.weights.tensor(name))
        progress.check()
        result = self._result(config, source, plan, windows, progress.masks(), reports, shares)
        self._save(progress.directory.parent, config, result)
        progress.discard()

    def _settings(self, config: BarberConfig, source: DiskSource, windows: TokenWindows) -> dict[str, Any]:
        """Everything that decides the result, by the name that a refusal will say."""
        given = config.model_dump(exclude={"batch_size", "rebuild", "calibration"})
        return {
            **given, **config.rebuild.model_dump(), **config.calibration.model_dump(), **software(),
            "device": source.device.type, "calibration tokens": windows.fingerprint,
            **{f"input {path}": stamp(path) for path in self.inputs(config)},
        }  # fmt: skip

    def _save(self, partial: Path, config: BarberConfig, result: SparsifyResult) -> None:
        """Everything beside the shards; then the whole checkpoint is checked against its record.

        Raises:
            BarberError: what was written does not hold the masks.
        """
        model, record = self.model, result.sparsity_config
        model.config.sparsity_config = pointer(record)
        model.config.dtype = record.base_model["dtype"]
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(partial)
        if model.can_generate():
            model.generation_config.save_pretrained(partial)
        index = self.weights.layout.index
        if index is not None:
            size = sum(entry.bytes for entry in self._entries().values())
            metadata = {**index.get("metadata", {}), "total_size": size}
            write_json(partial / INDEX_NAME, {**index, "metadata": metadata})
        save_record(partial, self.tokenizer, config.model_dump(mode="json"), record, result.masks, result.as_report())
        carry_structure(self.reference.directory, partial, {"name": "prune", "producer": config.producer_name})
        for fault in verify_checkpoint(partial).faults:
            raise BarberError(f"the masks do not hold: {fault}; nothing was written")

    def _entries(self) -> dict[str, Entry]:
        """Dtype and shape of every tensor that is written; tensors that the model does not know stay as they are."""
        state = self.model.state_dict()
        return {
            name: Entry(state[name].dtype, tuple(state[name].shape)) if name in state else entry
            for name, entry in self.weights.entries.items()
        }


def stamp(path: Path) -> list[Any]:
    """Names, sizes and times of a file, or of the files of a directory: reading them would take minutes."""
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def held(directory: Path) -> int:
    """Bytes that the files of a directory take on the disk; 0 where there is none."""
    return sum(512 * path.stat().st_blocks for path in directory.rglob("*") if path.is_file())


def gram_copies(config: BarberConfig, plan: Plan) -> int:
    """How many copies of a block's Gram matrices a run holds at once: the producer's, and those of what follows."""
    exchanging = not EXCHANGING.isdisjoint(config.rebuild.chain)
    solving = exchanging or "least-squares" in config.reconstruct.chain
    reordered = exchanging and plan.pattern.semi_structured
    return int("gram" in plan.producer.needs) + int(solving) + int(reordered)
