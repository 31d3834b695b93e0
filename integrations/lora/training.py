"""Training an adapter on a pruned or dense model with transformers' Trainer, resumable after a kill."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import TrainerCallback, set_seed

from optimum_barber.base.errors import BarberError
from optimum_barber.base.files import read_json_object, write_json
from optimum_barber.checkpoints.pruned import PrunedModel
from optimum_barber.integrations.lora.adapter import save_adapter
from optimum_barber.integrations.lora.binding import mask_fingerprint
from optimum_barber.integrations.lora.masked_lora import masked_lora
from optimum_barber.integrations.lora.settings import LoraSettings
from optimum_barber.integrations.lora.trainer import last_checkpoint, loss_curve, make_trainer, train
from optimum_barber.models.architectures import architecture_of, decoder_stack
from optimum_barber.models.device import choose_device, working_dtype
from optimum_barber.models.linears import check_globs, matches
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
    opened = PrunedModel.load(model, working_dtype(settings.dtype, device, on_gpu="bfloat16"))
    run = describe_run(opened, settings, windows, device)
    folder = scratch or output.with_name(output.name + ".training")
    begin_run(folder, run)
    opened.model.to(device)
    before = after = None
    if held_out:
        before = perplexity(opened.model, held_out, quiet).as_dict()
    adapter = new_adapter(opened, settings)
    trainer = make_trainer(adapter, folder, settings, windows.tokens, quiet, callbacks)
    seconds = train(trainer, folder)
    if held_out:
        after = perplexity(adapter, held_out, quiet).as_dict()
    report = {
        **run,
        "seconds": seconds,
        "steps": trainer.state.global_step,
        "perplexity_before": before,
        "perplexity_after": after,
        "loss": loss_curve(trainer),
    }
    save_adapter(adapter, output, opened.reference.full_name)
    write_json(output / REPORT_NAME, report)
    shutil.rmtree(folder)
    return report


def new_adapter(opened: PrunedModel, settings: LoraSettings) -> PeftModel:
    """Put an adapter on the model that changes nothing yet: A is random by the seed, B zero."""
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
    """Return the Linears that any glob matches; without globs the pruned ones, or all of a dense model's decoder.

    Raises:
        BarberError: a glob matches nothing.
    """
    if pruned and not globs:
        return list(pruned)
    if not globs:
        path, _ = decoder_stack(model, architecture_of(model))
        globs = [f"{path}.*"]
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    check_globs("target", globs, linears)
    return [name for name in linears if matches(name, globs)]


def describe_run(
    opened: PrunedModel, settings: LoraSettings, windows: TokenWindows, device: torch.device
) -> dict[str, Any]:
    """Return what decides the adapter, for the report and to recognise a run."""
    return {
        "settings": settings.model_dump(),
        "base_model": opened.reference.full_name,
        "device": str(device),
        "dtype": str(next(opened.model.parameters()).dtype).removeprefix("torch."),
        "mask_fingerprint": mask_fingerprint(opened.masks) if opened.masks else None,
        "windows": windows.as_dict(),
    }


def begin_run(folder: Path, run: dict[str, Any]) -> None:
    """Write the run that the checkpoints in `folder` belong to.

    Raises:
        BarberError: checkpoints of other settings, masks or text lie there; names what differs.
    """
    path = folder / RUN_NAME
    if last_checkpoint(folder) and path.is_file():
        earlier = read_json_object(path)
        other = [key for key in run if earlier.get(key) != run[key]]
        if other:
            raise BarberError(
                f"{folder} holds checkpoints of a run with other {', '.join(other)}: remove it to start anew"
            )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, run)
