"""LoRA that keeps the mask: peft's LoRA over a pruned model, with the change masked in training and in every merge."""

import importlib.metadata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from itertools import accumulate, product
from pathlib import Path
from typing import Any, Literal

from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn
from transformers.pytorch_utils import Conv1D

from optimum_barber.base.errors import BarberError
from optimum_barber.base.files import read_json_object, write_json
from optimum_barber.checkpoints.names import ADAPTER_MASKS_NAME
from optimum_barber.checkpoints.record import mask_fingerprint
from optimum_barber.checkpoints.write import software
from optimum_barber.integrations.lora.layer import MaskedLinear
from optimum_barber.models.linears import matrices_of_model, module_names
from optimum_barber.models.source import ModelSource
from optimum_barber.models.wrappers import causal_lm, default_torch
from optimum_barber.tensors.masks import PackedMask

PEFT_TYPE = "OPTIMUM_BARBER_MASKED_LORA"
INITIALISATIONS = (True, False, "gaussian")  # those that leave the base weights alone
FREE = frozenset(
    "r target_modules exclude_modules lora_alpha lora_dropout use_rslora modules_to_save layers_to_transform "
    "layers_pattern rank_pattern alpha_pattern init_lora_weights task_type inference_mode base_model_name_or_path "
    "revision peft_type peft_version auto_mapping runtime_config".split()
)


class AdapterBinding(BaseModel):
    """`sparsity_adapter.json`: what binds an adapter to the masks that it was trained under."""

    model_config = ConfigDict(extra="forbid")

    format_version: Literal[1] = Field(1, description="version of this format")
    base_model: str | None = Field(description="path or hub id of the pruned model; null where it was in memory")
    mask_fingerprint: str = Field(description="SHA-256 over the names and hashes of all masks of the model")
    software: dict[str, str] = Field(description="versions")

    @classmethod
    def read(cls, directory: Path) -> "AdapterBinding":
        """Read the binding of the adapter in `directory`; refuse one that is missing or of a newer format."""
        path = directory / ADAPTER_MASKS_NAME
        if not path.is_file():
            raise BarberError(f"adapter {directory} has no {ADAPTER_MASKS_NAME}: it is incomplete")
        content = read_json_object(path, "adapter binding")
        version = content.get("format_version")
        if version != 1:
            raise BarberError(f"{path} has format version {version}; known is 1")
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise BarberError(f"{path} is no adapter binding: {str(error).splitlines()[0]}") from None


