"""The public verb of structured pruning: a causal LM in, a smaller one out, with a record of what stayed."""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..architectures import linears_of
from ..artifacts import REPORT_NAME, write_json
from ..calibration import TokenWindows, is_there, windows_for
from ..checkpoint import ONE_FILE, software
from ..errors import BarberError
from ..latency import latency, macs_per_token, size_of
from ..loading import ModelReference, load_model, load_tokenizer, resolve_model
from ..output import check_output, staged
from ..pipeline import peak_memory
from ..planning import check_weights, choose_device
from ..producers import parse_arguments
from ..source import ModelSource, working_copy
from .choose import Budget, budget_of
from .cut import cut_model, smaller_config
from .record import STRUCTURE_NAME, PrunedStructure, read_structure
from .scorers import Scorer, as_scorer
from .scoring import Kept, ScorePlan, choose_units
from .settings import ShrinkConfig, ShrinkSettings
from .units import CHANNELS, HEADS, LayerUnits, structure_of, units_of

PROMPT = 512  # tokens of a prefill that is measured, or what the model takes


@dataclass
class ShrinkResult:
    """What `shrink` did.

    Attributes:
        model: the smaller model.
        structure: the record that goes into `pruned_structure.json`.
        report: the content of `report.json`.
    """

    model: Any
    structure: PrunedStructure
    report: dict[str, Any] = field(default_factory=dict)


@dataclass
class _Cut:
    """A cut that has been checked and not yet made."""

    source: ModelSource
    units: LayerUnits
    budget: Budget
    config: Any
    scorer: Scorer
    arguments: dict[str, Any]
    replayed: PrunedStructure | None


class BarberShrinker:
    """Cuts attention heads and FFN channels out of a causal LM.

    Args:
        model: a transformers causal LM; its weights stay as they are.
        tokenizer: needed for calibration text, and saved with the model; None where tokens are given.
        reference: where the model was loaded from, if it was.
    """

    def __init__(self, model: Any, tokenizer: Any = None, reference: ModelReference | None = None) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.reference = reference

    @classmethod
    def from_pretrained(cls, model: str | Path, dtype: str = "auto") -> "BarberShrinker":
        """Load a hub id, a directory, a GGUF file or `installed:PACKAGE`."""
        reference = resolve_model(str(model))
        return cls(load_model(reference, dtype), load_tokenizer(reference), reference)

    def shrink(
        self,
        config: ShrinkConfig,
        calibration: Sequence[str] | Tensor | TokenWindows | None = None,
        save_dir: str | Path | None = None,
        overwrite: bool = False,
        latency: bool = True,
        quiet: bool = False,
    ) -> ShrinkResult:
        """Make the smaller model and, with `save_dir`, write its checkpoint.

        Args:
            config: everything that decides what stays.
            calibration: texts, token windows (samples, length) int64, or None for `config.calibration`.
            save_dir: where the checkpoint goes; written beside and renamed at the end.
            overwrite: whether `save_dir` may hold something already; it stays until the end.
            latency: measure prefill and decode before and after.
            quiet: no progress bar.

        Raises:
            BarberError: bad input; nothing was written.
        """
        output = check_output(save_dir, overwrite, self.inputs(config)) if save_dir is not None else None
        if config.dtype != "auto":
            self.model.to(getattr(torch, config.dtype))
        cut = plan_cut(self.model, config)
        windows = self._windows(config, cut, calibration)
        with staged(output) if output is not None else nullcontext() as partial:
            started = time.perf_counter()
            kept = self._kept(config, cut, windows, quiet)
            scored = time.perf_counter()
            small = cut_model(self.model, cut.config, kept, cut.units)
            seconds = {"score": scored - started, "cut": time.perf_counter() - scored}
            structure = self._record(config, cut, kept, windows)
            small.config.structure_config = pointer(structure)
            small.config.__dict__.pop("sparsity_config", None)  # masks of a larger model
            report = self._report(config, cut, small, seconds, latency)
            if partial is not None:
                self._save(partial, small, structure, report)
        return ShrinkResult(small, structure, report)

    def inputs(self, config: ShrinkConfig) -> list[Path]:
        """Files and directories that a run reads, and so must not write."""
        paths = [Path(name) for name in (*config.calibration, config.structure) if name is not None]
        return [path for path in paths if is_there(path)] + ([self.reference.path] if self.reference else [])

    def _windows(
        self, config: ShrinkConfig, cut: _Cut, given: Sequence[str] | Tensor | TokenWindows | None
    ) -> TokenWindows | None:
        """Calibration windows; None where nobody looks at them."""
        if cut.replayed is not None or not cut.scorer.needs_text:
            return None
        return windows_for(self.model, self.tokenizer, config, given)

    def _kept(self, config: ShrinkConfig, cut: _Cut, windows: TokenWindows | None, quiet: bool) -> Kept:
        if cut.replayed is not None:
            return cut.replayed.kept
        tokens = windows.tokens if windows is not None else torch.zeros((1, 1), dtype=torch.long)
        plan = ScorePlan(
            cut.scorer, cut.units, structure_of(cut.source), cut.budget.kept, cut.arguments, config.seed,
            config.batch_size,
        )  # fmt: skip
        with tqdm(total=len(cut.source), unit="layer", desc=config.scorer, disable=quiet or None) as bar:
            return choose_units(cut.source, tokens, plan, lambda _: bar.update())

    def _record(self, config: ShrinkConfig, cut: _Cut, kept: Kept, windows: TokenWindows | None) -> PrunedStructure:
        heads, before = cut.units[HEADS], cut.replayed
        name = self.reference.full_name if self.reference else getattr(self.model.config, "name_or_path", "") or None
        dtype = str(next(self.model.parameters()).dtype).removeprefix("torch.")
        return PrunedStructure(
            head_unit="query head" if heads.groups > 1 else "key-value group" if heads.heads > 1 else "head",
            removed=cut.budget.share,
            layers={
                layer: {kind: {"of": cut.units[kind].count, "kept": chosen[kind]} for kind in (HEADS, CHANNELS)}
                for layer, chosen in kept.items()
            },  # type: ignore[arg-type]
            scorer=before.scorer if before else {"name": config.scorer, "arguments": cut.arguments},
            settings=before.settings if before else {n: getattr(config, n) for n in ShrinkSettings.model_fields},
            calibration=before.calibration if before else calibration_record(config, windows),
            base_model={"name": name, "model_type": cut.source.model_type, "dtype": dtype},
            model_type=cut.config.model_type,
            software=software(),
        )

    def _report(
        self, config: ShrinkConfig, cut: _Cut, small: nn.Module, seconds: dict[str, float], timing: bool
    ) -> dict[str, Any]:
        """Counts, sizes and speeds before and after."""
        positions = getattr(self.model.config, "max_position_embeddings", None) or PROMPT + 1
        prompt = min(PROMPT, positions - 1)
        counts = {
            kind: {"before": unit.count * unit.heads, "after": cut.budget.kept[kind] * unit.heads}
            for kind, unit in cut.units.items()
        }
        return {
            "asked": config.remove,
            "removed": cut.budget.share,
            **counts,
            "seconds": seconds,
            "peak_memory": peak_memory(),
            "before": measured(self.model, prompt, cut.source.device, timing),
            "after": measured(small, prompt, cut.source.device, timing),
        }

    def _save(self, directory: Path, small: Any, structure: PrunedStructure, report: dict[str, Any]) -> None:
        shard = self.reference.shard_bytes if self.reference else None
        small.save_pretrained(directory, max_shard_size=shard or ONE_FILE)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(directory)
        write_json(directory / STRUCTURE_NAME, structure.model_dump())
        write_json(directory / REPORT_NAME, report)


