"""Running a sweep: one load of the model, one pass for all cells on the same windows, one file a cell."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...base.files import digest, path_digest, write_json
from ...base.notebook import notebook_table
from ...base.output import output_lock
from ...base.ranks import Ranks, all_ranks
from ...checkpoints.write import software
from ...models.device import summing_device
from ...models.loading import ModelReference, resolve_model
from ...shrink.settings import ShrinkConfig
from ..cells import DENSE, CellTable, Record, Teller, check_directory, open_directory, tell_nobody
from ..fingerprint import of_model
from .benchmark import CutBenchmark
from .settings import SweepConfig
from .table import COLUMNS, figures_of, write_results

SWEEP_NAME = "sweep.json"
KIND = (SWEEP_NAME, "sweep")


@dataclass
class SweepResult:
    """The results of a sweep.

    Attributes:
        cells: figures by cell: `dense`, and `SCORER-RATIO-SAMPLES`.
        reused: cells that were measured before under the same settings.
        output: the directory of tables, pictures and cells.
    """

    cells: dict[str, Record]
    reused: list[str]
    output: Path

    def _repr_html_(self) -> str:
        return notebook_table(f"Sweep in {self.output}", figures_of(self.cells), list(COLUMNS))


def run_sweep(
    model: str | Path, config: SweepConfig, output: str | Path, quiet: bool = False, tell: Teller = tell_nobody
) -> SweepResult:
    """Measure every cell that was not measured before, and write tables and pictures of all.

    Where a `torch.distributed` process group is initialised, all its ranks must call this with the same arguments: they
    share the cells.

    Args:
        model: hub id, directory, GGUF file or `installed:PACKAGE`.
        config: the axes and the protocol.
        output: directory of the results; a second run goes on where one was stopped.
        quiet: no progress bars.
        tell: called after each cell with its name, its figures, and whether they are from before.

    Raises:
        BarberError: bad input, before any work; another sweep is at work in the output.
    """
    reference, directory = resolve_model(str(model)), check_directory(str(output), *KIND)
    configs = {f"{cut.scorer}-{cut.remove:g}-{cut.calibration.samples}": cut for cut in config.cells()}
    table = CellTable(directory, _fingerprints(reference, config, configs))
    with all_ranks(summing_device(config.device)) as ranks:
        ranks.agree(table.fingerprints)  # all have looked at the output before the first one writes to it
        return _fill(table, reference, config, configs, quiet or not ranks.first, tell, ranks)


def _fill(
    table: CellTable,
    reference: ModelReference,
    config: SweepConfig,
    configs: dict[str, ShrinkConfig],
    quiet: bool,
    tell: Teller,
    ranks: Ranks,
) -> SweepResult:
    """Measure the cells that are missing, shared among the ranks; the first one writes the tables."""
    directory, earlier, benchmark = table.output, table.read_all(), None
    if len(earlier) < len(table.fingerprints):
        missing = {name: cut for name, cut in configs.items() if name not in earlier}
        benchmark = CutBenchmark(reference, config, missing, quiet)

    def measure(name: str, records: Mapping[str, Record]) -> Record:
        assert benchmark is not None
        results = {known: record["result"] for known, record in records.items()}
        settings = configs[name].model_dump(mode="json") if name in configs else None
        result = benchmark.measure(name, results)
        return {"fingerprint": table.fingerprints[name], "settings": settings, "result": result}

    def tell_result(name: str, record: Record, reused: bool) -> None:
        tell(name, record["result"], reused)

    settings = config.model_dump(mode="json", exclude={"calibration": {"samples"}})
    settings = {"model": reference.full_name, **settings}
    with ExitStack() as stack:
        if ranks.first:
            stack.enter_context(output_lock(open_directory(str(directory), *KIND)))
            write_json(directory / SWEEP_NAME, {**settings, "software": software()})
        records = table.fill(earlier, measure, tell_result, ranks)
        cells = {name: record["result"] for name, record in records.items()}
        if ranks.first:
            write_results(directory, cells, settings)
    return SweepResult(cells, list(earlier), directory)


def _fingerprints(
    reference: ModelReference, config: SweepConfig, configs: Mapping[str, ShrinkConfig]
) -> dict[str, str]:
    """Digest all that decides a cell, the dense model first: model, texts, protocol, and the cell's settings."""
    calibration = config.calibration
    protocol = [config.evaluation, config.windows, calibration.sequence_length, calibration.bos, config.latency]
    texts = [path_digest(name) for name in (config.evaluation, *calibration.texts)]
    device = summing_device(config.device).type
    shared: list[Any] = [of_model(reference.name), protocol, texts, device, config.dtype, calibration.text_field]
    fingerprints = {DENSE: digest(shared)}
    for name, cut in configs.items():
        fingerprints[name] = digest([shared, cut.model_dump(mode="json", exclude={"device"})])
    return fingerprints
