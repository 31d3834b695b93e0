"""Training an adapter on a pruned or dense model with transformers' Trainer, resumable after a kill."""

import json
import shutil
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import TrainerCallback, set_seed

from optimum_barber.base.errors import BarberError
from optimum_barber.base.files import write_json
from optimum_barber.checkpoints.pruned import PrunedModel
from optimum_barber.integrations.lora.adapter import save_adapter
from optimum_barber.integrations.lora.binding import mask_fingerprint
from optimum_barber.integrations.lora.masked_lora import masked_lora
from optimum_barber.integrations.lora.settings import LoraSettings
from optimum_barber.integrations.lora.trainer import last_checkpoint, loss_curve, make_trainer, train
from optimum_barber.models.architectures import architecture_of, decoder_stack
from optimum_barber.models.device import choose_device
from optimum_barber.text.perplexity import perplexity
from optimum_barber.text.windows import TokenWindows

REPORT_NAME = "lora_training.json"
RUN_NAME = "run.json"


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
        callbacks: for the Trainer.
        scratch: folder of the checkpoints, which outlives a kill; None for `OUTPUT.training`. Removed at the end.

    Returns:
        What `lora_training.json` holds: settings, seconds of this call, steps, perplexities, the loss curve.

    Raises:
        BarberError: bad input, the checkpoints of another run, or a training that diverged.
    """
    output, device = Path(output), choose_device(settings.device)
    opened = PrunedModel.load(model, working_dtype(settings, device))
    run = describe_run(opened, settings, windows, device)
    begin_run(folder := scratch or output.with_name(output.name + ".training"), run)
    opened.model.to(device)
    before = perplexity(opened.model, held_out, quiet).as_dict() if held_out else None
    adapter = new_adapter(opened, settings)
    trainer = make_trainer(adapter, folder, settings, windows.tokens, quiet, callbacks)
    report = {
        **run,
        "seconds": train(trainer, folder),
        "steps": trainer.state.global_step,
        "perplexity_before": before,
        "perplexity_after": perplexity(adapter, held_out, quiet).as_dict() if held_out else None,
        "loss": loss_curve(trainer),
    }
    save_adapter(adapter, output, opened.reference.full_name)
    write_json(output / REPORT_NAME, report)
    shutil.rmtree(folder)
    return report


def working_dtype(settings: LoraSettings, device: torch.device) -> str:
    """The dtype of the frozen weights that `auto` means on a device, or the configured one."""
    if settings.dtype != "auto":
        return settings.dtype
    return "float32" if device.type == "cpu" else "bfloat16"


def new_adapter(opened: PrunedModel, settings: LoraSettings) -> PeftModel:
    """The model with an adapter that changes nothing yet: A is seeded, B zero."""
    set_seed(settings.seed)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        use_rslora=settings.use_rslora,
        target_modules=target_linears(opened.model, list(opened.masks), settings.targets),
    )
    return masked_lora(opened.model, opened.masks, config)


def target_linears(model: nn.Module, pruned: Sequence[str], globs: Sequence[str]) -> list[str]:
    """The Linears that any glob matches; without globs the pruned ones, of a dense model those of its decoder layers.

    Raises:
        BarberError: a glob matches nothing.
    """
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not globs:
        path, _ = decoder_stack(model, architecture_of(model))
        return list(pruned) or [name for name in linears if name.startswith(f"{path}.")]
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in linears):
            raise BarberError(f"target {glob!r} matches no Linear, such as {linears[0]}")
    return [name for name in linears if any(fnmatchcase(name, glob) for glob in globs)]


def describe_run(
    opened: PrunedModel, settings: LoraSettings, windows: TokenWindows, device: torch.device
) -> dict[str, Any]:
    """What decides the adapter, for the report and to know a run again."""
    return {
        "settings": settings.model_dump(),
        "base_model": opened.reference.full_name,
        "device": str(device),
        "dtype": str(next(opened.model.parameters()).dtype).removeprefix("torch."),
        "mask_fingerprint": mask_fingerprint(opened.masks) if opened.masks else None,
        "windows": {
            "source": windows.source,
            "samples": len(windows.tokens),
            "sequence_length": windows.tokens.shape[1],
            "fingerprint": windows.fingerprint,
        },
    }


def begin_run(folder: Path, run: dict[str, Any]) -> None:
    """Note in `folder` whose checkpoints will lie there.

    Raises:
        BarberError: checkpoints of other settings, masks or text lie there; names what differs.
    """
    path = folder / RUN_NAME
    earlier = json.loads(path.read_text(encoding="utf-8")) if last_checkpoint(folder) and path.is_file() else run
    other = [key for key in run if earlier.get(key) != run[key]]
    if other:
        raise BarberError(f"{folder} holds checkpoints of a run with other {', '.join(other)}: remove it to start anew")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, run)