@dataclass
class MaskedLoraConfig(LoraConfig):
    """A `LoraConfig` for one set of masks; made by `masked_lora`, never by hand.

    On disk it names a peft type of its own and keeps rank and alpha one level down, so that a reader that knows
    nothing of masks fails instead of opening the adapter as plain LoRA, which would silently compute something else.
    """

    mask_fingerprint: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._register_custom_module(_for_linears(_without_masks))

    @classmethod
    def of(cls, config: LoraConfig, masks: Mapping[str, PackedMask], model: nn.Module) -> "MaskedLoraConfig":
        """Bind settings to the `masks` of a model; target modules are all pruned Linears by default."""
        settings = {field.name: getattr(config, field.name) for field in fields(LoraConfig) if field.init}
        if settings["target_modules"] is None:
            settings["target_modules"] = sorted(pruned_modules(model, masks))
        _, modules = linears_by_mask(model, masks)
        masked = cls(**settings, mask_fingerprint=mask_fingerprint(masks))
        in_memory = {modules[name]: mask for name, mask in masks.items() if name in modules}
        masked._register_custom_module(_for_linears(partial(_masked_layer, in_memory)))
        return masked

    def to_dict(self) -> dict[str, Any]:
        """The content of `adapter_config.json`."""
        settings = super().to_dict()
        for name, value in settings.items():
            if isinstance(value, set):
                settings[name] = sorted(value)
        del settings["mask_fingerprint"]  # it stands in the binding
        outer = {name: settings.pop(name) for name in ("base_model_name_or_path", "task_type")}
        return {"peft_type": PEFT_TYPE, **outer, "masked_lora": settings}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> LoraConfig:
        """Read the settings of an `adapter_config.json` that `to_dict` made."""
        outer = {name: content[name] for name in ("base_model_name_or_path", "task_type")}
        return LoraConfig(**content["masked_lora"], **outer)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json`, and beside it the binding to the masks."""
        super().save_pretrained(save_directory, **kwargs)
        binding = AdapterBinding(
            base_model=self.base_model_name_or_path,
            mask_fingerprint=self.mask_fingerprint,
            software={**software(), "peft": importlib.metadata.version("peft")},
        )
        write_json(Path(save_directory) / ADAPTER_MASKS_NAME, binding.model_dump())


def _for_linears(function: Any) -> dict[Any, Any]:
    """What peft calls for a Linear, and for its transposed form of GPT-2."""
    return {nn.Linear: function, Conv1D: function}


def _without_masks(*args: Any, **kwargs: Any) -> None:
    raise BarberError("a MaskedLoraConfig without its masks cannot be applied: use masked_lora or load_adapter")


def _masked_layer(
    masks: Mapping[str, PackedMask], target: nn.Module, adapter_name: str, **kwargs: Any
) -> MaskedLinear | None:
    keep = masks.get(kwargs["target_name"])
    return None if keep is None else MaskedLinear(target, adapter_name, keep, **kwargs)  # None: peft's own layer


@default_torch()
def masked_lora(model: nn.Module, masks: Mapping[str, PackedMask], config: LoraConfig) -> PeftModel:
    """Put LoRA on a pruned model so that training, merging and unmerging keep every zero.

    Args:
        model: a causal LM, changed in place as peft does it.
        masks: keep mask of each pruned Linear, such as a `MaskFile`; empty for a dense model, which gets plain LoRA.
        config: rank, alpha and so on; target modules are all pruned Linears by default, and those without a mask get
            plain LoRA. A setting that would break the masks, such as DoRA, is a `BarberError`.

    Returns:
        The peft model; `save_pretrained` of it writes an adapter that `load_adapter` opens.
    """
    model, masks = causal_lm(model), dict(masks)
    if not masks:
        return get_peft_model(model, config)
    if not isinstance(config, LoraConfig):
        raise BarberError(f"adapter settings {type(config).__name__} are not supported: legal is peft's LoraConfig")
    _check_config(config, masks)
    check_zeros(model, masks)
    return get_peft_model(model, MaskedLoraConfig.of(config, masks, model))


def linears_by_mask(model: nn.Module, masks: Iterable[str]) -> tuple[dict[str, nn.Linear], dict[str, str]]:
    """Return the prunable matrices of a model, and the module that has each as its weight, by the names of masks.

    Files may have other names than memory, and experts have no module of their own.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if linears.keys() >= set(masks):
        return linears, {name: name for name in linears}
    source = ModelSource(model)
    return matrices_of_model(source), module_names(source)


def pruned_modules(model: nn.Module, masks: Iterable[str]) -> list[str]:
    """Return the names in memory of all pruned Linears; refuse experts in a tensor of all, which LoRA cannot hold."""
    _, modules = linears_by_mask(model, masks)
    for name in masks:
        if name not in modules:
            legal = next(iter(modules.values()), "none of this model's")
            raise BarberError(
                f"LoRA cannot hold {name}, an expert in a tensor of all: give Linears as targets, such as {legal}"
            )
    return [modules[name] for name in masks]


def _check_config(config: LoraConfig, masks: Mapping[str, PackedMask]) -> None:
    """Refuse every setting under which pruned weights or weights outside the adapter would change."""
    plain = LoraConfig()
    for name in (field.name for field in fields(LoraConfig)):
        value, legal = getattr(config, name), getattr(plain, name)
        if name not in FREE and value not in (legal, []):  # peft writes an empty list for experts that it leaves alone
            raise BarberError(f"LoRA setting {name}={value!r} is not supported on a pruned model: legal is {legal!r}")
    if config.init_lora_weights not in INITIALISATIONS:
        legal = ", ".join(map(repr, INITIALISATIONS))
        value = config.init_lora_weights
        raise BarberError(f"LoRA setting init_lora_weights={value!r} would change pruned weights: legal are {legal}")
    for module, name in product(config.modules_to_save or [], masks):  # trained whole, with the Linears inside
        paths = accumulate(name.split("."), "{}.{}".format)
        if any(path.endswith(module) for path in paths):
            raise BarberError(f"LoRA setting modules_to_save={module!r} would fill the zeros of {name}")


def check_zeros(model: nn.Module, masks: Mapping[str, PackedMask]) -> None:
    """Check that the model has all masked Linears, and exact zeros where they are pruned."""
    matrices, _ = linears_by_mask(model, masks)
    for name, mask in masks.items():
        if name not in matrices:
            raise BarberError(f"model has no Linear {name}, for which there is a mask")
        weight = matrices[name].weight
        if tuple(weight.shape) != tuple(mask.shape):
            raise BarberError(f"{name} has shape {tuple(weight.shape)}, its mask {tuple(mask.shape)}")
        filled = int(weight.detach().cpu()[~mask.unpack()].count_nonzero())
        if filled:
            raise BarberError(f"model does not hold its masks: {filled} of {mask.pruned} zeros of {name} are filled")
