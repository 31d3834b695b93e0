"""How far a run from disk to disk has come: everything that it has made, durable after each decoder layer."""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from ...base.errors import BarberError, UnfinishedError
from ...base.files import as_json, sync_directory, write_file
from ...base.output import STATE_DIRECTORY, STATE_NAME, full_disk, output_lock, partial_of, staged, wait_for
from ...base.ranks import ALONE, Ranks
from ...checkpoints.names import DESCRIBING
from ...checkpoints.record import MaskFile, write_masks
from ...checkpoints.shards import Entry, Layout, OutputShards, TensorFile, damaged, read_header
from ...checkpoints.write import software
from ...models.activations import Activations, Sample, tensors_of
from ...tensors.budget import Shares
from ...tensors.masks import PackedMask
from ..pipeline import BlockReport
from ..plan import Run


class Progress:
    """What a run has done so far, in a directory beside the shards that it writes.

    A layer counts as done when the state file says so. That file is replaced in one step, after everything else of the
    layer is on the disk. Whatever lies there beyond it is of an unfinished layer and is overwritten. The first rank
    writes; each reads its own samples. A state of other settings than these, or a damaged one, raises BarberError.
    """

    output: OutputShards  # on the first rank

    def __init__(self, directory: Path, settings: Mapping[str, Any], ranks: Ranks = ALONE) -> None:
        self.directory = directory
        self.ranks = ranks
        self.settings: dict[str, Any] = json.loads(json.dumps(settings, default=str))
        self.layers = 0  # that are done
        self.reports: list[BlockReport] = []
        self.shares: Shares | None = None
        self.checksums: dict[str, dict[str, int]] = {}  # CRC-32 of all that was written, by tensor, by file
        if (directory / STATE_NAME).exists():
            self._restore(json.loads((directory / STATE_NAME).read_text(encoding="utf-8")))

    def _restore(self, state: Mapping[str, Any]) -> None:
        differences = []
        for key in {**state["settings"], **self.settings}:
            before, now = state["settings"].get(key), self.settings.get(key)
            if before != now:
                differences.append(f"{key} was {before}, is {now}")
        if differences:
            raise BarberError(f"resume is not possible with other settings: {'; '.join(differences)}")
        self.layers = state["layers"]
        self.reports = [BlockReport(**report) for report in state["reports"]]
        self.shares = Shares(**state["shares"]) if state.get("shares") else None
        self.checksums = state.get("checksums", {})
        try:
            for layer in range(self.layers):
                read_header(self._file("masks", layer))
            if self.ranks.first:
                self.check()
        except BarberError as error:
            raise BarberError(f"resume is not possible: {error}; start anew with --overwrite") from None

    def check(self) -> None:
        """Read back every tensor that has been written; raises BarberError if one is not what was written."""
        for file, checksums in self.checksums.items():
            name = damaged(self.directory.parent / file, checksums)
            if name is not None:
                raise BarberError(f"{file} does not hold {name} as it was written")

    def hidden(self) -> Iterator[Sample]:
        """What enters the first layer that is still to be done, sample by sample of this rank."""
        from safetensors import safe_open

        path = self._file("hidden", self.layers)
        samples: dict[str, list[str]] = {}
        for name in sorted(read_header(path).entries):
            samples.setdefault(name.partition(".")[0], []).append(name)
        with safe_open(path, "pt") as file:
            for names in list(samples.values())[self.ranks.share(len(samples)).slice]:
                tensors = tuple(file.get_tensor(name).clone() for name in names)
                yield tensors if len(tensors) > 1 else tensors[0]

    def masks(self) -> dict[str, PackedMask]:
        """The masks of all finished layers, mapped from the disk."""
        masks: dict[str, PackedMask] = {}
        for layer in range(self.layers):
            masks.update(MaskFile(self._file("masks", layer)))
        return masks

    def commit(
        self, masks: dict[str, PackedMask], hidden: Activations, weights: Mapping[str, Tensor]
    ) -> dict[str, PackedMask]:
        """Write a layer's masks, output and weights durably, and count it as done.

        Returns the masks, mapped from their file; none on the ranks after the first, which only send their samples.
        """
        if not self.ranks.first:
            for _ in self._samples(hidden):
                pass
            self.layers += 1
            return {}
        write_masks(self._file("masks", self.layers), masks, "")
        self._write_hidden(hidden)
        for name, weight in weights.items():
            self.output.write(name, weight)
        self.output.sync()
        sync_directory(self.directory)
        self._count_layer()
        return dict(MaskFile(self._file("masks", self.layers - 1)))

    def _write_hidden(self, hidden: Activations) -> None:
        path = self._file("hidden", self.layers + 1)
        entries: dict[str, Entry] = {}
        for part, tensor in enumerate(tensors_of(hidden.held[0])):
            suffix = f".{part:02d}" if part else ""
            for index in range(hidden.total):
                entries[f"{index:08d}{suffix}"] = Entry(tensor.dtype, tuple(tensor.shape))
        checksums = self.checksums[self._key(path)] = {}
        with closing(TensorFile(path, entries, {})) as file:
            for name, tensor in zip(entries, self._samples(hidden), strict=True):
                checksums[name] = file.write(name, tensor)

    def _samples(self, hidden: Activations) -> Iterator[Tensor]:
        """The first tensor of every sample of all ranks, then the second of each, and so on."""
        for tensors in zip(*map(tensors_of, hidden.held), strict=True):
            yield from self.ranks.collect(tensors, hidden.total)

    def _count_layer(self) -> None:
        """Replace the state file in one step; what entered the finished layer is no longer needed."""
        finished = self._file("hidden", self.layers)
        self.checksums.pop(self._key(finished), None)
        state = {
            "settings": self.settings,
            "layers": self.layers + 1,
            "reports": [asdict(report) for report in self.reports],
            "shares": asdict(self.shares) if self.shares else None,
            "checksums": self.checksums,
        }
        write_file(self.directory / STATE_NAME, as_json(state, None), durable=True)
        finished.unlink(missing_ok=True)
        self.layers += 1

    def discard(self) -> None:
        """Delete the state: the run is complete, or a resumed one would fare no better."""
        (self.directory / STATE_NAME).unlink(missing_ok=True)
        shutil.rmtree(self.directory, ignore_errors=True)

    def _file(self, kind: str, layer: int) -> Path:
        return self.directory / f"{kind}-{layer:05d}.safetensors"

    def _key(self, path: Path) -> str:
        return str(path.relative_to(self.directory.parent))


