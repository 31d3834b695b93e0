"""The public verb of a refinement: a pruned checkpoint in, the same with better masks out."""

import logging
import shutil
from collections.abc import Container, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...base.errors import BarberError
from ...base.files import read_json
from ...base.notebook import notebook_table
from ...base.output import check_output, staged
from ...base.ranks import Ranks, all_ranks
from ...checkpoints.card import Step, write_card
from ...checkpoints.names import CONFIG_NAME, REPORT_NAME
from ...checkpoints.pruned import carry_structure
from ...checkpoints.push import Published
from ...checkpoints.record import MaskFile, SparsityConfig, read_record
from ...checkpoints.safetensors import SafetensorsWeights
from ...checkpoints.verify import verify_checkpoint
from ...checkpoints.write import module_sparsity, save_pruned, save_record
from ...models.calls import recomputing
from ...models.device import matrix_products, product_precision, recomputing_contexts, summing_device
from ...models.dtypes import cast_parameters
from ...models.linears import has_routed_experts
from ...models.loading import ModelReference, load_model, load_tokenizer, resolve_model
from ...models.source import ModelSource
from ...models.tool import PretrainedTool
from ...models.wrappers import keep_modes
from ...tensors.masks import PackedMask
from ...text.sources import text_files
from ...text.windows import TokenWindows, windows_for
from ..rebuilders.base import swap_count
from ..trial import Trial
from .settings import RefineConfig
from .steps import refined
from .whole import trial_of
from .windows import check_windows

logger = logging.getLogger(__name__)


@dataclass
class RefineResult(Published):
    """What `refine` did.

    Attributes:
        masks: keep mask of each pruned Linear, packed.
        sparsity_config: the record that goes into `sparsity_config.json`.
        swaps: kept weights that differ between the masks before and after.
        looks: at the windows that measure, before the first step and after every few: the step, the divergence in
            nats a token, the weights exchanged since the look before, the length of steps.
        directory: where the checkpoint was written; None if it was not.
    """

    masks: Mapping[str, PackedMask]
    sparsity_config: SparsityConfig
    swaps: int = 0
    looks: list[dict[str, Any]] = field(default_factory=list)
    directory: Path | None = None

    def _repr_html_(self) -> str:
        title = f"{self.swaps:,} weights exchanged; divergence in nats a token"
        return notebook_table(title, self.looks, ["step", "divergence", "swaps", "length"])

    def as_report(self) -> dict[str, Any]:
        """What `report.json` says of the refinement."""
        return {
            "swaps": self.swaps,
            "divergence_before": self.looks[0]["divergence"],
            "divergence_after": min(look["divergence"] for look in self.looks),
            "looks": self.looks,
        }


