"""The model of a comparison: loaded once, pruned and measured for every cell, restored in between."""

import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from ...base.errors import BarberError
from ...base.memory import peak_memory, reset_peak_memory
from ...base.ranks import ALONE
from ...checkpoints.record import write_masks
from ...models.device import summing_device
from ...models.loading import load_model, load_tokenizer
from ...models.source import ModelSource, working_copy
from ...prune.plan import make_plan
from ...prune.settings import BarberConfig
from ...prune.sparsifier import BarberSparsifier
from ...text.perplexity import perplexity
from ...text.windows import TokenWindows, windows_for
from ..cells import DENSE, Record
from ..evaluate import evaluation_windows
from ..tasks.evaluate import evaluate_tasks
from .cells import Cell, all_faults, noted
from .plan import ComparePlan


class MaskBenchmark:
    """A model with a copy of its dense weights, the calibration windows of all cells, and the evaluation.

    Raises:
        CompareError: all patterns that do not fit the model and all texts that are too short.
    """

    def __init__(self, plan: ComparePlan, quiet: bool) -> None:
        model, tokenizer = load_model(plan.reference, plan.base.dtype), load_tokenizer(plan.reference)
        calibration, source = plan.base.calibration, ModelSource(model)
        self.plan, self.quiet = plan, quiet
        self.sparsifier = BarberSparsifier(model, tokenizer, plan.reference)
        self.evaluation = evaluation_windows(
            plan.settings.evaluation, tokenizer, model, calibration, plan.settings.windows
        )
        self.windows: dict[tuple[int | None, ...], TokenWindows] = {}
        with all_faults() as faults:
            for cell in plan.cells.values():
                with noted(faults):
                    make_plan(cell.config, source)
                    self.calibration(cell.config)
        self.dense_weights = [(weight, weight.detach().clone()) for weight in source.stack.parameters()]

    def calibration(self, config: BarberConfig) -> TokenWindows:
        """Return the calibration windows of a cell; cells with the same settings share them."""
        key = (config.calibration.samples, config.calibration.sequence_length, config.seed)
        if key not in self.windows:
            model, tokenizer = self.sparsifier.model, self.sparsifier.tokenizer
            self.windows[key] = windows_for(model, tokenizer, config.calibration, config.seed)
        return self.windows[key]

    def measure(self, name: str, records: Mapping[str, Record]) -> Record:
        """Return the record of a cell; bad input that shows only then is its error, without a fingerprint."""
        plan = self.plan
        record: Record = {"name": name, "fingerprint": plan.fingerprints[name]}
        if name == DENSE:
            self._restore()
            return {**record, **self._measures()}
        cell = plan.cells[name]
        record |= {"labels": cell.labels, "config": cell.config.model_dump(mode="json")}
        masks = plan.masks(name) if plan.settings.keep_masks else None
        try:
            return {**record, **self.run(cell, masks), "dense": records[DENSE]["perplexity"]}
        except BarberError as error:
            return {**record, "fingerprint": None, "error": str(error)}

    def run(self, cell: Cell, masks: Path | None = None) -> Record:
        """Prune as the cell says and measure; the masks go to the file `masks`."""
        self._restore()
        windows = self.calibration(cell.config)
        reset_peak_memory()
        started = time.perf_counter()
        result = self.sparsifier.sparsify(cell.config, windows, quiet=self.quiet, ranks=ALONE)
        seconds, peak = time.perf_counter() - started, peak_memory()
        if masks is not None:
            masks.parent.mkdir(exist_ok=True)
            beside = masks.with_name(masks.name + ".partial")
            write_masks(beside, result.masks, result.sparsity_config.pattern)
            beside.replace(masks)
        return {
            "record": result.sparsity_config.model_dump(mode="json"), "report": result.as_report(), "seconds": seconds,
            "peak_memory": peak, **self._measures(),
        }  # fmt: skip

    @torch.no_grad()
    def _restore(self) -> None:
        for weight, dense in self.dense_weights:
            weight.copy_(dense)

    def _measures(self) -> Record:
        settings, base, model = self.plan.settings, self.plan.base, self.sparsifier.model
        device = summing_device(base.device)
        started = time.perf_counter()
        measures: Record = {}
        with working_copy(model, device, torch.float32 if device.type == "cpu" else None):
            measures["perplexity"] = perplexity(model, self.evaluation, self.quiet).as_dict()
            if settings.tasks:
                measures["tasks"] = evaluate_tasks(
                    model, settings.tasks, tokenizer=self.sparsifier.tokenizer, limit=settings.limit,
                    batch_size=settings.task_batch_size, seed=base.seed,
                    quiet=self.quiet or not sys.stderr.isatty(), device=str(device),
                )["results"]  # fmt: skip
        measures["evaluation_seconds"] = time.perf_counter() - started
        return measures
