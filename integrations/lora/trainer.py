"""transformers' Trainer on token windows: built from the settings, gone on with from its last whole checkpoint."""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments

from optimum_barber.base.errors import BarberError
from optimum_barber.integrations.lora.adapter import load_weights
from optimum_barber.integrations.lora.settings import LoraSettings

STATE_NAME = "trainer_state.json"


class Windows(Dataset[dict[str, Tensor]]):
    """Token windows as the Trainer takes them; every token is predicted from those before it."""

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
    """A Trainer that reports to nobody and keeps its last checkpoint in `folder`."""
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
    """Gradient checkpointing under the name that the installed transformers has for it."""
    known = {field.name for field in fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    if not settings.gradient_checkpointing:
        return {}
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}


def train(trainer: Trainer, folder: Path) -> float:
    """Train to the end, from the last whole checkpoint in `folder` if there is one; seconds that this took.

    Raises:
        BarberError: the adapter is no longer finite.
    """
    started = time.perf_counter()
    adapter: Any = trainer.model
    last = last_checkpoint(folder)
    state = TrainerState.load_from_json(str(last / STATE_NAME)) if last else None
    if last and state and state.global_step >= trainer.args.max_steps:  # the Trainer would take one step more
        trainer.state = state
        load_weights(adapter, last)
    else:
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    if not all(bool(torch.isfinite(p).all()) for p in adapter.parameters() if p.requires_grad):
        raise BarberError(f"training diverged: learning rate {trainer.args.learning_rate:g} is too high for this model")
    return time.perf_counter() - started


def last_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the most steps; those that a kill left half-written do not count.

    The Trainer writes its state last.
    """
    whole = [path for path in folder.glob("checkpoint-*") if _is_json(path / STATE_NAME)]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return False
    return True


def loss_curve(trainer: Trainer) -> list[dict[str, float]]:
    """Mean training loss since the point before, by step."""
    return [{key: entry[key] for key in ("step", "loss")} for entry in trainer.state.log_history if "loss" in entry]
