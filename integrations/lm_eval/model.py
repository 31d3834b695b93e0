"""`--model barber` of lm-eval: a Hugging Face causal LM, pruned or shrunk first, that says so in the results."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from optimum_barber.base.errors import unknown_name
from optimum_barber.base.fields import DTYPES
from optimum_barber.checkpoints.names import ADAPTER_CONFIG_NAME, SPARSITY_NAME, STRUCTURE_NAME
from optimum_barber.checkpoints.record import read_record
from optimum_barber.checkpoints.structure import read_structure
from optimum_barber.integrations.lm_eval.cache import device_at_hand
from optimum_barber.integrations.lm_eval.settings import checkpoint_for, sparsity_summary
from optimum_barber.integrations.lm_eval.shrink import structure_summary
from optimum_barber.models.loading import (
    ModelReference,
    load_config,
    load_model,
    load_tokenizer,
    resolve_model,
)

ELSEWHERE = {"revision", "subfolder", "gguf_file", "peft", "delta", "autogptq", "gptqmodel"}  # would miss the pruning
EVALUATION = {*inspect.signature(HFLM.__init__).parameters, "attn_implementation"} - ELSEWHERE - {"self", "kwargs"}


def check_dtype(arguments: Mapping[str, Any]) -> None:
    """Refuse a dtype that is none, before any work."""
    if arguments.get("dtype", "auto") not in DTYPES:
        raise unknown_name("dtype", str(arguments["dtype"]), DTYPES)


def load_quantized(reference: ModelReference, device: Any, dtype: str) -> Any:
    """A quantized checkpoint as a plain model of its dequantized weights; refuses weights that would be random."""
    return load_model(reference, dtype, quantized=True).to(torch.device(device_at_hand(device)))


def load_adapted(adapter: Path, device: Any, dtype: str) -> tuple[Any, ModelReference]:
    """An adapter on its model, under the masks that it was trained under; and where that model lies."""
    from optimum_barber.integrations.lora.checkpoint import load_adapter

    model = load_adapter(adapter)
    model = model if dtype == "auto" else model.to(getattr(torch, dtype))
    return model.to(torch.device(device_at_hand(device))), resolve_model(model.get_base_model().config.name_or_path)


class SparseLM(HFLM):
    """A model, with the record of its masks and of the heads and channels that it lost.

    Args:
        pretrained: hub id, directory, GGUF file, `installed:PACKAGE`, or the directory of a peft adapter.
        arguments: of lm-eval's HFLM.

    Raises:
        BarberError: no such model, an unknown dtype, a broken record.
    """

    def __init__(self, pretrained: str | Path, **arguments: Any) -> None:
        check_dtype(arguments)
        loaded: Any
        if (Path(pretrained) / ADAPTER_CONFIG_NAME).is_file():
            loaded, reference = load_adapted(
                Path(pretrained), arguments.pop("device", None), arguments.pop("dtype", "auto")
            )
            arguments = {"tokenizer": load_tokenizer(reference), **arguments}
        else:
            reference = resolve_model(str(pretrained))
            loaded = str(reference.directory)
            if reference.gguf_file:
                arguments["gguf_file"] = reference.gguf_file
            elif getattr(load_config(reference, quantized=True), "quantization_config", None):
                loaded = load_quantized(reference, arguments.pop("device", None), arguments.pop("dtype", "auto"))
                arguments = {"tokenizer": load_tokenizer(reference), **arguments}
        pruned = (reference.directory / SPARSITY_NAME).is_file()
        self.sparsity = sparsity_summary(read_record(reference.directory)) if pruned else None
        cut = (reference.directory / STRUCTURE_NAME).is_file()
        self.structure = structure_summary(read_structure(reference.directory)) if cut else None
        super().__init__(pretrained=loaded, **arguments)

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes into the results' `config`: with sparsity and structure, None where nothing went."""
        return {**super().get_model_info(), "sparsity": self.sparsity, "structure": self.structure}


@register_model("barber")
class BarberLM(SparseLM):
    """A model pruned or shrunk as the arguments say, or as it was before by exactly the same ones.

    Args:
        pretrained: hub id, directory, GGUF file or `installed:PACKAGE`.
        arguments: fields of `BarberConfig` with the rebuild's among them, the producer's own, `masks=FILE` or
            `recipe=FILE`; or fields of `ShrinkConfig` with the scorer's own; and those of lm-eval's HFLM.

    Raises:
        BarberError: bad arguments.
    """

    def __init__(self, pretrained: Any = None, **arguments: Any) -> None:
        evaluation = {name: value for name, value in arguments.items() if name in EVALUATION}
        settings = {name: value for name, value in arguments.items() if name not in EVALUATION}
        check_dtype(evaluation)
        directory = checkpoint_for(pretrained, settings, evaluation.get("device"), EVALUATION)
        super().__init__(directory, **evaluation)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> "BarberLM":
        """Model arguments may name device and batch size, and then outdo lm-eval's flags."""
        flags = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls(**{**flags, **arg_dict})
