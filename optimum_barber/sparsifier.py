"""The public verb: a causal LM in, a pruned checkpoint with masks, config and report out."""

import importlib.metadata
import logging
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .architectures import linears_of
from .artifacts import (
    MASKS_NAME,
    REPORT_NAME,
    SPARSITY_NAME,
    ModuleSparsity,
    SparsityConfig,
    check_output,
    staged,
    write_json,
    write_masks,
)
from .calibration import TokenWindows, calibration_windows, random_windows, sequence_length, tokenize
from .config import BarberConfig
from .errors import BarberError
from .loading import ModelReference, load_model, load_tokenizer, resolve_model
from .masks import PackedMask
from .patterns import SparsityPattern
from .pipeline import BlockReport, Plan, prune
from .producers import Producer, as_producer, parse_arguments
from .rebuilders import chain_of
from .source import ModelSource

logger = logging.getLogger(__name__)


@dataclass
class SparsifyResult:
    """What `sparsify` did.

    Attributes:
        masks: keep mask of each pruned Linear, packed; `.unpack()` gives the bool tensor.
        sparsity_config: the record that goes into `sparsity_config.json`.
        reports: one a block, in the order of computation.
    """

    masks: dict[str, PackedMask]
    sparsity_config: SparsityConfig
    reports: list[BlockReport] = field(default_factory=list)

    def as_report(self) -> dict[str, Any]:
        """The content of `report.json`: totals, and every block."""
        blocks = [asdict(report) for report in self.reports]
        totals = {
            key: sum(block[key] for block in blocks)
            for key in ("error_before", "error_after", "pairs", "swaps", "rows", "rows_without_swap", "seconds")
        }
        peak = max((report.peak_memory for report in self.reports), default=0)
        return {"sparsity": self.sparsity_config.sparsity, **totals, "peak_memory": peak, "blocks": blocks}


class BarberSparsifier:
    """Prunes a causal LM and rebuilds its masks.

    Args:
        model: a transformers causal LM, changed in place by `sparsify`.
        tokenizer: needed for calibration text, and saved with the model; None where tokens are given.
        reference: where the model was loaded from, if it was.
    """

    def __init__(self, model: Any, tokenizer: Any = None, reference: ModelReference | None = None) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.reference = reference

    @classmethod
    def from_pretrained(cls, model: str | Path, dtype: str = "auto") -> "BarberSparsifier":
        """Load a hub id, a directory, a GGUF file or `installed:PACKAGE`."""
        reference = resolve_model(str(model))
        return cls(load_model(reference, dtype), load_tokenizer(reference), reference)

    def sparsify(
        self,
        config: BarberConfig,
        calibration: Sequence[str] | Tensor | TokenWindows | None = None,
        save_dir: str | Path | None = None,
        overwrite: bool = False,
        callbacks: Sequence[Callable[[BlockReport], None]] = (),
        quiet: bool = False,
    ) -> SparsifyResult:
        """Prune the model in place and, with `save_dir`, write the checkpoint.

        Args:
            config: everything that decides the masks.
            calibration: texts, token windows (samples, length) int64, or None for `config.calibration`.
            save_dir: where the checkpoint goes; written beside and renamed at the end.
            overwrite: whether `save_dir` may hold something already; it stays until the end.
            callbacks: called with each block's report.
            quiet: no progress bar.

        Raises:
            BarberError: bad input; nothing was written and no weight changed.
        """
        inputs = [self.reference.directory] if self.reference else []
        output = check_output(save_dir, overwrite, inputs) if save_dir is not None else None
        device = choose_device(config.device)
        source = ModelSource(self.model, device)
        plan = self.plan(config, source)
        self._check_weights(source, plan)
        windows = self._windows(config, calibration)
        with staged(output) if output is not None else nullcontext() as partial:
            result = self._prune(config, source, plan, windows, callbacks, quiet)
            if partial is not None:
                self._save(partial, config, result)
        return result

    def plan(self, config: BarberConfig, source: ModelSource) -> Plan:
        """Producer, rebuilders and pattern of a configuration, all checked against the model."""
        producer = as_producer(config.producer)
        arguments = parse_arguments(producer, config.producer_name, config.producer_args)
        rebuilders = chain_of(config.rebuild)
        names = linear_widths(source)
        for glob in config.ignore:
            if not any(fnmatchcase(name, glob) for name in names):
                raise BarberError(f"ignore {glob!r} matches no Linear, such as {next(iter(names))}")
        targets = {n: w for n, w in names.items() if not any(fnmatchcase(n, glob) for glob in config.ignore)}
        if not targets:
            raise BarberError(f"ignore {config.ignore} leaves no Linear to prune")
        pattern = _pattern(config, producer, arguments, list(targets))
        for name, width in targets.items():
            pattern.check_width(name, width)
        return Plan(
            producer, pattern, arguments, rebuilders, config.ignore, config.seed, config.batch_size,
            exact=producer.brings_pattern is None,
        )  # fmt: skip

    def _check_weights(self, source: ModelSource, plan: Plan) -> None:
        """Refuse NaN and Inf anywhere, and Linears that hold nothing but zeros."""
        for name, parameter in self.model.named_parameters():
            if not torch.isfinite(parameter).all():
                raise BarberError(f"model has NaN or Inf in {name}")
        for name in linear_widths(source):
            if not any(fnmatchcase(name, glob) for glob in plan.ignore):
                if not self.model.get_submodule(name).weight.any():
                    raise BarberError(f"model has nothing to prune in {name}: all its weights are zero")

    def _windows(self, config: BarberConfig, given: Sequence[str] | Tensor | TokenWindows | None) -> TokenWindows:
        if isinstance(given, TokenWindows):
            return given
        if isinstance(given, Tensor):
            if given.ndim != 2 or given.is_floating_point() or given.numel() == 0:
                raise BarberError(
                    f"calibration {given.dtype} {tuple(given.shape)} is not legal: (samples, length) int64"
                )
            sequence_length(self.model.config, given.shape[1])
            return TokenWindows(given.long().cpu(), "tokens", "calibration", len(given))
        if self.tokenizer is None:
            raise BarberError("calibration text needs a tokenizer: give one, or token windows (samples, length)")
        length = sequence_length(self.model.config, config.sequence_length)
        if given is not None:
            tokens = tokenize(list(given), self.tokenizer)
            return random_windows(tokens, config.samples, length, config.seed, "texts")
        return calibration_windows(
            config.calibration, self.tokenizer, samples=config.samples, length=length, seed=config.seed,
            field=config.text_field,
        )  # fmt: skip

    def _prune(
        self,
        config: BarberConfig,
        source: ModelSource,
        plan: Plan,
        windows: TokenWindows,
        callbacks: Sequence[Callable[[BlockReport], None]],
        quiet: bool,
    ) -> SparsifyResult:
        reports: list[BlockReport] = []
        with tqdm(total=2 * len(source), unit="block", desc=config.producer_name, disable=quiet or None) as bar:

            def finished(report: BlockReport) -> None:
                reports.append(report)
                bar.set_postfix_str(f"{report.block} E {report.error_before:.4g} -> {report.error_after:.4g}")
                bar.update()
                for callback in callbacks:
                    callback(report)

            masks = prune(source, windows.tokens, plan, finished)
        return SparsifyResult(masks, self._sparsity_config(config, plan, source, windows, masks), reports)

    def _sparsity_config(
        self,
        config: BarberConfig,
        plan: Plan,
        source: ModelSource,
        windows: TokenWindows,
        masks: Mapping[str, PackedMask],
    ) -> SparsityConfig:
        modules = {name: _module(mask) for name, mask in masks.items()}
        weights = sum(mask.weights for mask in masks.values())
        samples, length = windows.tokens.shape
        name = self.reference.name if self.reference else getattr(self.model.config, "name_or_path", "") or None
        dtype = next(self.model.parameters()).dtype
        return SparsityConfig(
            pattern=str(plan.pattern),
            target_sparsity=plan.pattern.sparsity,
            sparsity=sum(module.pruned for module in modules.values()) / weights,
            modules=modules,
            ignored=[name for name in linear_widths(source) if name not in masks],
            producer={"name": config.producer_name, "arguments": {k: str(v) for k, v in plan.arguments.items()}},
            rebuild=config.rebuild.model_dump() if config.rebuild.chain else None,
            calibration={
                "source": windows.source, "split": windows.split, "samples": samples, "sequence_length": length,
                "seed": config.seed, "fingerprint": windows.fingerprint,
            },
            base_model={
                "name": name, "model_type": self.model.config.model_type, "dtype": str(dtype).removeprefix("torch."),
            },
            software=software(),
        )  # fmt: skip

    def _save(self, directory: Path, config: BarberConfig, result: SparsifyResult) -> None:
        """The checkpoint, its masks, its sparsity config and the report."""
        record = result.sparsity_config
        self.model.config.sparsity_config = {
            "format_version": record.format_version,
            "pattern": record.pattern,
            "sparsity": record.sparsity,
            "config_file": SPARSITY_NAME,
            "masks_file": MASKS_NAME,
        }
        shard = self.reference.shard_bytes if self.reference else None
        self.model.save_pretrained(directory, max_shard_size=shard or 2**50)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(directory)
        write_masks(directory / MASKS_NAME, result.masks, record.pattern)
        write_json(directory / SPARSITY_NAME, record.model_dump())
        write_json(directory / REPORT_NAME, result.as_report())
        config.save_pretrained(directory)