@contextmanager
def open_progress(
    output: Path, resume: bool, settings: Mapping[str, Any], ranks: Ranks, layout: Layout, entries: Mapping[str, Entry]
) -> Iterator[Progress]:
    """Open or resume a run's state; it is kept when the machine fails, as with UnfinishedError, and no other error."""
    state = partial_of(output) / STATE_DIRECTORY
    if not ranks.first:
        ranks.wait()
        yield Progress(wait_for(state), settings, ranks)
        return
    with staged(output, resume) as partial, output_lock(partial, STATE_DIRECTORY), full_disk(partial):
        progress = Progress(state, settings, ranks)  # refuses other settings before any file is touched
        try:
            with OutputShards(partial, layout, entries, progress.checksums) as progress.output:
                ranks.wait()
                yield progress
        except UnfinishedError:
            raise
        except BarberError:  # no resumed run would fare better
            progress.discard()
            raise


def result_settings(run: Run, inputs: Iterable[Path]) -> dict[str, Any]:
    """Everything that decides the result, by the name that a refusal will say."""
    settings = run.config.model_dump(exclude={"batch_size", "rebuild", "calibration"})
    settings |= run.config.rebuild.model_dump() | run.config.calibration.model_dump() | software()
    settings["device"] = run.source.device.type
    settings["calibration tokens"] = run.windows.fingerprint
    for path in inputs:
        files = [path]
        if not path.is_file():
            files = sorted(file for file in path.iterdir() if file.is_file() and file.name not in DESCRIBING)
        stats = [(file.name, file.stat()) for file in files]  # reading the files would take minutes
        settings[f"input {path}"] = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
    return settings
