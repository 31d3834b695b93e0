"""Training an adapter on a pruned or dense model, resumable after a kill."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from peft.tuners import tuners_utils
from transformers import TrainerCallback, set_seed

from optimum_barber.base.errors import BarberError
from optimum_barber.base.files import write_json
from optimum_barber.checkpoints.card import write_adapter_card
from optimum_barber.checkpoints.pruned import PrunedModel
from optimum_barber.integrations.lora.checkpoint import save_adapter
from optimum_barber.integrations.lora.masked_lora import masked_lora, pruned_modules
from optimum_barber.integrations.lora.settings import LoraSettings
from optimum_barber.integrations.training.dense import DenseModel
from optimum_barber.integrations.training.record import run_record
from optimum_barber.integrations.training.trainer import Learner, Training, training_folder
from optimum_barber.models.architectures import architecture_of, decoder_stack
from optimum_barber.models.device import choose_device, working_dtype
from optimum_barber.models.linears import check_globs, matches
from optimum_barber.models.matrices import is_matrix
from optimum_barber.text.perplexity import perplexity
from optimum_barber.text.windows import TokenWindows

REPORT_NAME = "lora_training.json"


def train_lora(
    model: str | Path,
    output: str | Path,
    settings: LoraSettings,
    windows: TokenWindows,
    held_out: TokenWindows | None = None,
    quiet: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    scratch: Path | None = None,
    dense: str | Path | None = None,
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
        dense: the model to learn from under loss distill; None for the recorded one.

    Returns:
        What `lora_training.json` holds: settings, seconds of this call, steps, perplexities, the loss curve.
    """
    output, device = Path(output), choose_device(settings.device)
    opened = PrunedModel.load(model, working_dtype(settings.dtype, device, on_gpu="bfloat16"))
    teacher = DenseModel.of(opened, dense) if settings.loss == "distill" else None
    targets = target_linears(opened.model, opened.masks, settings.targets)
    opened.model.to(device)
    dtype = str(opened.model.dtype).removeprefix("torch.")
    run = {**run_record(opened, teacher, settings, windows), "dtype": dtype}
    folder = scratch or output.with_name(output.name + ".training")
    with training_folder(folder, run):
        before = after = None
        if held_out:
            before = perplexity(opened.model, held_out, quiet).as_dict()
        adapter = _new_adapter(opened, settings, targets)
        learner = Learner(adapter, settings, teacher.load(dtype, device) if teacher else None)
        products = run["precision"]
        training = Training(learner, settings, folder, windows.tokens, products, callbacks=callbacks, quiet=quiet)
        history = training.train()
        if held_out:
            after = perplexity(adapter, held_out, quiet).as_dict()
        report = {
            **run, "seconds": history["seconds"], "steps": history["steps"], "perplexity_before": before,
            "perplexity_after": after, "loss": history["loss"],
        }  # fmt: skip
        save_adapter(adapter, output, opened.reference.full_name)
        write_json(output / REPORT_NAME, report)
        write_adapter_card(output, opened.reference, report)
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
