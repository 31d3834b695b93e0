"""The public verb: a causal LM in, a pruned checkpoint with masks, config and report out."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn, Self

import torch
from tqdm.auto import tqdm

from ..base.errors import BarberError
from ..base.output import check_output, staged, wait_for
from ..base.ranks import Ranks, all_ranks
from ..checkpoints.card import Step, write_card
from ..checkpoints.pruned import carry_structure
from ..checkpoints.record import MaskFile, read_record
from ..checkpoints.verify import verify_checkpoint
from ..checkpoints.write import check_masks, check_settings, save_configs, save_pruned, save_record
from ..models.device import matrix_products, summing_device
from ..models.dtypes import cast_parameters
from ..models.linears import matrices_of_model, prunable
from ..models.loading import ModelReference, load_model, load_tokenizer, resolve_model
from ..models.source import ModelSource
from ..models.wrappers import causal_lm, default_torch, same_modes
from ..tensors.budget import Shares, patterns_of
from ..tensors.masks import PackedMask
from ..text.sources import text_files
from ..text.windows import Calibration, windows_for
from .allocations import Budget, share_out
from .describe import SparsifyResult, check_error, describe
from .mask_sources import check_mask_orders, mask_paths
from .pipeline import BlockReport, prune
from .plan import Run, make_plan, precision_for
from .settings import BarberConfig
from .streaming.disk import DiskCheckpoint, DiskSource
from .streaming.fit import fitting_needs, preview
from .streaming.progress import Progress, open_progress, result_settings

Callback = Callable[[BlockReport], None]
STREAM = ("auto", "always", "never")


class BarberSparsifier:
    """Prunes a causal LM and rebuilds its masks, in memory or from disk to disk: the masks are the same.

    From disk to disk one decoder layer is in memory at a time, and a stopped run can be resumed.

    Args:
        model: a transformers causal LM, compiled or not, changed in place by `sparsify`; None to open the one at
            `reference`.
        tokenizer: needed for calibration text, and saved with the model; None where tokens are given.
        reference: where the model lies, or was loaded from; None for one that never lay on the disk.
        dtype: of the result, where the model is opened; auto keeps the checkpoint's, float16 for GGUF.
        stream: where the model is opened, `auto` prunes from disk to disk if the files allow it and `sparsify` has a
            `save_dir`, and loads the whole model otherwise; `always` refuses to load it; `never` loads it.

    Raises:
        BarberError: the files are damaged, or cannot be streamed and must be.
    """

    def __init__(
        self,
        model: Any = None,
        tokenizer: Any = None,
        reference: ModelReference | None = None,
        dtype: str = "auto",
        stream: str = "auto",
    ) -> None:
        if stream not in STREAM:
            raise BarberError(f"stream {stream!r} is not legal: {', '.join(STREAM)}")
        self.tokenizer = tokenizer
        self.reference = reference
        self._model = causal_lm(model) if model is not None else None
        self._location = reference
        self._dtype, self._stream = dtype, stream
        self._checkpoint: DiskCheckpoint | None = None
        self._obstacle: str | None = "it is in memory" if model is not None else "--stream never"
        if model is None and reference is not None and stream != "never":
            checkpoint = DiskCheckpoint.open(reference, dtype)
            self._obstacle = checkpoint.obstacle
            self._checkpoint = checkpoint if checkpoint.obstacle is None else None
        if stream == "always":
            self._streamable("--stream always")

    @classmethod
    def from_pretrained(cls, model: str | Path | ModelReference, dtype: str = "auto", stream: str = "auto") -> Self:
        """Open a hub id, a directory, a GGUF file or `installed:PACKAGE` with its tokenizer; no weight is read yet.

        Raises:
            BarberError: there is no such model, it is damaged, or it cannot be streamed and must be.
        """
        reference = resolve_model(model)
        sparsifier = cls(None, None, reference, dtype, stream)
        sparsifier.tokenizer = load_tokenizer(reference)
        return sparsifier

    @staticmethod
    def stream(*_: Any, **__: Any) -> NoReturn:
        """Answer a call that 0.1.0 had by the one that took its place."""
        raise BarberError("BarberSparsifier.stream is from_pretrained(MODEL, stream='always') since 0.2.0")

    @property
    def model(self) -> Any:
        """The causal LM; after `sparsify` the pruned one. It is loaded when first asked for, and stays in memory."""
        if self._model is None and self._location is not None:
            self._model = load_model(self._location, self._dtype)
            self._checkpoint, self._obstacle = None, "it is in memory"
        return self._model

    @default_torch()
    def sparsify(
        self,
        config: BarberConfig,
        calibration: Calibration = None,
        save_dir: str | Path | None = None,
        overwrite: bool = False,
        callbacks: Sequence[Callback] = (),
        quiet: bool = False,
        ranks: Ranks | None = None,
        *,
        resume: bool = False,
        activations: str = "auto",
    ) -> SparsifyResult:
        """Prune the model; with `save_dir` write the checkpoint.

        Where a `torch.distributed` process group is initialised, all its ranks must call this with the same model and
        arguments: they share the samples, and the first one writes.

        Args:
            config: everything that decides the masks.
            calibration: texts, token windows (samples, length) int64, or None for `config.calibration`.
            save_dir: where the checkpoint goes; made in `save_dir.partial` and renamed at the end.
            overwrite: replace what `save_dir` holds, at the very end; a stopped run for it is thrown away.
            callbacks: called with each block's report, on every rank.
            quiet: no progress bar.
            ranks: `ranks.ALONE` to work alone though a process group is initialised.
            resume: go on with a stopped run of the same settings, if there is one; from disk to disk only.
            activations: where calibration activations lie: memory, disk (from disk to disk only), or auto.

        Raises:
            BarberError: bad input, or what the machine has not; nothing was written, and no weight in memory has
                changed unless a producer or a block failed half-way.
            UnfinishedError: the disk or the device's memory is full, or another rank has ended; what is done is kept.
        """
        checkpoint = self._streamed(save_dir, resume, activations)
        output = check_output(save_dir, overwrite, self.inputs(config), resume) if save_dir is not None else None
        device = summing_device(config.device)
        with all_ranks(device, ranks) as together:
            if checkpoint is None or output is None:
                with same_modes(causal_lm(self.model)):
                    run = self._checked_run(config, ModelSource(self.model, device), calibration, together)
                    return self._prune_in_memory(run, output, callbacks, quiet)
            source = DiskSource(checkpoint, device)
            run = self._checked_run(config, source, calibration, together)
            needs = fitting_needs(checkpoint, run, activations, output)
            settings = result_settings(run, self.inputs(config))
            with open_progress(output, resume, settings, together, source.disk.layout, checkpoint.written) as progress:
                run.plan.batch_size = needs.batch_size
                run.plan.scratch = progress.directory if needs.place == "disk" else None
                self._prune_on_disk(run, source, progress, callbacks, quiet)
            together.wait()
        record = read_record(wait_for(output))
        self._location, self._dtype = ModelReference(str(output), output), "auto"
        return SparsifyResult(MaskFile(output / record.masks), record, progress.reports, progress.shares, output)

    @default_torch()
    def preview(self, config: BarberConfig, save_dir: str | Path, activations: str = "auto") -> str:
        """What a run from disk to disk would take, as a page; everything is checked, nothing is written.

        Raises:
            BarberError: bad input, what the machine has not, or a model that cannot be streamed.
        """
        checkpoint, device = self._streamable("--dry-run"), summing_device(config.device)
        with all_ranks(device) as together:
            run = self._checked_run(config, DiskSource(checkpoint, device), None, together)
            return preview(checkpoint, run, activations, Path(save_dir).expanduser().resolve())

    def inputs(self, config: BarberConfig) -> list[Path]:
        """Files and directories that a run reads, and so must not write."""
        paths = mask_paths(config) + text_files(config.calibration.texts)
        if self.reference:
            paths.append(self.reference.path)
        return paths

    def _streamed(self, save_dir: str | Path | None, resume: bool, activations: str) -> DiskCheckpoint | None:
        """The checkpoint to prune from disk to disk; None where the model is pruned in memory."""
        requests = {"--stream always": self._stream == "always"}
        requests |= {"--resume": resume, "--activations disk": activations == "disk"}
        for flag, requested in requests.items():
            if requested:
                self._streamable(flag)
                if save_dir is None:
                    raise BarberError("streaming writes as it goes: save_dir is missing")
        return self._checkpoint if save_dir is not None else None

    def _streamable(self, flag: str) -> DiskCheckpoint:
        """The checkpoint, which `flag` needs to be one whose layers can be read one by one."""
        if self._checkpoint is None:
            name = self.reference.name if self.reference else type(self._model).__name__
            raise BarberError(f"{flag} needs streaming, which is not to be had for {name}: {self._obstacle}")
        return self._checkpoint

    def _checked_run(self, config: BarberConfig, source: ModelSource, calibration: Calibration, ranks: Ranks) -> Run:
        """Check everything that can be checked before work; all ranks must have the same, and a sample each."""
        config = config.model_copy(update={"precision": precision_for(config, source)})
        cast_parameters(source.model, config.dtype)
        plan = make_plan(config, source, ranks)
        check_mask_orders(config, self.reference)
        windows = windows_for(source.model, self.tokenizer, config.calibration, config.seed, calibration)
        ranks.share(len(windows.tokens))
        if ranks.count > 1:
            settings = config.model_dump(mode="json", exclude={"device", "batch_size"})
            ranks.agree({**settings, "calibration tokens": windows.fingerprint})
        name = self.reference.full_name if self.reference else getattr(source.model.config, "name_or_path", "") or None
        return Run(config.under(plan.pattern, plan.exact), source, plan, windows, name)

    def _prune_in_memory(
        self, run: Run, output: Path | None, callbacks: Sequence[Callback], quiet: bool
    ) -> SparsifyResult:
        """Change the model in place; the first rank writes it, if there is an output directory."""
        reports: list[BlockReport] = []
        if output is not None:
            check_settings(self.model)
        with staged(output) if output is not None and run.plan.ranks.first else nullcontext() as partial:
            shares = _share_sparsity(run, quiet)
            masks = _prune_layers(run, reports, callbacks, quiet)
            weights = {name: linear.weight for name, linear in matrices_of_model(run.source).items()}
            check_masks(weights, masks, run.plan.pattern)
            result = SparsifyResult(masks, describe(run, masks, shares), reports, shares)
            if partial is not None:
                save_pruned(partial, self.model, result.sparsity_config, self.reference)
                self._save_rest(partial, run, result)
                result.directory = output
        run.plan.ranks.wait()
        return result

    def _prune_on_disk(
        self, run: Run, source: DiskSource, progress: Progress, callbacks: Sequence[Callback], quiet: bool
    ) -> None:
        """Commit layer by layer; then the first rank writes everything else and checks the whole checkpoint."""
        source.progress = progress
        shares = progress.shares = _share_sparsity(run, quiet, progress.shares)
        _prune_layers(run, progress.reports, callbacks, quiet)
        if not run.plan.ranks.first:
            return
        for name in source.names_outside_layers():
            progress.output.write(name, source.disk.tensor(name))
        progress.check()
        masks, partial = progress.masks(), progress.directory.parent
        result = SparsifyResult(masks, describe(run, masks, shares), progress.reports, shares)
        record, size = result.sparsity_config, progress.output.bytes
        save_configs(partial, source.model, record, self.reference, source.disk.layout, size)
        self._save_rest(partial, run, result)
        for fault in verify_checkpoint(partial).faults:
            raise BarberError(f"the masks do not hold: {fault}; nothing was written")
        progress.discard()

    def _save_rest(self, directory: Path, run: Run, result: SparsifyResult) -> None:
        settings = run.config.model_dump(mode="json")
        record, report = result.sparsity_config, result.as_report()
        save_record(directory, self.tokenizer, self.reference, settings, record, result.masks, report)
        if self.reference:
            step = {"name": "prune", "producer": run.config.producer_name}
            carry_structure(self.reference.directory, directory, step)
        write_card(directory, self.reference, Step("prune", run.config, run.windows.source))


def _share_sparsity(run: Run, quiet: bool, shares: Shares | None = None) -> Shares:
    """Share the sparsity out over the blocks, unless `shares` are known, and put it into the plan."""
    config, plan = run.config, run.plan
    sizes, target = prunable(run.source, config.ignore), plan.pattern.sparsity
    if shares is None:
        weights = {block: sum(linears.values()) for block, linears in sizes.items()}
        budget = Budget(target, weights, run.source, run.windows.tokens, plan, quiet or not plan.ranks.first)
        with matrix_products(config.precision):
            shares = share_out(config.allocation, config.allocation_args, budget)
        agreed = plan.ranks.broadcast(torch.tensor(list(shares.sparsity.values()), dtype=torch.float64))
        shares.sparsity = dict(zip(shares.sparsity, agreed.tolist(), strict=True))
    plan.patterns = patterns_of(shares.sparsity, sizes, target)
    return shares


def _prune_layers(
    run: Run, reports: list[BlockReport], callbacks: Sequence[Callback], quiet: bool
) -> dict[str, PackedMask]:
    """Prune the layers that are not done, behind a progress bar; each block's report is added to `reports`."""
    blocks = 2 * len(run.source)
    hidden = quiet or not run.plan.ranks.first or None
    with tqdm(total=blocks, initial=len(reports), unit="block", desc=run.config.producer_name, disable=hidden) as bar:

        def finish(report: BlockReport) -> None:
            check_error(report)
            reports.append(report)
            bar.set_postfix_str(f"{report.block} E {report.error_before:.4g} -> {report.error_after:.4g}")
            bar.update()
            for callback in callbacks:
                callback(report)

        with matrix_products(run.config.precision):
            return prune(run.source, run.windows.tokens, run.plan, finish)
