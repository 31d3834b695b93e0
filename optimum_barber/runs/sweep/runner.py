"""Running a sweep: one load of the model, one pass for all that look at the same windows, one file a cell."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...base.files import write_json
from ...base.output import output_lock
from ...checkpoints.write import software
from ...models.device import choose_device
from ...models.loading import ModelReference, load_config, resolve_model
from ...models.measure import latency, macs_per_token, size_of
from ...models.source import working_copy
from ...shrink.cut import cut_model
from ...shrink.figures import describe_cut, prompt_of, report_of
from ...shrink.plan import Cut, plan_cut
from ...shrink.scan import Kept, choose_units
from ...shrink.shrinker import BarberShrinker, score_plan
from ...text.perplexity import perplexity
from ...text.sources import read_texts
from ...text.windows import TokenWindows, consecutive_windows, sequence_length, tokenize, windows_for
from ..recipe.directory import check_output, open_output
from .cells import Cell, cells_of
from .settings import SweepConfig
from .table import write_results

SWEEP_NAME = "sweep.json"
Result = dict[str, Any]
Teller = Callable[[str, Result, bool], None]


@dataclass
class SweepResult:
    """What a sweep found.

    Attributes:
        cells: figures by cell: `dense`, and `SCORER-RATIO-SAMPLES`.
        reused: cells that were measured before under the same settings.
        output: the directory of tables, pictures and cells.
    """

    cells: dict[str, Result]
    reused: list[str]
    output: Path


def run_sweep(
    model: str | Path,
    config: SweepConfig,
    output: str | Path,
    quiet: bool = False,
    tell: Teller = lambda name, result, reused: None,
) -> SweepResult:
    """Measure every cell that was not measured before, and write tables and pictures of all.

    Args:
        model: hub id, directory, GGUF file or `installed:PACKAGE`.
        config: the axes and the protocol.
        output: directory of the results; a second run goes on where one was stopped.
        quiet: no progress bars.
        tell: called after each cell with its name, its figures, and whether they are from before.

    Raises:
        BarberError: bad input, before any work; another sweep is at work in the output.
    """
    reference, mark = resolve_model(str(model)), (SWEEP_NAME, "sweep")
    directory = check_output(str(output), *mark)
    cells = cells_of(config, reference)
    found = {cell.name: result for cell in cells if (result := cell.result(directory)) is not None}
    missing, reused = [cell for cell in cells if cell.name not in found], list(found)
    bench = Bench.load(reference, config, quiet) if missing else None
    cuts = {cell.name: plan_cut(bench.shrinker.model, cell.config) for cell in missing if bench and cell.config}
    settings = settings_of(config, reference)
    with output_lock(open_output(str(output), *mark)):
        write_json(directory / SWEEP_NAME, {**settings, "software": software()})
        for name in reused:
            tell(name, found[name], True)
        for cell, result in bench.measure_all(missing, cuts, found) if bench else ():
            cell.put(directory, result)
            found[cell.name] = result
            tell(cell.name, result, False)
        ordered = {cell.name: found[cell.name] for cell in cells}
        write_results(directory, ordered, settings)
    return SweepResult(ordered, reused, directory)


def settings_of(config: SweepConfig, reference: ModelReference) -> dict[str, Any]:
    """The sweep's settings, with its model."""
    return {"model": reference.full_name, **config.model_dump(mode="json", exclude={"calibration": {"samples"}})}


