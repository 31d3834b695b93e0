"""Training an adapter on a pruned or dense model with transformers' Trainer, resumable after a kill."""

import shutil
import sys
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from peft.tuners import tuners_utils
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments, set_seed

from optimum_barber.base.errors import BarberError
from optimum_barber.base.files import read_json, read_json_object, write_json
from optimum_barber.checkpoints.pruned import PrunedModel
from optimum_barber.integrations.lora.checkpoint import load_weights, save_adapter
from optimum_barber.integrations.lora.masked_lora import mask_fingerprint, masked_lora, pruned_modules
from optimum_barber.integrations.lora.settings import LoraSettings
from optimum_barber.models.architectures import architecture_of, decoder_stack
from optimum_barber.models.device import choose_device, working_dtype
from optimum_barber.models.linears import check_globs, matches
from optimum_barber.models.matrices import is_matrix
from optimum_barber.text.perplexity import perplexity
from optimum_barber.text.windows import TokenWindows

REPORT_NAME = "lora_training.json"
RUN_NAME = "run.json"
STATE_NAME = "trainer_state.json"


def train_lora(
    model: str | Path,
    output: str | Path,
    settings: LoraSettings,
    windows: TokenWindows,
    held_out: TokenWindows | None = None,
    quiet: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    scratch: Path | None = None,
) -> dict[str, Any]:
    """Train an adapter that keeps the masks of `model`, or a plain one where it has none.

    A call that finds checkpoints in `scratch` goes on from the last one, on a CPU to the same adapter bit for bit.

    Args:
        model: directory that `prune` or a later step wrote, hub id, or a dense model.
        output: where the adapter goes; the caller stages it.
        settings: everything that decides the adapter but the model and the text.
        windows: to train on.
        held_out: to measure the perplexity on, before and after.
        quiet: no progress bar.
        callbacks: of the Trainer.
        scratch: folder of the checkpoints, which outlives a kill; None for `OUTPUT.training`. Removed at the end.

    Returns:
        What `lora_training.json` holds: settings, seconds of this call, steps, perplexities, the loss curve.
    """
    output, device = Path(output), choose_device(settings.device)
    opened = PrunedModel.load(model, working_dtype(settings.dtype, device, on_gpu="bfloat16"))
    run = {  # what decides the adapter
        "settings": settings.model_dump(),
        "base_model": opened.reference.full_name,
        "device": str(device),
        "dtype": str(next(opened.model.parameters()).dtype).removeprefix("torch."),
        "mask_fingerprint": mask_fingerprint(opened.masks) if opened.masks else None,
        "windows": windows.as_dict(),
    }
    folder = scratch or output.with_name(output.name + ".training")
    targets = target_linears(opened.model, opened.masks, settings.targets)
    _begin_run(folder, run)
    opened.model.to(device)
    before = after = None
    if held_out:
        before = perplexity(opened.model, held_out, quiet).as_dict()
    adapter = _new_adapter(opened, settings, targets)
    trainer = _make_trainer(adapter, folder, settings, windows.tokens, quiet)
    for callback in callbacks:
        trainer.add_callback(callback)
    seconds = _train(trainer, folder)
    if held_out:
        after = perplexity(adapter, held_out, quiet).as_dict()
    report = {
        **run, "seconds": seconds, "steps": trainer.state.global_step, "perplexity_before": before,
        "perplexity_after": after, "loss": _loss_curve(trainer),
    }  # fmt: skip
    save_adapter(adapter, output, opened.reference.full_name)
    write_json(output / REPORT_NAME, report)
    shutil.rmtree(folder)
    return report


def _new_adapter(opened: PrunedModel, settings: LoraSettings, targets: list[str]) -> PeftModel:
    set_seed(settings.seed)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=settings.rank, lora_alpha=settings.alpha,  # type: ignore[arg-type]
        lora_dropout=settings.dropout, use_rslora=settings.use_rslora, target_modules=targets,
    )  # fmt: skip
    return masked_lora(opened.model, opened.masks, config)


def target_linears(model: Any, masks: Collection[str], globs: Sequence[str]) -> list[str]:
    """Return the Linears that any glob matches; without globs the pruned ones, or all of a dense model's decoder.

    Args:
        model: may be without weights.
        masks: names of the pruned Linears.
        globs: of names in memory.
    """
    if masks and not globs:
        names = pruned_modules(model, masks)
    else:
        if not globs:
            path, _ = decoder_stack(model, architecture_of(model))
            globs = [f"{path}.*"]
        linears = [name for name, module in model.named_modules() if is_matrix(module)]
        check_globs("target", globs, linears)
        names = [name for name in linears if matches(name, globs)]
    _check_supported(model, names)
    return names


