"""lm-eval's view of a causal LM, with the record of its masks and of the heads and channels that it lost."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, is_initialized
from lm_eval.models.huggingface import HFLM

from ...base.errors import BarberError, FailedCheckError, unknown_name
from ...base.fields import DTYPES
from ...base.launcher import hidden_launcher
from ...checkpoints.experts import read_experts
from ...checkpoints.names import ADAPTER_CONFIG_NAME, EXPERTS_NAME, SPARSITY_NAME, STRUCTURE_NAME
from ...checkpoints.record import read_record
from ...checkpoints.structure import PrunedStructure, read_structure
from ...models.device import SeveralDevicesError, choose_device
from ...models.loading import load_config, load_model, load_tokenizer, resolve_model
from ..evaluate import load_adapted


class SparseLM(HFLM):
    """A model with the record of its masks and of the heads and channels that it lost, and lm-eval's own arguments.

    Raises:
        BarberError: no such model, an unknown dtype, a broken record.
    """

    def __init__(self, pretrained: str | Path, **arguments: Any) -> None:
        check_dtype(arguments)
        arguments["device"] = str(arguments.get("device") or choose_device("auto"))  # lm-eval's own default is cuda
        loaded: Any
        if (Path(pretrained) / ADAPTER_CONFIG_NAME).is_file():
            device, dtype = _taken(arguments)
            loaded, reference = load_adapted(Path(pretrained), dtype, device)
            arguments = {"tokenizer": load_tokenizer(reference), **arguments}
        else:
            reference = resolve_model(str(pretrained))
            loaded = str(reference.directory)
            if reference.gguf_file:
                arguments["gguf_file"] = reference.gguf_file
            elif getattr(load_config(reference, quantized=True), "quantization_config", None):
                device, dtype = _taken(arguments)
                loaded = load_model(reference, dtype, quantized=True).to(device)
                arguments = {"tokenizer": load_tokenizer(reference), **arguments}
        self.sparsity, self.structure = _summaries(reference.directory)
        with _as_single_process():
            super().__init__(pretrained=loaded, **arguments)

    def loglikelihood(self, *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        """Return log-likelihoods; a `FailedCheckError` where one is NaN, which a mean or an argmax would hide."""
        answers: list[tuple[float, bool]] = super().loglikelihood(*args, **kwargs)
        if any(math.isnan(likely) for likely, _ in answers):
            raise self._failure("NaN")
        return answers

    def loglikelihood_rolling(self, *args: Any, **kwargs: Any) -> list[float]:
        """Return log-likelihoods of whole texts; a `FailedCheckError` where one is NaN or Inf."""
        answers: list[float] = super().loglikelihood_rolling(*args, **kwargs)
        if not all(map(math.isfinite, answers)):
            raise self._failure("NaN or Inf")
        return answers

    def _failure(self, fault: str) -> FailedCheckError:
        dtype = str(self.model.dtype).removeprefix("torch.")
        return FailedCheckError(f"model gives {fault} in {dtype}: no task has a result")

    def get_model_info(self) -> dict[str, Any]:
        """Return the results' `config`: with sparsity and structure, None where nothing went."""
        return {**super().get_model_info(), "sparsity": self.sparsity, "structure": self.structure}


@contextmanager
def _as_single_process() -> Iterator[None]:
    """Inside, accelerate does not see a launcher: it would place the model on a device of its own choice."""
    with hidden_launcher() as launched:
        forget = launched and not is_initialized()
        try:
            yield
        finally:
            if forget:  # else a later Trainer in this process would take itself for a single one
                AcceleratorState._reset_state(reset_partial_state=True)


def check_dtype(arguments: Mapping[str, Any]) -> None:
    """Refuse a dtype that is none, before any work."""
    if arguments.get("dtype", "auto") not in DTYPES:
        raise unknown_name("dtype", str(arguments["dtype"]), DTYPES)


def available_device(device: Any) -> torch.device:
    """Return the evaluation's device, or, as lm-eval does, the one there is where it is not available."""
    try:
        return choose_device(str(device or "auto"))
    except SeveralDevicesError:
        raise
    except BarberError:
        return choose_device("auto")


def _taken(arguments: dict[str, Any]) -> tuple[torch.device, str]:
    return available_device(arguments.pop("device", None)), arguments.pop("dtype", "auto")


def _summaries(directory: Path) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Return what a table of results must say of a checkpoint's sparsity and structure; None where nothing went."""
    sparsity = structure = None
    if (directory / SPARSITY_NAME).is_file():
        record = read_record(directory)
        sparsity = {
            "base_model": record.base_model["name"], "pattern": record.pattern, "sparsity": record.sparsity,
            "producer": record.producer, "rebuild": record.rebuild, "mask_fingerprint": record.fingerprint,
            "steps": record.steps,
        }  # fmt: skip
    if (directory / STRUCTURE_NAME).is_file():
        structure = _structure_summary(read_structure(directory))
    if (directory / EXPERTS_NAME).is_file():
        experts = read_experts(directory)
        structure = {"base_model": experts.base_model["name"], "scorer": experts.scorer, "experts": experts.counts}
    return sparsity, structure


def _structure_summary(record: PrunedStructure) -> dict[str, Any]:
    first = next(iter(record.layers.values()))
    return {
        "base_model": record.base_model["name"],
        "scorer": record.scorer,
        "removed": record.removed,
        "head_unit": record.head_unit,
        **{kind: {"before": units.of, "after": len(units.kept)} for kind, units in first},
        "structure_fingerprint": record.fingerprint,
    }
