"""An adapter's directory: write it, open it under its own masks, merge it without filling a zero, verify it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from optimum_barber.base.errors import BarberError
from optimum_barber.base.files import path_digest, read_json_object
from optimum_barber.checkpoints.card import Step, write_card
from optimum_barber.checkpoints.carry import save_tokenizer
from optimum_barber.checkpoints.names import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME
from optimum_barber.checkpoints.pruned import PrunedModel, carry_masks, open_masks
from optimum_barber.checkpoints.record import SparsityConfig
from optimum_barber.checkpoints.verify import Verification, verify_checkpoint
from optimum_barber.checkpoints.write import save_model
from optimum_barber.integrations.lora import masked_lora as masked
from optimum_barber.models.loading import brief
from optimum_barber.models.wrappers import causal_lm, default_torch
from optimum_barber.tensors.masks import PackedMask

MERGE_STEP = "lora-merge"
Base = PrunedModel | nn.Module | str | Path


@dataclass
class _Adapter:
    """An adapter's directory, read but not yet applied."""

    directory: Path
    config: LoraConfig
    masks: str  # fingerprint of those that it was trained under; "none" for plain LoRA, trained on a dense model

    @classmethod
    def read(cls, directory: str | Path) -> "_Adapter":
        """Read configuration and binding; refuse what is incomplete, pickled, or of a newer format."""
        directory = Path(directory)
        for name in (ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME):
            if not (directory / name).is_file():
                raise BarberError(f"adapter {directory} has no {name}: it is no adapter, or incomplete")
        path = directory / ADAPTER_CONFIG_NAME
        content = read_json_object(path, "LoRA configuration")
        kind = content.get("peft_type")
        if kind not in (masked.PEFT_TYPE, "LORA"):
            raise BarberError(f"adapter {directory} has peft_type {kind!r}: legal are {masked.PEFT_TYPE!r} and 'LORA'")
        try:
            config = LoraConfig(**content) if kind == "LORA" else masked.MaskedLoraConfig.from_dict(content)
        except (AttributeError, KeyError, TypeError) as error:
            raise BarberError(f"{path} is no LoRA configuration: {brief(error)}") from None
        trained = "none" if kind == "LORA" else masked.AdapterBinding.read(directory).mask_fingerprint
        return cls(directory, config, trained)

    @property
    def sha256(self) -> str:
        """Hash of the adapter's weights."""
        return path_digest(str(self.directory / ADAPTER_WEIGHTS_NAME))

    def base(self, model: Base | None) -> Base:
        """Return the model to open it on: `model`, or the recorded one."""
        base = model or self.config.base_model_name_or_path
        if base is None:
            raise BarberError(f"adapter {self.directory} names no base model: give one")
        return base

    def check(self, record: SparsityConfig | None, masks: Mapping[str, PackedMask], name: str) -> None:
        """Refuse a model with other masks than those of the training, or with the adapter merged in already."""
        own = masked.mask_fingerprint(masks) if masks else "none"
        if self.masks != own:
            raise BarberError(f"adapter {self.directory} was trained under masks {self.masks}, model {name} has {own}")
        for step in record.steps if record else []:
            if step.get("name") == MERGE_STEP and step.get("adapter_sha256") == self.sha256:
                raise BarberError(f"adapter {self.directory} is merged into model {name} already")


def _open_base(base: Base) -> tuple[nn.Module, SparsityConfig | None, Mapping[str, PackedMask], str]:
    """Return model, record, masks and name of an adapter's base."""
    if isinstance(base, nn.Module):
        module = causal_lm(base)
        name = str(getattr(module, "name_or_path", ""))
        if not name:
            raise BarberError("model in memory was not loaded from anywhere, so it has no masks: give its directory")
        return module, *open_masks(name), name
    if not isinstance(base, PrunedModel):
        base = PrunedModel.load(base)
    return base.model, base.record, base.masks, base.reference.full_name


@default_torch()
def load_adapter(adapter: str | Path, model: Base | None = None, is_trainable: bool = False) -> PeftModel:
    """Open an adapter under the masks that it was trained under; plain LoRA opens on dense models.

    Args:
        adapter: its directory.
        model: its base: a `PrunedModel`, a directory or hub id, or a model loaded from one, which is changed in place;
            None for the one it was trained on.
        is_trainable: True to train it on; else everything is frozen, and the model in eval mode.

    Raises:
        BarberError: other masks, with both fingerprints; a newer format; weights that do not fit.
    """
    read = _Adapter.read(adapter)
    module, record, masks, name = _open_base(read.base(model))
    read.check(record, masks, name)
    read.config.inference_mode = not is_trainable
    read.config.base_model_name_or_path = None  # peft sets it, and warns where it was set
    peft = masked.masked_lora(module, masks, read.config)
    peft.peft_config["default"].base_model_name_or_path = name
    load_weights(peft, read.directory)
    return peft if is_trainable else peft.eval()


