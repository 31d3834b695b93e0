"""`--model barber` of lm-eval: a Hugging Face causal LM, pruned or shrunk first, that says so in the results."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from optimum_barber.base.errors import BarberError
from optimum_barber.base.launcher import launched_several
from optimum_barber.base.ranks import ALONE, RankGroup, Ranks, alone, rank_errors, several_ranks
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
        BarberError: bad arguments; several processes without a process group.
    """

    def __init__(self, pretrained: Any = None, **arguments: Any) -> None:
        evaluation: dict[str, Any] = {}
        settings: dict[str, Any] = {}
        for name, value in arguments.items():
            part = evaluation if name in EVALUATION else settings
            part[name] = value
        check_dtype(evaluation)
        self._ranks = ranks_for(evaluation)
        directory = ""
        if self._ranks.first:
            with alone():
                directory = str(checkpoint_for(pretrained, settings, evaluation.get("device"), EVALUATION))
        self._ranks.wait()
        super().__init__(Path(self._ranks.tell(directory)), **evaluation)
        self._rank, self._world_size = self._ranks.index, self._ranks.count

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> "BarberLM":
        """Build it from model arguments; they may name device and batch size, and then outdo lm-eval's flags."""
        merged = {}
        for name, value in (additional_config or {}).items():
            if value is not None:
                merged[name] = value
        if several_ranks() and "device" in arg_dict:
            raise BarberError(f"model argument device {arg_dict['device']} is one for all processes: give --device")
        return cls(**{**merged, **arg_dict})

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the whole numbers of all ranks in their order, (ranks,)."""
        if self._ranks.count == 1:
            return tensor
        return torch.tensor(self._ranks.gather(tensor.flatten().tolist()), dtype=tensor.dtype)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """Return the objects of all ranks on the rank `dst`, None on the others."""
        with rank_errors(self._ranks.index):
            objects: list[Any] | None = super().gather_object(obj, dst)
        return objects

    def barrier(self) -> None:
        """Wait for all ranks."""
        self._ranks.wait()

    def loglikelihood(self, *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        """See `SparseLM.loglikelihood`; each rank answers its own requests."""
        with self._own_requests():
            return super().loglikelihood(*args, **kwargs)

    def loglikelihood_rolling(self, *args: Any, **kwargs: Any) -> list[float]:
        """See `SparseLM.loglikelihood_rolling`; each rank answers its own requests."""
        with self._own_requests():
            return super().loglikelihood_rolling(*args, **kwargs)

    def generate_until(self, *args: Any, **kwargs: Any) -> list[str]:
        """See lm-eval's HFLM; each rank answers its own requests."""
        with self._own_requests():
            answers: list[str] = super().generate_until(*args, **kwargs)
        return answers

    @contextmanager
    def _own_requests(self) -> Iterator[None]:
        """Inside, HFLM does not wait for other ranks to call the model as often: they may have fewer requests left."""
        count, self._world_size = self._world_size, 1
        try:
            yield
        finally:
            self._world_size = count


def ranks_for(evaluation: Mapping[str, Any]) -> Ranks:
    """Return the ranks that share the requests of an evaluation, with these arguments of HFLM.

    Raises:
        BarberError: they were launched without a process group, or are to share one model.
    """
    if not several_ranks():
        if launched_several():
            raise BarberError(
                "model 'barber' shares requests in a process group: call torch.distributed.init_process_group first, "
                "or start optimum-barber lm-eval"
            )
        return ALONE
    if evaluation.get("tp_plan") is not None:
        raise BarberError("tp_plan splits one model among processes, which here have one each: leave it out")
    return RankGroup(available_device(evaluation.get("device")))
