"""The public verb of structured pruning: a causal LM in, a smaller one out, with a record of what stayed."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..base.errors import BarberError
from ..base.fields import parse_arguments
from ..base.files import is_there, write_json
from ..base.notebook import notebook_table
from ..base.output import check_output, staged
from ..checkpoints.card import Step, write_card
from ..checkpoints.carry import save_tokenizer
from ..checkpoints.channel_order import check_order
from ..checkpoints.experts import PrunedExperts
from ..checkpoints.names import EXPERTS_NAME, REPORT_NAME, STRUCTURE_NAME
from ..checkpoints.push import Published
from ..checkpoints.structure import PrunedStructure
from ..checkpoints.write import check_settings, save_model
from ..models.device import summing_device
from ..models.dtypes import check_dtype
from ..models.measure import size_of
from ..models.tool import PretrainedTool
from ..models.wrappers import keep_modes
from ..text.sources import text_files
from ..text.windows import Calibration, TokenWindows, windows_for
from .cut import cut_model
from .cut_errors import mean_contributions
from .experts import EXPERT_SCORERS, describe_removal, plan_removal, remove_experts
from .figures import describe_cut, report_of
from .plan import Cut, plan_cut, reads_text
from .scan import choose_units
from .scorers import as_scorer
from .settings import ShrinkConfig, ShrinkSettings
from .units import Kept


@dataclass
class ShrinkResult(Published):
    """The smaller model, its record (`pruned_structure.json` or `pruned_experts.json`), its report, and its folder."""

    model: Any
    structure: PrunedStructure | PrunedExperts
    report: dict[str, Any]
    directory: Path | None = None

    def _repr_html_(self) -> str:
        rows = []
        for figure, after in self.report["after"].items():
            if isinstance(after, int | float):
                rows.append(
                    {"figure": figure.replace("_", " "), "before": self.report["before"][figure], "after": after}
                )
        return notebook_table(f"A smaller model, in {self.directory or 'memory'}", rows, ["figure", "before", "after"])


def scoring_function(settings: ShrinkSettings) -> Callable[..., Any]:
    """Return the function that scores heads and channels, or experts; refuse names and arguments that nobody knows."""
    if settings.remove_experts is not None:
        return EXPERT_SCORERS[settings.scorer].function
    function = as_scorer(settings.scorer).function
    parse_arguments(function, settings.scorer, settings.scorer_args, "scorer")
    return function


class BarberShrinker(PretrainedTool):
    """Cuts attention heads and FFN channels, or experts, out of a causal LM.

    Args:
        model: a transformers causal LM; its weights stay as they are.
        tokenizer: needed for calibration text, and saved with the model; None where tokens are given.
        reference: where the model was loaded from, if it was.
    """

    @keep_modes
    def shrink(
        self,
        config: ShrinkConfig,
        calibration: Calibration = None,
        save_dir: str | Path | None = None,
        overwrite: bool = False,
        latency: bool = True,
        quiet: bool = False,
        picture: None = None,
    ) -> ShrinkResult:
        """Make the smaller model and, with `save_dir`, write its checkpoint.

        Args:
            config: everything that decides what stays.
            calibration: texts, token windows (samples, length) int64, or None for `config.calibration`.
            save_dir: where the checkpoint goes; written beside and renamed at the end.
            overwrite: whether `save_dir` may hold something already; it stays until the end.
            latency: measure prefill and decode before and after.
            quiet: no progress bar.
            picture: gone since 0.2.0; refused with what replaces it.

        Raises:
            BarberError: bad input; nothing was written.
        """
        if picture is not None:
            raise BarberError("picture is optimum_barber.runs.report.write_report(DIR, 'report') since 0.2.0")
        output = check_output(save_dir, overwrite, self.inputs(config)) if save_dir is not None else None
        if config.dtype != "auto":
            check_dtype(self.model, config.dtype)
            self.model.to(getattr(torch, config.dtype))
        if output is not None:
            check_settings(self.model)
        if config.remove_experts is not None:
            return self._without_experts(config, config.remove_experts, calibration, output, quiet)
        cut = plan_cut(self.model, config)
        if cut.replayed is not None:
            check_order(self.reference, cut.replayed.base_model["name"], f"structure {config.structure}")
        windows = None
        if reads_text(config):
            windows = windows_for(self.model, self.tokenizer, config.calibration, config.seed, calibration)
        with staged(output) if output is not None else nullcontext() as partial:
            result = self._cut(config, cut, windows, latency, quiet)
            if partial is not None:
                self._save(partial, result, STRUCTURE_NAME, config)
                result.directory = output
        return result

    def _save(self, partial: Path, result: ShrinkResult, record: str, config: ShrinkConfig) -> None:
        save_model(partial, result.model, self.reference)
        save_tokenizer(partial, self.tokenizer, self.reference)
        write_json(partial / record, result.structure.model_dump())
        write_json(partial / REPORT_NAME, result.report)
        text = (result.structure.calibration or {}).get("source")
        write_card(partial, self.reference, Step("shrink", config, text))

    def _without_experts(
        self, config: ShrinkConfig, share: float, calibration: Calibration, output: Path | None, quiet: bool
    ) -> ShrinkResult:
        removal = plan_removal(self.model, share, config.scorer, summing_device(config.device))
        windows = None
        tokens = torch.zeros((1, 1), dtype=torch.long)
        if removal.scorer.needs_text:
            windows = windows_for(self.model, self.tokenizer, config.calibration, config.seed, calibration)
            tokens = windows.tokens
        bar = tqdm(total=len(removal.experts), unit="layer", desc=config.scorer, disable=quiet or None)
        with staged(output) if output is not None else nullcontext() as partial, bar:
            small, kept, scores = remove_experts(removal, tokens, config.seed, bar.update)
            small.config.__dict__.pop("sparsity_config", None)  # masks of a larger model
            record = describe_removal(config, removal, kept, scores, windows, self.name)
            report = {"asked": share, "before": size_of(self.model), "after": size_of(small)}
            result = ShrinkResult(small, record, {**report, "experts": record.counts})
            if partial is not None:
                self._save(partial, result, EXPERTS_NAME, config)
                result.directory = output
        return result

    def inputs(self, config: ShrinkConfig) -> list[Path]:
        """Files and directories that a run reads, and so must not write."""
        paths = text_files(config.calibration.texts)
        if config.structure is not None and is_there(config.structure):
            paths.append(Path(config.structure))
        if self.reference:
            paths.append(self.reference.path)
        return paths

    def _cut(
        self, config: ShrinkConfig, cut: Cut, windows: TokenWindows | None, latency: bool, quiet: bool
    ) -> ShrinkResult:
        started = time.perf_counter()
        kept = self._kept(config, cut, windows, quiet)
        scored = time.perf_counter()
        biases = {}
        if config.compensate and windows is not None:
            biases = mean_contributions(cut.source, windows.tokens, kept, cut.units)
        small = cut_model(self.model, cut.config, kept, cut.units, biases)
        seconds = {"score": scored - started, "cut": time.perf_counter() - scored}
        structure = describe_cut(config, cut, kept, windows, self.name)
        small.config.structure_config = {
            "format_version": structure.format_version, "scorer": structure.scorer["name"],
            "removed": structure.removed, "structure_file": STRUCTURE_NAME,
        }  # fmt: skip
        small.config.__dict__.pop("sparsity_config", None)  # masks of a larger model
        report = report_of(config, cut, kept, small, windows, seconds, latency, biases)
        return ShrinkResult(small, structure, report)

    def _kept(self, config: ShrinkConfig, cut: Cut, windows: TokenWindows | None, quiet: bool) -> Kept:
        if cut.replayed is not None:
            return cut.replayed.kept
        tokens = windows.tokens if windows is not None else torch.zeros((1, 1), dtype=torch.long)
        with tqdm(total=len(cut.source), unit="layer", desc=config.scorer, disable=quiet or None) as bar:
            return choose_units(cut.source, tokens, [cut], lambda _: bar.update())[0]