def load_weights(peft: PeftModel, directory: Path) -> None:
    """Load the weights in `directory` into the adapter of `peft`; refuse other names, shapes or base weights."""
    try:
        weights = load_file(directory / ADAPTER_WEIGHTS_NAME)
    except SafetensorError as error:
        raise BarberError(f"{directory / ADAPTER_WEIGHTS_NAME} cannot be read: {error}") from None
    weights = _without_base(weights, peft.state_dict(), directory)
    stored = _shapes(weights)
    expected = _shapes(get_peft_model_state_dict(peft, save_embedding_layers=False))
    for key in sorted(stored.keys() | expected.keys()):
        shape, legal = stored.get(key), expected.get(key)
        if shape != legal:
            raise BarberError(f"adapter {directory}: {key} is {shape}, its config says {legal}")
    set_peft_model_state_dict(peft, weights)


def _without_base(weights: dict[str, Tensor], model: Mapping[str, Tensor], directory: Path) -> dict[str, Tensor]:
    """Drop the model's own embeddings, which peft saves with an adapter that targets them; refuse other ones."""
    kept = {}
    for key, weight in weights.items():
        own = model.get(key)
        if own is None:
            kept[key] = weight
        elif own.shape != weight.shape or not torch.equal(weight.to(own), own):
            raise BarberError(
                f"adapter {directory} brings {key} {tuple(weight.shape)}, which is not the model's: it was trained on "
                "resized or changed embeddings; give that model, or train them by modules_to_save"
            )
    return kept


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(weight.shape) for key, weight in weights.items()}


def save_adapter(peft: PeftModel, directory: Path, base_model: str) -> None:
    """Write the adapter of `peft`, and its binding to the masks, into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = get_peft_model_state_dict(peft, save_embedding_layers=False)
    save_file(weights, directory / ADAPTER_WEIGHTS_NAME, {"format": "pt"})
    config = peft.peft_config["default"]
    config.base_model_name_or_path, config.inference_mode = base_model, True
    config.save_pretrained(str(directory))


def merge_lora(adapter: str | Path, output: str | Path, model: str | Path | None = None) -> None:
    """Write the model (None: the one it was trained on) with the adapter merged in, with the same masks and dtype.

    Raises:
        BarberError: as `load_adapter`; NaN or Inf; zeros that would be lost. Nothing was written.
    """
    read, output = _Adapter.read(adapter), Path(output)
    base = PrunedModel.load(str(read.base(model)))
    merged = _merge(load_adapter(adapter, base), read.directory)
    masked.check_zeros(merged, base.masks)
    save_model(output, merged, base.reference)
    save_tokenizer(output, base.tokenizer, base.reference)
    step = {"name": MERGE_STEP, "adapter_sha256": read.sha256, "rank": read.config.r, "alpha": read.config.lora_alpha}
    carry_masks(base.reference.directory, output, step)
    trained = {"rank": read.config.r, "alpha": read.config.lora_alpha}
    write_card(output, base.reference, Step("merge, of an adapter that was trained before", trained))


def _merge(peft: PeftModel, name: str | Path) -> Any:
    """Merge the adapter into the transformers model and return that, if all is finite and no tied weight changes."""
    names: dict[int, list[str]] = {}
    for key, parameter in peft.get_base_model().named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(key)
    for layer in (module for module in peft.modules() if isinstance(module, BaseTunerLayer)):
        tied = names.get(id(getattr(layer.get_base_layer(), "weight", None)), [])
        if len(tied) > 1:
            raise BarberError(f"adapter {name} cannot be merged: {' and '.join(tied)} are one weight")
    try:
        return peft.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise BarberError(f"adapter {name} cannot be merged: {error}") from None


def verify_adapter(adapter: str | Path, model: str | Path | None = None) -> Verification:
    """Check base and binding, and count the zeros that the merged weights keep, module by module.

    Of plain LoRA on a dense model, only that it can be merged is checked; its pattern is "dense".
    """
    base = PrunedModel.load(str(_Adapter.read(adapter).base(model)))
    outcome = verify_checkpoint(base.reference.directory) if base.masks else Verification("dense")
    try:
        merged = _merge(load_adapter(adapter, base), adapter)
    except BarberError as error:
        outcome.faults.append(str(error))
        return outcome
    outcome.zeros = 0
    matrices, _ = masked.linears_by_mask(merged, base.masks)
    for name, mask in base.masks.items():
        weight = matrices[name].weight.detach()
        kept = mask.pruned - int(weight[~mask.unpack()].count_nonzero())
        outcome.zeros += kept
        if kept < mask.pruned:
            outcome.faults.append(f"{name}: merging loses {mask.pruned - kept} of {mask.pruned} zeros")
    return outcome