def _pattern(config: BarberConfig, producer: Producer, arguments: dict[str, Any], names: list[str]) -> SparsityPattern:
    """The configured pattern, or the one that a producer of outside masks brings."""
    if producer.brings_pattern is None:
        return config.sparsity_pattern()
    found = producer.brings_pattern(names, **arguments)
    if config.pattern is None and config.sparsity is None:
        return found
    asked = config.sparsity_pattern() if config.sparsity is not None or config.pattern != "unstructured" else found
    if abs(asked.sparsity - found.sparsity) > 5e-3:
        raise BarberError(
            f"sparsity {asked.sparsity:g} contradicts the masks of {config.producer_name!r}: {found.sparsity:.4f}"
        )
    return SparsityPattern(found.sparsity, asked.keep, asked.group)


def _module(mask: PackedMask) -> ModuleSparsity:
    out, width = mask.shape
    return ModuleSparsity(
        shape=(out, width), pruned=mask.pruned, sparsity=mask.pruned / mask.weights, sha256=mask.sha256
    )


def linear_widths(source: ModelSource) -> dict[str, int]:
    """Input width of every Linear of every block, by full name."""
    return {
        f"{source.path}.{index}.{name}": linear.in_features
        for index, layer in enumerate(source.stack)
        for members in source.architecture.blocks.values()
        for name, linear in linears_of(layer, members).items()
    }


def choose_device(device: str) -> torch.device:
    """`auto` is CUDA where there is one.

    Raises:
        BarberError: there is no such device.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise BarberError(f"device {device!r} is not at hand: {str(error).splitlines()[0]}") from None
    return chosen


def software() -> dict[str, str]:
    """Versions of what the masks depend on."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    return {"optimum-barber": own_version(), **versions, "python": platform.python_version()}


def own_version() -> str:
    """The installed version of this package."""
    return importlib.metadata.version("optimum-barber")
