"""Training with transformers' Trainer by the loss of text or of the dense model, resumable to the same bits."""

import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from optimum_barber.base.errors import BarberError, UnfinishedError
from optimum_barber.base.files import read_json, read_json_object, write_json
from optimum_barber.base.output import output_lock
from optimum_barber.integrations.training.settings import TrainingSettings
from optimum_barber.models.device import matrix_products, recomputing_contexts
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
        logits = self.model(input_ids=input_ids, use_cache=False).logits
        if dense is None:
            return {"loss": cross_entropy(logits, labels)}
        with torch.no_grad():
            dense_logits = dense(input_ids=input_ids, use_cache=False).logits
        loss = divergence(logits, dense_logits, self.settings.temperature)
        if self.settings.lm_weight:
            loss = loss + self.settings.lm_weight * cross_entropy(logits, labels)
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


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean negative log-likelihood of every token but the first of its window, in nats.

    Args:
        logits: (windows, length, vocabulary).
        labels: (windows, length) int64.
    """
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


@contextmanager
def training_folder(folder: Path, run: Mapping[str, Any], overwrite: bool = False) -> Iterator[None]:
    """Inside, the folder holds the checkpoints of one run and no other works there; on success it is removed.

    An interrupted run leaves it, a failed check or bad input does not.

    Args:
        folder: of checkpoints; a run that finds its own goes on with them.
        run: what decides the training.
        overwrite: whether checkpoints of another run are discarded.

    Raises:
        BarberError: the folder is something else, in use, or holds checkpoints of another run.
    """
    if folder.exists() and not folder.is_dir():
        raise BarberError(f"{folder} is a file, where checkpoints of the training go: move it")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / RUN_NAME).is_file():
        raise BarberError(f"{folder} is not empty, and holds no training of ours: move it")
    folder.mkdir(parents=True, exist_ok=True)
    with output_lock(folder):
        _settle(folder, run, overwrite)
        try:
            yield
        except UnfinishedError:
            raise
        except BarberError:  # the same run would fail again
            shutil.rmtree(folder)
            raise
        shutil.rmtree(folder)


def _settle(folder: Path, run: Mapping[str, Any], overwrite: bool) -> None:
    """Write what the checkpoints in a folder belong to; refuse or discard those of another run."""
    path = folder / RUN_NAME
    earlier = read_json_object(path) if path.is_file() else dict(run)
    other = [key for key in run if earlier.get(key) != run[key]]
    if other and not overwrite:
        raise BarberError(f"{folder} holds checkpoints of a run with other {', '.join(other)}: remove it to start anew")
    if other:
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        (folder / TRAINED_NAME).unlink(missing_ok=True)
    write_json(path, dict(run))


@dataclass
class Training:
    """A training from its first step to its last, in a folder that outlives a kill.

    Attributes:
        learner: model and loss, on the device.
        settings: everything that decides the training but model and text.
        folder: of checkpoints, see `training_folder`.
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
        last = last_checkpoint(self.folder)
        if last is not None:
            _move_best(last)
        trainer = self._trainer(anew=last is None)
        with matrix_products(self.products):
            trainer.train(resume_from_checkpoint=str(last) if last else None)
        for parameter in self.learner.trainable().values():
            if not parameter.isfinite().all():
                rate = self.settings.learning_rate
                raise BarberError(f"training diverged: learning rate {rate:g} is too high for this model")
        history = trainer.state.log_history
        if self.held_out is not None and trainer.state.best_model_checkpoint is None:
            raise BarberError(f"{self.folder} has lost the best checkpoint of the training: remove it to start anew")
        return {
            "steps": trainer.state.global_step,
            "loss": curve_of(history, "loss"),
            "held_out_loss": curve_of(history, "eval_loss"),
        }

    def _trainer(self, anew: bool) -> Trainer:
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
            **self._looking(anew),
        )  # fmt: skip
        arguments._n_gpu = min(arguments.n_gpu, 1)  # several would mean DataParallel
        if settings.gradient_checkpointing:
            checkpoint_activations(self.learner.model, self.products)
        measured: Any = examples(self.held_out) if self.held_out is not None else None
        windows: Any = examples(self.tokens)
        trainer = Trainer(self.learner, arguments, train_dataset=windows, eval_dataset=measured)
        trainer.remove_callback(PrinterCallback)
        if measured:
            trainer.add_callback(EarlyStoppingCallback(self.patience))
        for callback in self.callbacks:
            trainer.add_callback(callback)
        return trainer

    def _looking(self, anew: bool) -> dict[str, Any]:
        """Return the arguments by which the Trainer looks at the held-out windows, before the first step too."""
        if self.held_out is None:
            return {}
        return {
            "eval_strategy": "steps", "eval_steps": self.settings.saving_steps, "eval_on_start": anew,
            "load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False,
            "restore_callback_states_from_checkpoint": True,
        }  # fmt: skip


def checkpoint_activations(model: Any, precision: str) -> None:
    """Let a model compute activations again for the gradient, by the name that its transformers has for it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False, "context_fn": partial(recomputing_contexts, precision)})


def examples(windows: Tensor) -> list[dict[str, Tensor]]:
    """Return windows, (windows, length) int64, as the Trainer takes them."""
    return [{"input_ids": window, "labels": window} for window in windows]


def last_checkpoint(folder: Path) -> Path | None:
    """Return the complete checkpoint of the most steps, None where there is none.

    The Trainer writes its state last, so a checkpoint that a kill left half-written has none.
    """
    complete = {}
    for path in folder.glob("checkpoint-*"):
        with suppress(BarberError):
            read_json(path / STATE_NAME)
            complete[int(path.name.rpartition("-")[2])] = path
    return complete[max(complete)] if complete else None


def _move_best(checkpoint: Path) -> None:
    """Name the best checkpoint by where it lies now: the Trainer keeps an absolute path."""
    state = read_json(checkpoint / STATE_NAME)
    if state.get("best_model_checkpoint"):
        state["best_model_checkpoint"] = str(checkpoint.with_name(Path(state["best_model_checkpoint"]).name))
        write_json(checkpoint / STATE_NAME, state)


def curve_of(history: Sequence[Mapping[str, float]], name: str) -> list[dict[str, float]]:
    """Return one figure of the Trainer's log: its value at each step at which it was logged."""
    points = [entry for entry in history if name in entry]
    return [{"step": entry["step"], "loss": entry[name]} for entry in points]
