"""Training with transformers' Trainer by the loss of text or of the dense model, resumable to the same bits."""

import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from optimum_barber.base.errors import BarberError
from optimum_barber.base.files import read_json, read_json_object, write_json
from optimum_barber.integrations.training.settings import TrainingSettings
from optimum_barber.models.device import matrix_products, product_precision
from optimum_barber.models.linears import has_routed_experts
from optimum_barber.models.source import ModelSource
from optimum_barber.tensors.distillation import divergence

RUN_NAME = "run.json"
STATE_NAME = "trainer_state.json"
TRAINED_NAME = "trained.safetensors"  # written when the last step is done
HISTORY_NAME = "trained.json"


class Learner(nn.Module):
    """A causal LM with its training loss, as the Trainer wants it.

    Its state is the trainable parameters alone, by their names in memory. Files of some families have other names, by
    which the Trainer's own checkpoints would come back incomplete.

    Args:
        model: the causal LM, or an adapter on one; what requires a gradient is trained.
        settings: `loss`, `temperature` and `lm_weight`.
        dense: the model to learn from; needed by loss distill.
    """

    def __init__(self, model: Any, settings: TrainingSettings, dense: Any = None) -> None:
        super().__init__()
        self.model = model
        self.settings = settings
        self._dense = (dense,)  # in a tuple it is no part of the module

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the mean loss of a batch of windows, (windows, length) int64."""
        (dense,) = self._dense
        if dense is None:
            return {"loss": self.model(input_ids=input_ids, labels=labels, use_cache=False).loss}
        logits = self.model(input_ids=input_ids, use_cache=False).logits
        with torch.no_grad():
            dense_logits = dense(input_ids=input_ids, use_cache=False).logits
        loss = divergence(logits, dense_logits, self.settings.temperature)
        if self.settings.lm_weight:
            likely = logits[:, :-1].flatten(0, 1).float()
            loss = loss + self.settings.lm_weight * functional.cross_entropy(likely, labels[:, 1:].flatten())
        return {"loss": loss}

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return what is trained, by name."""
        return {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}

    def state_dict(self, *_: Any, **__: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """Return what is trained, by name."""
        return {name: weight.detach().contiguous() for name, weight in self.trainable().items()}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any], *_: Any, **__: Any) -> Any:
        """Take over what `state_dict` returned."""
        parameters = self.trainable()
        if parameters.keys() != state_dict.keys():
            raise BarberError("checkpoint of the training holds other parameters: remove it to start anew")
        for name, parameter in parameters.items():
            parameter.copy_(state_dict[name])
        return torch.nn.modules.module._IncompatibleKeys([], [])


def begin_training(folder: Path, run: Mapping[str, Any]) -> None:
    """Write what the checkpoints in a folder belong to.

    Raises:
        BarberError: there are some of another run.
    """
    path = folder / RUN_NAME
    begun = last_checkpoint(folder) or (folder / TRAINED_NAME).is_file()
    if begun and path.is_file():
        earlier = read_json_object(path)
        other = [key for key in run if earlier.get(key) != run[key]]
        if other:
            raise BarberError(
                f"{folder} holds checkpoints of a run with other {', '.join(other)}: remove it to start anew"
            )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, dict(run))


def finish_training(folder: Path) -> None:
    """Remove the checkpoints of a training whose result is written."""
    shutil.rmtree(folder)


