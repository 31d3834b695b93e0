"""An adapter's directory: reading, writing, and the check that it belongs to a model."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from optimum_barber.base.errors import BarberError
from optimum_barber.base.files import read_json_object
from optimum_barber.base.fingerprint import of_path
from optimum_barber.checkpoints.names import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME
from optimum_barber.checkpoints.pruned import PrunedModel, open_masks
from optimum_barber.checkpoints.record import SparsityConfig
from optimum_barber.integrations.lora.binding import AdapterBinding, mask_fingerprint
from optimum_barber.integrations.lora.masked_lora import PEFT_TYPE, MaskedLoraConfig
from optimum_barber.models.loading import brief
from optimum_barber.tensors.masks import PackedMask

MERGE_STEP = "lora-merge"
Base = PrunedModel | nn.Module | str | Path


@dataclass
class Adapter:
    """An adapter's directory, read but not yet applied.

    Attributes:
        directory: of its files.
        config: of peft.
        binding: to the masks; None for plain LoRA, trained on a dense model.
    """

    directory: Path
    config: LoraConfig
    binding: AdapterBinding | None

    @classmethod
    def read(cls, directory: str | Path) -> "Adapter":
        """Read configuration and binding.

        Raises:
            BarberError: it is no LoRA adapter, incomplete, pickled, or of a newer format.
        """
        directory = Path(directory)
        for name in (ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME):
            if not (directory / name).is_file():
                raise BarberError(f"adapter {directory} has no {name}: it is no adapter, or incomplete")
        content = read_json_object(directory / ADAPTER_CONFIG_NAME, "LoRA configuration")
        kind = content.get("peft_type")
        if kind not in (PEFT_TYPE, "LORA"):
            raise BarberError(f"adapter {directory} has peft_type {kind!r}: legal are {PEFT_TYPE!r} and 'LORA'")
        masked = kind == PEFT_TYPE
        try:
            config = MaskedLoraConfig.from_dict(content) if masked else LoraConfig(**content)
        except (AttributeError, KeyError, TypeError) as error:
            raise BarberError(f"{directory / ADAPTER_CONFIG_NAME} is no LoRA configuration: {brief(error)}") from None
        return cls(directory, config, AdapterBinding.read(directory) if masked else None)

    @property
    def sha256(self) -> str:
        """Hash of the adapter's weights."""
        return of_path(str(self.directory / ADAPTER_WEIGHTS_NAME))

    def base(self, model: Base | None) -> Base:
        """Return the model to open it on: `model`, or the recorded one.

        Raises:
            BarberError: neither is there.
        """
        base = model or self.config.base_model_name_or_path
        if base is None:
            raise BarberError(f"adapter {self.directory} names no base model: give one")
        return base

    def check(self, record: SparsityConfig | None, masks: Mapping[str, PackedMask], name: str) -> None:
        """Refuse a model with other masks than those of the training, or with the adapter merged in already.

        Raises:
            BarberError: with both fingerprints.
        """
        trained = self.binding.mask_fingerprint if self.binding else "none"
        own = mask_fingerprint(masks) if masks else "none"
        if trained != own:
            raise BarberError(f"adapter {self.directory} was trained under masks {trained}, model {name} has {own}")
        for step in record.steps if record else []:
            if step.get("name") == MERGE_STEP and step.get("adapter_sha256") == self.sha256:
                raise BarberError(f"adapter {self.directory} is merged into model {name} already")


def open_base(base: Base) -> tuple[nn.Module, SparsityConfig | None, Mapping[str, PackedMask], str]:
    """Return model, record, masks and name of an adapter's base.

    Raises:
        BarberError: a model in memory has no name, so its masks cannot be found.
    """
    if isinstance(base, PrunedModel):
        return base.model, base.record, base.masks, base.reference.full_name
    if not isinstance(base, nn.Module):
        return open_base(PrunedModel.load(base))
    name = str(getattr(base, "name_or_path", ""))
    if not name:
        raise BarberError("model in memory was not loaded from anywhere, so it has no masks: give its directory")
    return base, *open_masks(name), name


def load_weights(peft: PeftModel, directory: Path) -> None:
    """Load the weights in `directory` into the adapter of `peft`.

    Raises:
        BarberError: names or shapes differ.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights = load_file(directory / ADAPTER_WEIGHTS_NAME)
    except SafetensorError as error:
        raise BarberError(f"{directory / ADAPTER_WEIGHTS_NAME} cannot be read: {error}") from None
    stored = _shapes(weights)
    expected = _shapes(get_peft_model_state_dict(peft, save_embedding_layers=False))
    for key in sorted(stored.keys() | expected.keys()):
        shape, legal = stored.get(key), expected.get(key)
        if shape != legal:
            raise BarberError(f"adapter {directory}: {key} is {shape}, its config says {legal}")
    set_peft_model_state_dict(peft, weights)


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(weight.shape) for key, weight in weights.items()}


def save_adapter(peft: PeftModel, directory: Path, base_model: str) -> None:
    """Write the adapter of `peft`, and its binding to the masks, into `directory`."""
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    save_file(
        get_peft_model_state_dict(peft, save_embedding_layers=False), directory / ADAPTER_WEIGHTS_NAME, {"format": "pt"}
    )
    config = peft.peft_config["default"]
    config.base_model_name_or_path, config.inference_mode = base_model, True
    config.save_pretrained(str(directory))