def plan_cut(model: Any, config: ShrinkConfig) -> _Cut:
    """What a configuration means for a model, everything checked.

    Raises:
        BarberError: an unknown name, a share that does not fit, a model or a configuration that cannot be cut so.
    """
    scorer = as_scorer(config.scorer)
    arguments = parse_arguments(scorer, config.scorer, config.scorer_args, "scorer")
    replayed = read_structure(config.structure) if config.structure is not None else None
    source = ModelSource(model, choose_device(config.device))
    structure = structure_of(source)
    unit = config.head_unit if replayed is None else "query" if replayed.head_unit == "query head" else "group"
    units = units_of(source, unit)
    if config.skip_layers:
        raise BarberError(
            f"skip-layers {config.skip_layers} would leave layers of different widths, which "
            f"{type(model.config).__name__} cannot say: it has one {structure.width} and one number of heads for all"
        )
    blocks = source.architecture.blocks.values()
    linears = [linear for members in blocks for linear in linears_of(source.stack[0], members).values()]
    if replayed is None:
        budget = budget_of(config, source.stack[0], units, linears)
    else:
        budget = replayed_budget(replayed, source, units)
    smaller = smaller_config(model.config, structure, units, budget.kept)
    check_weights(source, ())
    return _Cut(source, units, budget, smaller, scorer, arguments, replayed)


def replayed_budget(record: PrunedStructure, source: ModelSource, units: LayerUnits) -> Budget:
    """The counts of a record, if it is one of this model.

    Raises:
        BarberError: other layers, other numbers of units, units that are not there, or widths that differ.
    """
    names = [f"{source.path}.{index}" for index in range(len(source))]
    if list(record.layers) != names:
        raise BarberError(f"structure has {len(record.layers)} decoder layers, the model {len(names)}: another model's")
    kept = {kind: len(units_.kept) for kind, units_ in record.layers[names[0]]}
    for name, layer in record.layers.items():
        for kind, found in layer:
            legal = found.kept == sorted({u for u in found.kept if 0 <= u < found.of})
            if found.of != units[kind].count or len(found.kept) != kept[kind] or not legal:
                raise BarberError(
                    f"structure keeps {len(found.kept)} of {found.of} {kind} in {name}; the model has "
                    f"{units[kind].count}, and every layer must keep the same number"
                )
    return Budget(kept, record.removed)


def calibration_record(config: ShrinkConfig, windows: TokenWindows | None) -> dict[str, Any] | None:
    """Where the calibration windows come from, for the record."""
    if windows is None:
        return None
    samples, length = windows.tokens.shape
    return {
        "source": windows.source, "split": windows.split, "samples": samples, "sequence_length": length,
        "seed": config.seed, "fingerprint": windows.fingerprint,
    }  # fmt: skip


def pointer(structure: PrunedStructure) -> dict[str, Any]:
    """What `config.json` says about the cut."""
    return {
        "format_version": structure.format_version,
        "scorer": structure.scorer["name"],
        "removed": structure.removed,
        "structure_file": STRUCTURE_NAME,
    }


def measured(model: Any, prompt: int, device: torch.device, timing: bool) -> dict[str, Any]:
    """Size, MACs and speed of one model; on a CPU it is timed in float32, whatever its dtype."""
    found: dict[str, Any] = {**size_of(model), "macs_per_token": macs_per_token(model.config, prompt)}
    if timing:
        dtype = torch.float32 if device.type == "cpu" else next(model.parameters()).dtype
        with working_copy(model, device, dtype):
            found["latency"] = latency(model, prompt)
    return found
