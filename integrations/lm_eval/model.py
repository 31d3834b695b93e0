"""`--model barber` of lm-eval: a Hugging Face causal LM, pruned or shrunk first, that says so in the results."""

import inspect
from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from optimum_barber.base.ranks import ALONE, RankGroup, several_ranks
from optimum_barber.integrations.lm_eval.checkpoint import checkpoint_for
from optimum_barber.runs.tasks.lm import SparseLM, available_device, check_dtype

EVALUATION = {*inspect.signature(HFLM.__init__).parameters, "attn_implementation"}  # what lm-eval takes
EVALUATION -= {"self", "kwargs"}
EVALUATION -= {"revision", "subfolder", "gguf_file", "peft", "delta", "autogptq", "gptqmodel"}  # would miss the pruning


@register_model("barber")
class BarberLM(SparseLM):
    """A model pruned or shrunk as the arguments say, or as it was before by exactly the same ones.

    Where a `torch.distributed` process group is initialised, its ranks share the requests, each on its own device.

    Args:
        pretrained: hub id, directory, GGUF file or `installed:PACKAGE`.
        arguments: fields of `BarberConfig` with the rebuild's among them, the producer's own, `masks=FILE` or
            `recipe=FILE`; or fields of `ShrinkConfig` with the scorer's own; and those of lm-eval's HFLM.

    Raises:
        BarberError: bad arguments.
    """

    def __init__(self, pretrained: Any = None, **arguments: Any) -> None:
        evaluation: dict[str, Any] = {}
        settings: dict[str, Any] = {}
        for name, value in arguments.items():
            part = evaluation if name in EVALUATION else settings
            part[name] = value
        check_dtype(evaluation)
        device = evaluation.get("device")
        ranks = RankGroup(available_device(device)) if several_ranks() else ALONE
        if not ranks.first:
            ranks.wait()  # until the first one has made the checkpoint
        directory = checkpoint_for(pretrained, settings, device, EVALUATION)
        if ranks.first:
            ranks.wait()
        super().__init__(directory, ranks, **evaluation)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> "BarberLM":
        """Build it from model arguments; they may name device and batch size, and then outdo lm-eval's flags."""
        merged = {}
        for name, value in (additional_config or {}).items():
            if value is not None:
                merged[name] = value
        return cls(**{**merged, **arg_dict})