def _check_supported(model: Any, names: Sequence[str]) -> None:
    """Refuse Linears that peft does not take: the kernels of Mamba read some weights themselves."""
    check: Any = getattr(tuners_utils, "_check_lora_target_modules_mamba", None)
    if check is None:
        return
    for name in names:
        try:
            check(LoraConfig(), model, name.rpartition(".")[2])
        except ValueError:
            kind = model.config.model_type
            raise BarberError(f"LoRA cannot hold {name}: peft refuses it in {kind}; give targets without it") from None


def _begin_run(folder: Path, run: dict[str, Any]) -> None:
    """Write the run that the checkpoints in `folder` belong to; refuse a folder that holds those of another run."""
    path = folder / RUN_NAME
    if _last_checkpoint(folder) and path.is_file():
        earlier = read_json_object(path)
        other = [key for key in run if earlier.get(key) != run[key]]
        if other:
            raise BarberError(
                f"{folder} holds checkpoints of a run with other {', '.join(other)}: remove it to start anew"
            )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, run)


def _make_trainer(adapter: PeftModel, folder: Path, settings: LoraSettings, tokens: Tensor, quiet: bool) -> Trainer:
    """Build a Trainer that reports to nobody and keeps its last checkpoint in `folder`."""
    on_device = adapter.device.type != "cpu"
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=settings.steps, learning_rate=settings.learning_rate,
        per_device_train_batch_size=settings.batch_size, gradient_accumulation_steps=settings.gradient_accumulation,
        warmup_steps=round(settings.warmup * settings.steps), weight_decay=settings.weight_decay, seed=settings.seed,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(settings.scheduler, settings.scheduler),
        logging_steps=settings.logging_steps, logging_nan_inf_filter=False, save_steps=settings.saving_steps,
        save_total_limit=1, report_to="none", disable_tqdm=quiet or not sys.stderr.isatty(), use_cpu=not on_device,
        dataloader_pin_memory=on_device, label_names=["labels"], **_checkpointing(settings),
    )  # fmt: skip
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several would mean DataParallel
    windows: Any = [{"input_ids": window, "labels": window} for window in tokens]
    trainer = Trainer(adapter, arguments, train_dataset=windows)
    trainer.remove_callback(PrinterCallback)
    return trainer


def _checkpointing(settings: LoraSettings) -> dict[str, Any]:
    """Return the arguments of gradient checkpointing by the names that the installed transformers has for them."""
    if not settings.gradient_checkpointing:
        return {}
    name = "activation_checkpointing"
    if name not in {field.name for field in fields(TrainingArguments)}:
        name = "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}


def _train(trainer: Trainer, folder: Path) -> float:
    """Train to the end, from the last complete checkpoint in `folder` if there is one, and return the seconds."""
    started = time.perf_counter()
    adapter: Any = trainer.model
    last = _last_checkpoint(folder)
    if last is None:
        trainer.train()
    else:
        state = TrainerState.load_from_json(str(last / STATE_NAME))
        if state.global_step < trainer.args.max_steps:
            trainer.train(resume_from_checkpoint=str(last))
        else:  # the Trainer would take one step more
            trainer.state = state
            load_weights(adapter, last)
    for parameter in adapter.parameters():
        if parameter.requires_grad and not parameter.isfinite().all():
            rate = trainer.args.learning_rate
            raise BarberError(f"training diverged: learning rate {rate:g} is too high for this model")
    return time.perf_counter() - started


def _last_checkpoint(folder: Path) -> Path | None:
    """Return the complete checkpoint of the most steps, None where there is none.

    The Trainer writes its state last, so a checkpoint that a kill left half-written has none.
    """
    complete = {}
    for path in folder.glob("checkpoint-*"):
        with suppress(BarberError):
            read_json(path / STATE_NAME)
            complete[int(path.name.rpartition("-")[2])] = path
    return complete[max(complete)] if complete else None


def _loss_curve(trainer: Trainer) -> list[dict[str, float]]:
    """Return the mean training loss of the steps up to each point."""
    points = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [{"step": entry["step"], "loss": entry["loss"]} for entry in points]
