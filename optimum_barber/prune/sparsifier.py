"""The public verb: a causal LM in, a pruned checkpoint with masks, config and report out."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..base.files import is_there
from ..base.output import check_output, staged
from ..base.rank_group import all_ranks
from ..base.ranks import ALONE, Ranks
from ..checkpoints.pruned import carry_structure
from ..checkpoints.record import SparsityConfig
from ..checkpoints.write import check_masks, save_checkpoint
from ..models.device import choose_device, matrix_products
from ..models.linears import prunable
from ..models.loading import PretrainedTool
from ..models.source import ModelSource
from ..tensors.budget import Shares, patterns_of
from ..tensors.masks import PackedMask
from ..text.windows import TokenWindows, windows_for
from .allocations import Budget, share_out
from .describe import describe
from .pipeline import BlockReport, Plan, prune
from .plan import check_ranks, make_plan
from .settings import BarberConfig

if TYPE_CHECKING:
    from .streaming.sparsifier import StreamingSparsifier

Callback = Callable[[BlockReport], None]


@dataclass
class SparsifyResult:
    """What `sparsify` did.

    Attributes:
        masks: keep mask of each pruned Linear, packed; `.unpack()` gives the bool tensor.
        sparsity_config: the record that goes into `sparsity_config.json`.
        reports: one a block, in the order of computation.
        shares: how the sparsity was shared out over the blocks.
    """

    masks: Mapping[str, PackedMask]
    sparsity_config: SparsityConfig
    reports: list[BlockReport] = field(default_factory=list)
    shares: Shares | None = None

    def as_report(self) -> dict[str, Any]:
        """The content of `report.json`: totals, and every block."""
        blocks = [asdict(report) for report in self.reports]
        totals = {
            key: sum(block[key] for block in blocks)
            for key in ("error_before", "error_after", "pairs", "swaps", "rows", "rows_without_swap", "seconds")
        }
        peak = max((report.peak_memory for report in self.reports), default=0)
        allocation = asdict(self.shares) if self.shares and self.sparsity_config.allocation else None
        sparsity = self.sparsity_config.sparsity
        return {"sparsity": sparsity, **totals, "peak_memory": peak, "allocation": allocation, "blocks": blocks}


class BarberSparsifier(PretrainedTool):
    """Prunes a causal LM and rebuilds its masks.

    Args:
        model: a transformers causal LM, changed in place by `sparsify`.
        tokenizer: needed for calibration text, and saved with the model; None where tokens are given.
        reference: where the model was loaded from, if it was.
    """

    def sparsify(
        self,
        config: BarberConfig,
        calibration: Sequence[str] | Tensor | TokenWindows | None = None,
        save_dir: str | Path | None = None,
        overwrite: bool = False,
        callbacks: Sequence[Callback] = (),
        quiet: bool = False,
        ranks: Ranks | None = None,
    ) -> SparsifyResult:
        """Prune the model in place and, with `save_dir`, write the checkpoint.

        Where a `torch.distributed` process group is initialised, all its ranks must call this with the same model and
        arguments: they share the samples, and the first one writes.

        Args:
            config: everything that decides the masks.
            calibration: texts, token windows (samples, length) int64, or None for `config.calibration`.
            save_dir: where the checkpoint goes; written beside and renamed at the end.
            overwrite: whether `save_dir` may hold something already; it stays until the end.
            callbacks: called with each block's report, on every rank.
            quiet: no progress bar.
            ranks: `ranks.ALONE` to work alone though a process group is initialised.

        Raises:
            BarberError: bad input; nothing was written. No weight has changed either, unless it is a producer
                that fails half-way.
        """
        output = check_output(save_dir, overwrite, self.inputs(config)) if save_dir is not None else None
        with all_ranks(choose_device(config.device), ranks) as together:
            source, plan, windows = self.plan(config, calibration, together)
            config = config.under(plan.pattern, plan.exact)
            with staged(output) if output is not None and together.first else nullcontext() as partial:
                shares = self._share_out(config, source, plan, windows, quiet)
                masks, reports = self._prune(config, source, plan, windows, callbacks, quiet)
                result = self._result(config, source, plan, windows, masks, reports, shares)
                check_masks(self.model, result.masks, plan.pattern)
                if partial is not None:
                    self._save(partial, config, result)
            together.wait()
        return result

    def plan(
        self,
        config: BarberConfig,
        calibration: Sequence[str] | Tensor | TokenWindows | None = None,
        ranks: Ranks = ALONE,
    ) -> tuple[ModelSource, Plan, TokenWindows]:
        """Everything checked that can be checked before work, on all ranks."""
        self._cast(config.dtype)
        source = self._source(choose_device(config.device))
        plan = make_plan(config, source, ranks)
        windows = windows_for(self.model, self.tokenizer, config, calibration)
        check_ranks(ranks, config, windows)
        return source, plan, windows

    def _source(self, device: torch.device) -> ModelSource:
        return ModelSource(self.model, device)

    def _save(self, directory: Path, config: BarberConfig, result: SparsifyResult) -> None:
        shard = self.reference.shard_bytes if self.reference else None
        record, report = result.sparsity_config, result.as_report()
        settings = config.model_dump(mode="json")
        save_checkpoint(
            directory, self.model, self.tokenizer, settings, record, result.masks, report, shard_bytes=shard
        )
        if self.reference:
            step = {"name": "prune", "producer": config.producer_name}
            carry_structure(self.reference.directory, directory, step)

    @staticmethod
    def stream(model: str | Path) -> "StreamingSparsifier":
        """The same from disk to disk, with no more than a decoder layer of the model in memory."""
        from .streaming.sparsifier import StreamingSparsifier

        return StreamingSparsifier.from_pretrained(model)

    def inputs(self, config: BarberConfig) -> list[Path]:
        """Files and directories that a run reads, and so must not write."""
        named = [config.producer_args.get(key) for key in ("sparse_model", "masks")]
        paths = [Path(str(name)) for name in (*named, *config.calibration.texts) if name is not None]
        return [path for path in paths if is_there(path)] + ([self.reference.path] if self.reference else [])

    def _share_out(
        self,
        config: BarberConfig,
        source: ModelSource,
        plan: Plan,
        windows: TokenWindows,
        quiet: bool,
        known: Shares | None = None,
    ) -> Shares:
        """The blocks' shares of the sparsity, those `known` if there are any; the plan has them from now on."""
        sizes, target = prunable(source, config.ignore), plan.pattern.sparsity
        if known is None:
            weights = {block: sum(linears.values()) for block, linears in sizes.items()}
            budget = Budget(target, weights, source, windows.tokens, plan, quiet or not plan.ranks.first)
            with matrix_products(config.precision):
                known = share_out(config.allocation, config.allocation_args, budget)
            agreed = plan.ranks.broadcast(torch.tensor(list(known.sparsity.values()), dtype=torch.float64))
            known.sparsity = dict(zip(known.sparsity, agreed.tolist(), strict=True))
        plan.patterns = patterns_of(known.sparsity, sizes, target)
        return known

    def _prune(
        self,
        config: BarberConfig,
        source: ModelSource,
        plan: Plan,
        windows: TokenWindows,
        callbacks: Sequence[Callback],
        quiet: bool,
        earlier: Sequence[BlockReport] = (),
    ) -> tuple[dict[str, PackedMask], list[BlockReport]]:
        """The masks that this run made, and all reports behind the `earlier` ones of a run that it resumes."""
        reports = list(earlier)
        blocks, done = 2 * len(source), len(reports)
        hidden = quiet or not plan.ranks.first or None
        with tqdm(total=blocks, initial=done, unit="block", desc=config.producer_name, disable=hidden) as bar:

            def finished(report: BlockReport) -> None:
                reports.append(report)
                bar.set_postfix_str(f"{report.block} E {report.error_before:.4g} -> {report.error_after:.4g}")
                bar.update()
                for callback in callbacks:
                    callback(report)

            with matrix_products(config.precision):
                masks = prune(source, windows.tokens, plan, finished)
        return masks, reports

    def _result(
        self,
        config: BarberConfig,
        source: ModelSource,
        plan: Plan,
        windows: TokenWindows,
        masks: Mapping[str, PackedMask],
        reports: list[BlockReport],
        shares: Shares,
    ) -> SparsifyResult:
        name = self.reference.full_name if self.reference else getattr(self.model.config, "name_or_path", "") or None
        return SparsifyResult(masks, describe(config, plan, source, windows, masks, name, shares), reports, shares)