@dataclass
class Bench:
    """The dense model and what is measured on it and on what is cut out of it.

    Attributes:
        shrinker: holds model and tokenizer.
        evaluation: windows for the perplexity.
        config: of the sweep.
        device: where models run.
        dtype: of their weights while they do.
        quiet: no progress bars.
    """

    shrinker: BarberShrinker
    evaluation: TokenWindows
    config: SweepConfig
    device: torch.device
    dtype: torch.dtype
    quiet: bool

    @classmethod
    def load(cls, reference: ModelReference, config: SweepConfig, quiet: bool) -> "Bench":
        """Load the model and read the evaluation text."""
        device = choose_device(config.device)
        sequence_length(load_config(reference), config.calibration.sequence_length)
        shrinker = BarberShrinker.from_pretrained(reference.name, config.dtype)
        length = sequence_length(shrinker.model.config, config.calibration.sequence_length)
        text = tokenize(read_texts(config.evaluation, "evaluation", config.calibration.text_field), shrinker.tokenizer)
        windows = consecutive_windows(text, length, config.windows, config.evaluation)
        dtype = torch.float32 if device.type == "cpu" else next(shrinker.model.parameters()).dtype
        return cls(shrinker, windows, config, device, dtype, quiet)

    def measure_all(
        self, cells: Sequence[Cell], cuts: dict[str, Cut], found: dict[str, Result]
    ) -> Iterator[tuple[Cell, Result]]:
        """The figures of each cell; `found` grows meanwhile with what was given."""
        for cell in cells:
            if cell.config is None:
                yield cell, self.dense()
        for samples in dict.fromkeys(cell.config.calibration.samples for cell in cells if cell.config):
            batch = [cell for cell in cells if cell.config and cell.config.calibration.samples == samples]
            windows, chosen = self.choose(batch, cuts)
            for cell, kept in zip(batch, chosen, strict=True):
                yield cell, self.measure(cell, cuts[cell.name], kept, windows, found)

    def choose(self, cells: Sequence[Cell], cuts: dict[str, Cut]) -> tuple[TokenWindows, list[Kept]]:
        """The calibration windows of cells that share them, and what stays in each."""
        configs = [cell.config for cell in cells if cell.config]
        windows = windows_for(self.shrinker.model, self.shrinker.tokenizer, configs[0], None)
        plans = [score_plan(cell.config, cuts[cell.name]) for cell in cells if cell.config]
        return windows, choose_units(cuts[cells[0].name].source, windows.tokens, plans)

    def dense(self) -> Result:
        """Size, cost and perplexity of the dense model."""
        model = self.shrinker.model
        prompt = prompt_of(model.config)
        sizes: Result = {**size_of(model), "macs_per_token": macs_per_token(model.config, prompt)}
        with working_copy(model, self.device, self.dtype):
            if self.config.latency:
                sizes["latency"] = latency(model, prompt)
            return {"after": sizes, "perplexity": perplexity(model, self.evaluation, self.quiet).as_dict()}

    def measure(self, cell: Cell, cut: Cut, kept: Kept, windows: TokenWindows, found: dict[str, Result]) -> Result:
        """Size, cost, errors and perplexity of what a cut leaves; the same cut or shape is not measured twice."""
        assert cell.config is not None
        axes = {"scorer": cell.config.scorer, "samples": cell.config.calibration.samples, "asked": cell.config.remove}
        structure = describe_cut(cell.config, cut, kept, windows, self.shrinker.name)
        twin = next((r for r in found.values() if r.get("structure_fingerprint") == structure.fingerprint), None)
        if twin is not None:
            return {**twin, **axes}
        small = cut_model(self.shrinker.model, cut.config, kept, cut.units)
        alike = next((r for r in found.values() if of_shape(r, cut)), None)
        result = report_of(cell.config, cut, kept, small, windows, {}, self.config.latency and alike is None)
        if self.config.latency and alike:
            for state in ("before", "after"):
                result[state]["latency"] = alike[state]["latency"]
        with working_copy(small, self.device, self.dtype):
            result["perplexity"] = perplexity(small, self.evaluation, self.quiet).as_dict()
        return {**result, **axes, "structure_fingerprint": structure.fingerprint}


def of_shape(result: Result, cut: Cut) -> bool:
    """Whether a cell's model has the heads and channels that a cut leaves."""
    return all(
        result.get(kind, {}).get("after") == cut.budget.kept[kind] * units.heads for kind, units in cut.units.items()
    )
