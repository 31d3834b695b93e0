"""The model of a comparison: loaded once, pruned and measured for every cell, brought back in between."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...base.errors import BarberError
from ...base.memory import peak_memory, reset_peak_memory
from ...checkpoints.record import write_masks
from ...models.device import choose_device
from ...models.loading import ModelReference, load_model, load_tokenizer
from ...models.source import ModelSource
from ...prune.plan import make_plan
from ...prune.settings import BarberConfig
from ...prune.sparsifier import BarberSparsifier
from ...text.perplexity import perplexity
from ...text.sources import read_texts
from ...text.windows import TokenWindows, consecutive_windows, sequence_length, tokenize, windows_for
from .cells import Cell, CompareError
from .settings import CompareSettings


@dataclass
class Bench:
    """A model with its dense weights put by, the calibration sets of all cells, and the evaluation.

    Attributes:
        sparsifier: the model and its tokenizer.
        settings: of the comparison.
        base: what all cells have in common.
        evaluation: token windows for perplexity.
        quiet: no progress bars.
    """

    sparsifier: BarberSparsifier
    settings: CompareSettings
    base: BarberConfig
    evaluation: TokenWindows
    quiet: bool = False
    _stack: nn.Module | None = None
    _weights: dict[str, Tensor] = field(default_factory=dict)
    _windows: dict[str, TokenWindows] = field(default_factory=dict)

    @classmethod
    def open(
        cls, reference: ModelReference, settings: CompareSettings, base: BarberConfig, cells: list[Cell], quiet: bool
    ) -> "Bench":
        """Load the model and the texts, and check every cell against them.

        Raises:
            CompareError: patterns that do not fit, texts that are too short; every fault, before any work.
        """
        model, tokenizer = load_model(reference, base.dtype), load_tokenizer(reference)
        length = sequence_length(model.config, base.calibration.sequence_length)
        text = tokenize(read_texts(settings.evaluation, "evaluation", base.calibration.text_field), tokenizer)
        windows = consecutive_windows(text, length, settings.windows, settings.evaluation)
        bench = cls(BarberSparsifier(model, tokenizer, reference), settings, base, windows, quiet)
        source, faults = ModelSource(model), []
        for cell in cells:
            try:
                make_plan(cell.config, source)
                bench.calibration(cell.config)
            except BarberError as error:
                faults.append(str(error))
        if faults:
            raise CompareError(faults)
        bench._stack = source.stack
        bench._weights = {name: weight.detach().clone() for name, weight in source.stack.named_parameters()}
        return bench

    def calibration(self, config: BarberConfig) -> TokenWindows:
        """The calibration windows of a cell; cells with the same settings have the very same ones."""
        key = f"{config.calibration.samples} {config.calibration.sequence_length} {config.seed}"
        if key not in self._windows:
            self._windows[key] = windows_for(self.sparsifier.model, self.sparsifier.tokenizer, config, None)
        return self._windows[key]

    def dense(self) -> dict[str, Any]:
        """The measures of the dense model."""
        self._restore()
        return self._measured()

    def run(self, cell: Cell, masks: Path | None = None) -> dict[str, Any]:
        """Prune as the cell says and measure; with `masks` its masks are written there."""
        self._restore()
        windows = self.calibration(cell.config)
        reset_peak_memory()
        started = time.perf_counter()
        result = self.sparsifier.sparsify(cell.config, windows, quiet=self.quiet)
        seconds, peak = time.perf_counter() - started, peak_memory()
        if masks is not None:
            beside = masks.with_name(masks.name + ".partial")
            write_masks(beside, result.masks, result.sparsity_config.pattern)
            beside.replace(masks)
        return {
            "record": result.sparsity_config.model_dump(mode="json"), "report": result.as_report(), "seconds": seconds,
            "peak_memory": peak, **self._measured(),
        }  # fmt: skip

    @torch.no_grad()
    def _restore(self) -> None:
        """Bring the dense weights back."""
        for name, weight in self._stack.named_parameters() if self._stack is not None else ():
            weight.copy_(self._weights[name])

    def _measured(self) -> dict[str, Any]:
        """Perplexity and tasks of the model as it stands."""
        device, model = choose_device(self.base.device), self.sparsifier.model
        found: dict[str, Any] = {}
        started = time.perf_counter()
        with computing(model, device, torch.float32 if device.type == "cpu" else None):
            found["perplexity"] = asdict(perplexity(model, self.evaluation, self.quiet))
            if self.settings.tasks:
                from optimum_barber.integrations.lm_eval.run import evaluate_tasks

                found["tasks"] = evaluate_tasks(
                    model, self.settings.tasks, tokenizer=self.sparsifier.tokenizer, limit=self.settings.limit,
                    batch_size=self.settings.task_batch_size,
                    seed=self.base.seed, quiet=self.quiet or not sys.stderr.isatty(), device=str(device),
                )["results"]  # fmt: skip
        return {**found, "evaluation_seconds": time.perf_counter() - started}


@contextmanager
def computing(model: nn.Module, device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
    """Inside, the parameters are on `device` in `dtype` (None: as they are); buffers keep their precision."""
    home = next(model.parameters()).device
    before = [(parameter, parameter.dtype) for parameter in model.parameters()]
    for parameter, own in before:
        parameter.data = parameter.data.to(device, dtype or own)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    try:
        yield
    finally:
        for parameter, own in before:
            parameter.data = parameter.data.to(home, own)
        for buffer in model.buffers():
            buffer.data = buffer.data.to(home)