class BarberRefiner(PretrainedTool):
    """Refine the masks of a pruned checkpoint by what they do to the model's next token.

    Args:
        model: the dense model that the masks are for, in memory as a whole; `refine` works on it in float32. Then it
            is pruned by the refined masks, in the dtype of the checkpoint if that was written.
        tokenizer: needed for calibration text, and saved with the checkpoint; None where tokens are given.
        reference: where the model was loaded from, if it was.
    """

    @classmethod
    def for_checkpoint(cls, sparse: str | Path, base: str | None = None) -> "BarberRefiner":
        """Load the dense model that a pruned checkpoint says it was made from, or `base`."""
        name = base or read_record(sparse).base_model["name"]
        if name is None:
            raise BarberError(f"{sparse} does not say which dense model it was made from: give it as base")
        reference = resolve_model(name)
        return cls(load_model(reference, "float32"), load_tokenizer(reference), reference)

    @keep_modes
    def refine(
        self,
        sparse: str | Path,
        config: RefineConfig,
        calibration: Sequence[str] | Tensor | TokenWindows | None = None,
        save_dir: str | Path | None = None,
        overwrite: bool = False,
        quiet: bool = False,
        ranks: Ranks | None = None,
    ) -> RefineResult:
        """Refine the masks of a checkpoint and prune the model by them; with `save_dir`, write it.

        Where a `torch.distributed` process group is initialised, all its ranks must call this with the same model and
        arguments: they share the windows, and the first one writes.

        Args:
            sparse: directory of the pruned checkpoint; it stays as it is.
            calibration: texts, token windows (samples, length) int64, or None for `config.calibration`.
            save_dir: where the checkpoint goes; written beside and renamed at the end.
            overwrite: whether `save_dir` may hold something already; it stays until the end.
            quiet: no progress bar.
            ranks: `ranks.ALONE` to work alone though a process group is initialised.

        Raises:
            BarberError: bad input; nothing was written.
        """
        sparse = Path(sparse)
        output = None
        if save_dir is not None:
            output = check_output(save_dir, overwrite, self.inputs(sparse, config))
        device = summing_device(config.device)
        with all_ranks(device, ranks) as together:
            result = self._refined(sparse, output, config, calibration, quiet, together, device)
            together.wait()
        return result

    def _refined(
        self,
        sparse: Path,
        output: Path | None,
        config: RefineConfig,
        calibration: Sequence[str] | Tensor | TokenWindows | None,
        quiet: bool,
        ranks: Ranks,
        device: torch.device,
    ) -> RefineResult:
        """Refine; where there is an output, it is in its place at the end."""
        record = read_record(sparse)
        model = self.model.requires_grad_(False).to(device, torch.float32)
        with ExitStack() as stack:
            source = ModelSource(model.eval())
            products = product_precision(config.precision, source.device, has_routed_experts(source))
            config = config.model_copy(update={"precision": products})
            stack.enter_context(matrix_products(products))
            linears = stack.enter_context(source.computing_by_linears())
            if config.gradient_checkpointing:
                stack.enter_context(recomputing(source.stack, partial(recomputing_contexts, products)))
            trial, windows = self._open(sparse, record, linears, config, calibration, ranks)
            staging = stack.enter_context(staged(output)) if output is not None and ranks.first else None
            before, silent = trial.masks, quiet or not ranks.first or None
            with tqdm(total=config.steps, unit="step", desc="refine", disable=silent) as bar:

                def show(step: int, lowest: float) -> None:
                    bar.set_postfix_str(f"divergence {lowest:.4g}")
                    bar.update()

                trial.masks, looks = refined(trial, before, config, show)
            trial.commit()
            packed = {name: PackedMask.pack(keep) for name, keep in trial.masks.items()}
            swaps = swap_count(before, trial.masks)
            step = _refine_step(config, windows, looks[-1]["step"], swaps)
            modules = {name: module_sparsity(mask, record.modules[name].transposed) for name, mask in packed.items()}
            record = record.model_copy(update={"modules": modules, "steps": [*record.steps, step]})
            result = RefineResult(packed, record, swaps, looks)
            if staging is not None:
                self._save(staging, sparse, result, config)
                result.directory = output
        return result

    def _open(
        self,
        sparse: Path,
        record: SparsityConfig,
        linears: Mapping[str, nn.Linear],
        config: RefineConfig,
        calibration: Sequence[str] | Tensor | TokenWindows | None,
        ranks: Ranks,
    ) -> tuple[Trial, TokenWindows]:
        """The dense model on trial, at the masks of the checkpoint; all ranks must have the same of both."""
        packed = MaskFile(sparse / record.masks)
        pruned = linears_under(self.model, linears, record, SafetensorsWeights.open(sparse), packed)
        windows = windows_for(self.model, self.tokenizer, config.calibration, config.seed, calibration)
        check_windows(windows.tokens, ranks.count)
        settings = config.model_dump(mode="json", exclude={"device"})
        ranks.agree({**settings, "calibration tokens": windows.fingerprint, "masks": record.fingerprint})
        if self.reference is not None:
            record.base_model["name"] = self.reference.full_name
        trial = trial_of(self.model, pruned, windows.tokens, record.sparsity_pattern(), ranks)
        trial.masks = {name: packed[name].unpack().to(linear.weight.device) for name, linear in pruned.items()}
        return trial, windows

    def inputs(self, sparse: Path, config: RefineConfig) -> list[Path]:
        """Files and directories that a run reads, and so must not write."""
        paths = [sparse, *text_files(config.calibration.texts)]
        if self.reference is not None:
            paths.append(self.reference.path)
        return paths

    def _save(self, directory: Path, sparse: Path, result: RefineResult, config: RefineConfig) -> None:
        record = result.sparsity_config
        cast_parameters(self.model, record.base_model["dtype"])
        report = {}
        if (sparse / REPORT_NAME).is_file():
            report = read_json(sparse / REPORT_NAME)
        report["refine"] = result.as_report()
        save_pruned(directory, self.model, record, self.reference)
        save_record(directory, self.tokenizer, self.reference, None, record, result.masks, report)
        if (sparse / CONFIG_NAME).is_file():
            shutil.copyfile(sparse / CONFIG_NAME, directory / CONFIG_NAME)
        carry_structure(sparse, directory, record.steps[-1])
        source = ModelReference(str(sparse), sparse)
        write_card(directory, source, Step("refine", config, record.steps[-1]["calibration"]["source"]))
        for fault in verify_checkpoint(directory).faults:
            raise BarberError(f"the masks do not hold: {fault}; nothing was written")