@dataclass
class Training:
    """A training from its first step to its last, in a folder that outlives a kill.

    Attributes:
        learner: model and loss, on the device.
        settings: everything that decides the training but model and text.
        folder: of checkpoints, see `begin_training`.
        tokens: windows to train on, (windows, length) int64.
        products: precision of float32 matrix products, see `stated_products`.
        held_out: windows by which the best weights are chosen; None takes the last.
        patience: looks at them without a gain after which the training ends.
        callbacks: of the Trainer.
    """

    learner: Learner
    settings: TrainingSettings
    folder: Path
    tokens: Tensor
    products: str = "highest"
    held_out: Tensor | None = None
    patience: int = 1
    callbacks: Sequence[TrainerCallback] = ()
    quiet: bool = False

    def train(self) -> dict[str, Any]:
        """Train, from the last complete checkpoint if there is one; the learner then holds the chosen weights.

        Returns:
            seconds of this call, steps, the loss curve, and the held-out losses by step.

        Raises:
            BarberError: the training diverged.
        """
        started = time.perf_counter()
        trained = self.folder / TRAINED_NAME
        if trained.is_file():
            self.learner.load_state_dict(load_file(trained))
            history = read_json(self.folder / HISTORY_NAME)
        else:
            history = self._run_trainer()
            write_json(self.folder / HISTORY_NAME, history)
            save_file(self.learner.state_dict(), f"{trained}.partial")
            Path(f"{trained}.partial").rename(trained)
        return {"seconds": time.perf_counter() - started, **history}

    def _run_trainer(self) -> dict[str, Any]:
        trainer = self._trainer()
        with matrix_products(self.products):
            trainer.train(resume_from_checkpoint=last_checkpoint(self.folder))
        for parameter in self.learner.trainable().values():
            if not parameter.isfinite().all():
                rate = self.settings.learning_rate
                raise BarberError(f"training diverged: learning rate {rate:g} is too high for this model")
        history = trainer.state.log_history
        return {
            "steps": trainer.state.global_step,
            "loss": curve_of(history, "loss"),
            "held_out_loss": curve_of(history, "eval_loss"),
        }

    def _trainer(self) -> Trainer:
        """Build a Trainer that reports to nobody and keeps its best and its last checkpoint in the folder."""
        settings = self.settings
        on_device = next(self.learner.parameters()).device.type != "cpu"
        arguments = TrainingArguments(
            output_dir=str(self.folder), max_steps=settings.steps, learning_rate=settings.learning_rate,
            per_device_train_batch_size=settings.batch_size, per_device_eval_batch_size=settings.batch_size,
            gradient_accumulation_steps=settings.gradient_accumulation,
            warmup_steps=round(settings.warmup * settings.steps), weight_decay=settings.weight_decay,
            lr_scheduler_type={"constant": "constant_with_warmup"}.get(settings.scheduler, settings.scheduler),
            logging_steps=settings.logging_steps, logging_nan_inf_filter=False, save_steps=settings.saving_steps,
            save_total_limit=1, report_to="none", disable_tqdm=self.quiet or not sys.stderr.isatty(),
            use_cpu=not on_device, dataloader_pin_memory=on_device, label_names=["labels"], seed=settings.seed,
            **self._looking(),
        )  # fmt: skip
        arguments._n_gpu = min(arguments.n_gpu, 1)  # several would mean DataParallel
        if settings.gradient_checkpointing:
            checkpoint_activations(self.learner.model)
        measured: Any = examples(self.held_out) if self.held_out is not None else None
        windows: Any = examples(self.tokens)
        trainer = Trainer(self.learner, arguments, train_dataset=windows, eval_dataset=measured)
        trainer.remove_callback(PrinterCallback)
        if measured:
            trainer.add_callback(EarlyStoppingCallback(self.patience))
        for callback in self.callbacks:
            trainer.add_callback(callback)
        return trainer

    def _looking(self) -> dict[str, Any]:
        """Return the arguments by which the Trainer looks at the held-out windows."""
        if self.held_out is None:
            return {}
        return {
            "eval_strategy": "steps", "eval_steps": self.settings.saving_steps, "eval_on_start": True,
            "load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False,
            "restore_callback_states_from_checkpoint": True,
        }  # fmt: skip


def checkpoint_activations(model: Any) -> None:
    """Let a model compute activations again for the gradient, by the name that its transformers has for it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def examples(windows: Tensor) -> list[dict[str, Tensor]]:
    """Return windows, (windows, length) int64, as the Trainer takes them."""
    return [{"input_ids": window, "labels": window} for window in windows]


def stated_products(model: Any, settings: TrainingSettings) -> str:
    """Return the precision of float32 matrix products of a training, never `auto`."""
    device = next(model.parameters()).device
    return product_precision(settings.precision, device, has_routed_experts(ModelSource(model)))


def last_checkpoint(folder: Path) -> str | None:
    """Return the complete checkpoint of the most steps, None where there is none.

    The Trainer writes its state last, so a checkpoint that a kill left half-written has none.
    """
    complete = {}
    for path in folder.glob("checkpoint-*"):
        with suppress(BarberError):
            read_json(path / STATE_NAME)
            complete[int(path.name.rpartition("-")[2])] = str(path)
    return complete[max(complete)] if complete else None


def curve_of(history: Sequence[Mapping[str, float]], name: str) -> list[dict[str, float]]:
    """Return one figure of the Trainer's log: its value at each step at which it was logged."""
    points = [entry for entry in history if name in entry]
    return [{"step": entry["step"], "loss": entry[name]} for entry in points]
