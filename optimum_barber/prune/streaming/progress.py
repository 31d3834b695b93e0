"""How far a run from disk to disk has come: everything that it has made, durable after each decoder layer."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from ...base.errors import BarberError
from ...base.files import sync_directory, write_file
from ...base.output import STATE_NAME
from ...base.ranks import ALONE, Ranks
from ...checkpoints.record import MaskFile, write_masks
from ...checkpoints.shards import Entry, TensorFile, damaged, read_header
from ...checkpoints.weights import CheckpointWeights
from ...models.activations import Activations
from ...tensors.budget import Shares
from ...tensors.masks import PackedMask


class Progress:
    """What a run has done so far, in a directory beside the shards that it writes.

    A layer counts as done when the state file says so, which is replaced in one step when everything else of
    the layer is on the disk. What lies there beyond it is from a layer that was not finished, and is overwritten.

    Args:
        directory: of the state.
        settings: everything that decides the result.
        ranks: whose first one this is, and whose samples it keeps.

    Attributes:
        shards: the output's files, in which finished weights are written.
        layers: how many are done.
        reports: of the blocks so far.
        shares: of the blocks, once they are known.
        checksums: CRC-32 of every tensor that has been written, by its name, by file beside the state's directory.

    Raises:
        BarberError: the state that lies there is of other settings, or damaged.
    """

    shards: "OutputShards"

    def __init__(self, directory: Path, settings: Mapping[str, Any], ranks: Ranks = ALONE) -> None:
        self.directory = directory
        self.ranks = ranks
        self.settings = json.loads(json.dumps(settings, default=str))
        self.layers = 0
        self.reports: list[dict[str, Any]] = []
        self.shares: Shares | None = None
        self.checksums: dict[str, dict[str, int]] = {}
        if (directory / STATE_NAME).exists():
            self._take_up(json.loads((directory / STATE_NAME).read_text(encoding="utf-8")))

    def _take_up(self, state: Mapping[str, Any]) -> None:
        differences = [
            f"{key} was {state['settings'].get(key)}, is {self.settings.get(key)}"
            for key in {**state["settings"], **self.settings}
            if state["settings"].get(key) != self.settings.get(key)
        ]
        if differences:
            raise BarberError(f"resume is not possible with other settings: {'; '.join(differences)}")
        self.layers, self.reports = state["layers"], state["reports"]
        self.shares = Shares(**state["shares"]) if state.get("shares") else None
        self.checksums = state.get("checksums", {})
        try:
            for path in map(self._masks, range(self.layers)):
                read_header(path)
            if self.ranks.first:
                self.check()
        except BarberError as error:
            raise BarberError(f"resume is not possible: {error}; start anew with --overwrite") from None

    def check(self) -> None:
        """Read back every tensor that has been written.

        Raises:
            BarberError: one is not what was written.
        """
        for file, checksums in self.checksums.items():
            name = damaged(self.directory.parent / file, checksums)
            if name is not None:
                raise BarberError(f"{file} does not hold {name} as it was written")

    def hidden(self) -> Iterator[Tensor]:
        """What enters the first layer that is still to be done, mapped from the disk, sample by sample of this rank."""
        path = self._hidden(self.layers)
        names = sorted(read_header(path).entries)
        weights = CheckpointWeights(dict.fromkeys(names, path), path.name)
        return (weights.tensor(name) for name in names[self.ranks.share(len(names)).slice])

    def masks(self) -> dict[str, PackedMask]:
        """The masks of all finished layers, mapped from the disk."""
        return {name: mask for layer in range(self.layers) for name, mask in MaskFile(self._masks(layer)).items()}

    def keep(self, masks: dict[str, PackedMask], hidden: Activations) -> dict[str, PackedMask]:
        """Write the masks of the layer at hand, and what enters the next one."""
        write_masks(self._masks(self.layers), masks, "")
        entry = Entry(hidden.held[0].dtype, tuple(hidden.held[0].shape))
        entries = {f"{index:08d}": entry for index in range(hidden.total)}
        path = self._hidden(self.layers + 1)
        with closing(TensorFile(path, entries, {})) as file:
            samples = zip(entries, self.ranks.collect(hidden.held, hidden.total), strict=True)
            self.checksums[self._beside(path)] = {name: file.write(name, sample) for name, sample in samples}
        return dict(MaskFile(self._masks(self.layers)))

    def finish(self, weights: Mapping[str, Tensor]) -> None:
        """Write the weights of the layer at hand, and count it as done."""
        for name, weight in weights.items():
            self.write(name, weight)
        self.shards.sync()
        sync_directory(self.directory)
        self.checksums.pop(self._beside(self._hidden(self.layers)), None)
        shares = asdict(self.shares) if self.shares else None
        state = {
            "settings": self.settings, "layers": self.layers + 1, "reports": self.reports, "shares": shares,
            "checksums": self.checksums,
        }  # fmt: skip
        write_file(self.directory / STATE_NAME, json.dumps(state), durable=True)
        self._hidden(self.layers).unlink(missing_ok=True)
        self.layers += 1

    def write(self, name: str, weight: Tensor) -> None:
        """Write a weight of the output, and keep its checksum."""
        file, checksum = self.shards.write(name, weight)
        self.checksums.setdefault(file, {})[name] = checksum

    def discard(self) -> None:
        """Throw the state away: the run is complete, or a resumed one would fare no better."""
        (self.directory / STATE_NAME).unlink(missing_ok=True)
        shutil.rmtree(self.directory, ignore_errors=True)

    def _masks(self, layer: int) -> Path:
        return self.directory / f"masks-{layer:05d}.safetensors"

    def _beside(self, path: Path) -> str:
        return str(path.relative_to(self.directory.parent))

    def _hidden(self, layer: int) -> Path:
        return self.directory / f"hidden-{layer:05d}.safetensors"


class Follower(Progress):
    """The same on a rank that writes nothing: its samples go to the first, which keeps the masks too."""

    def keep(self, masks: dict[str, PackedMask], hidden: Activations) -> dict[str, PackedMask]:
        """Send what enters the next layer."""
        list(self.ranks.collect(hidden.held, hidden.total))
        return {}

    def finish(self, weights: Mapping[str, Tensor]) -> None:
        """Count the layer at hand as done."""
        self.layers += 1


class OutputShards:
    """The output's safetensors files, with the names, tensors and order of the input's.

    Args:
        directory: where they go.
        files: file name of each tensor.
        entries: dtype and shape of each tensor, as it will be written.
        metadata: of each file.
    """

    def __init__(
        self, directory: Path, files: Mapping[str, str], entries: Mapping[str, Entry], metadata: Mapping[str, Any]
    ) -> None:
        self.files = files
        self._open = {
            file: TensorFile(directory / file, {n: entries[n] for n in files if files[n] == file}, metadata[file])
            for file in sorted(set(files.values()))
        }
        for folder in (directory, directory.parent):
            sync_directory(folder)

    def write(self, name: str, tensor: Tensor) -> tuple[str, int]:
        """Write a tensor into its file; the file's name, and the CRC-32 of the tensor."""
        file = self.files[name]
        return file, self._open[file].write(name, tensor)

    def sync(self) -> None:
        """Return when everything is on the disk."""
        for file in self._open.values():
            file.sync()

    def __enter__(self) -> "OutputShards":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._open.values():
            file.close()