def _refine_step(config: RefineConfig, windows: TokenWindows, steps_made: int, swaps: int) -> dict[str, Any]:
    return {
        "name": "refine", "steps": config.steps, "steps_made": steps_made, "batch_size": config.batch_size,
        "exchanges": config.exchanges, "shrinkage": config.shrinkage, "precision": config.precision, "swaps": swaps,
        "calibration": windows.as_dict(config.seed),
    }  # fmt: skip


def linears_under(
    model: nn.Module,
    matrices: Mapping[str, nn.Linear],
    record: SparsityConfig,
    weights: SafetensorsWeights,
    masks: Mapping[str, PackedMask],
) -> dict[str, nn.Linear]:
    """The pruned ones of the dense model's matrices; refused is another model, or a checkpoint with other values."""
    linears: dict[str, nn.Linear] = {}
    for name, recorded in record.modules.items():
        linear = matrices.get(name)
        if linear is None or tuple(linear.weight.shape) != recorded.shape:
            raise BarberError(f"base has no Linear {name} of shape {recorded.shape}: it is another model")
        sparse, dense = weights.linear(name, recorded.transposed), linear.weight.detach().cpu()
        keep = masks[name].unpack()
        if masks[name].pruned and not dense[~keep].any():
            raise BarberError(f"base is pruned itself: all of {name} that the masks prune is zero there")
        if not torch.equal(sparse, torch.where(keep, dense, 0).to(sparse.dtype)):
            raise BarberError(
                f"{name} is not the dense model's weight under its mask: refine the masks before weights are changed "
                "(SparseGPT's update, --reconstruct, LoRA, quantization), by the model that they were made from"
            )
        linears[name] = linear
    _check_others(model, weights, linears)
    return linears


def _check_others(model: nn.Module, weights: SafetensorsWeights, pruned: Container[str]) -> None:
    weights.match_names(model)
    for name, parameter in model.state_dict().items():
        for piece in weights.names.of_parameter(name, parameter):
            if piece.tensor not in weights.entries or piece.matrix in pruned:
                continue
            held, dense = weights.tensor(piece.tensor), piece.part_of(parameter)
            if piece.index is not None:
                held, dense = held[piece.index], dense[piece.index]
            if not torch.equal(held, dense.cpu().to(held.dtype)):
                raise BarberError(
                    f"{piece.tensor} differs from the dense model's: refine takes all but masks from that, and would "
                    "lose it"
                )
