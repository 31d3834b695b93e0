"""transformers' Trainer on token windows: built from the settings, resumed from its last complete checkpoint."""

import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments

from optimum_barber.base.errors import BarberError
from optimum_barber.base.files import read_json
from optimum_barber.integrations.lora.adapter import load_weights
from optimum_barber.integrations.lora.settings import LoraSettings

STATE_NAME = "trainer_state.json"


class Windows(Dataset[dict[str, Tensor]]):
    """Token windows in the form of the Trainer; every token is predicted from those before it."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def make_trainer(
    adapter: PeftModel,
    folder: Path,
    settings: LoraSettings,
    tokens: Tensor,
    quiet: bool,
    callbacks: Sequence[TrainerCallback],
) -> Trainer:
    """Build a Trainer that reports to nobody and keeps its last checkpoint in `folder`."""
    on_cuda = adapter.device.type == "cuda"
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps,
        learning_rate=settings.learning_rate,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        warmup_steps=round(settings.warmup * settings.steps),
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(settings.scheduler, settings.scheduler),
        weight_decay=settings.weight_decay,
        seed=settings.seed,
        use_cpu=not on_cuda,
        logging_steps=settings.logging_steps,
        logging_nan_inf_filter=False,
        save_steps=settings.saving_steps,
        save_total_limit=1,
        report_to="none",
        disable_tqdm=quiet or not sys.stderr.isatty(),
        dataloader_pin_memory=on_cuda,
        label_names=["labels"],
        **checkpointing(settings),
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several would mean DataParallel
    trainer = Trainer(adapter, arguments, train_dataset=Windows(tokens), callbacks=list(callbacks))
    trainer.remove_callback(PrinterCallback)
    return trainer


def checkpointing(settings: LoraSettings) -> dict[str, Any]:
    """Return the arguments of gradient checkpointing by the names that the installed transformers has for them."""
    if not settings.gradient_checkpointing:
        return {}
    name = "gradient_checkpointing"
    if "activation_checkpointing" in {field.name for field in fields(TrainingArguments)}:
        name = "activation_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}


def train(trainer: Trainer, folder: Path) -> float:
    """Train to the end, from the last complete checkpoint in `folder` if there is one, and return the seconds.

    Raises:
        BarberError: the adapter is no longer finite.
    """
    started = time.perf_counter()
    adapter: Any = trainer.model
    last = last_checkpoint(folder)
    if last is None:
        trainer.train()
    else:
        state = TrainerState.load_from_json(str(last / STATE_NAME))
        if state.global_step < trainer.args.max_steps:
            trainer.train(resume_from_checkpoint=str(last))
        else:  # the Trainer would take one step more
            trainer.state = state
            load_weights(adapter, last)
    trained = [parameter for parameter in adapter.parameters() if parameter.requires_grad]
    if not all(bool(torch.isfinite(parameter).all()) for parameter in trained):
        raise BarberError(f"training diverged: learning rate {trainer.args.learning_rate:g} is too high for this model")
    return time.perf_counter() - started


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


def loss_curve(trainer: Trainer) -> list[dict[str, float]]:
    """Return the mean training loss since the point before, by step."""
    points = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [{"step": entry["step"], "loss": entry["loss"]} for entry in points]
