"""Open an adapter under its own masks, merge it without filling a zero, verify it."""

from pathlib import Path
from typing import Any

from peft import PeftModel

from optimum_barber.base.errors import BarberError
from optimum_barber.checkpoints.pruned import PrunedModel, carry_masks
from optimum_barber.checkpoints.verify import Verification, verify_checkpoint
from optimum_barber.checkpoints.write import ONE_FILE
from optimum_barber.integrations.lora.adapter import MERGE_STEP, Adapter, Base, load_weights, open_base
from optimum_barber.integrations.lora.masked_lora import check_zeros, masked_lora


def load_adapter(adapter: str | Path, model: Base | None = None, is_trainable: bool = False) -> PeftModel:
    """Open an adapter under the masks that it was trained under; plain LoRA opens on dense models.

    Args:
        adapter: its directory.
        model: its base: a `PrunedModel`, a directory or hub id, or a model loaded from one, which is changed in place;
            None for the one it was trained on.
        is_trainable: True to train it on; else everything is frozen, and the model in eval mode.

    Raises:
        BarberError: other masks, with both fingerprints; a newer format; weights that do not fit.
    """
    read = Adapter.read(adapter)
    module, record, masks, name = open_base(read.base(model))
    read.check(record, masks, name)
    read.config.inference_mode = not is_trainable
    read.config.base_model_name_or_path = None  # peft sets it, and warns where it was set
    peft = masked_lora(module, masks, read.config)
    peft.peft_config["default"].base_model_name_or_path = name
    load_weights(peft, read.directory)
    return peft if is_trainable else peft.eval()


def merge_lora(adapter: str | Path, output: str | Path, model: str | Path | None = None) -> None:
    """Write the model with the adapter merged in: an ordinary checkpoint with the same masks and dtype.

    Args:
        adapter: its directory.
        output: where the checkpoint goes; the caller stages it.
        model: directory or hub id of the model; None for the one it was trained on.

    Raises:
        BarberError: as `load_adapter`; NaN or Inf; zeros that would be lost. Nothing was written.
    """
    read, output = Adapter.read(adapter), Path(output)
    base = PrunedModel.load(str(read.base(model)))
    merged = merge(load_adapter(adapter, base), read.directory)
    check_zeros(merged, base.masks)
    merged.save_pretrained(output, max_shard_size=base.reference.shard_bytes or ONE_FILE)
    base.tokenizer.save_pretrained(output)
    step = {"name": MERGE_STEP, "adapter_sha256": read.sha256, "rank": read.config.r, "alpha": read.config.lora_alpha}
    carry_masks(base.reference.directory, output, step)


def merge(peft: PeftModel, name: str | Path) -> Any:
    """Merge the adapter into the transformers model and return that.

    Raises:
        BarberError: the adapter is not finite.
    """
    try:
        return peft.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise BarberError(f"adapter {name} cannot be merged: {error}") from None


def verify_adapter(adapter: str | Path, model: str | Path | None = None) -> Verification:
    """Check base and binding, and count the zeros that the merged weights keep, module by module.

    Of plain LoRA on a dense model, only that it can be merged is checked; its pattern is "dense".

    Raises:
        BarberError: there is no adapter, or no model for it.
    """
    base = PrunedModel.load(str(Adapter.read(adapter).base(model)))
    outcome = verify_checkpoint(base.reference.directory) if base.masks else Verification("dense")
    try:
        merged = merge(load_adapter(adapter, base), adapter)
    except BarberError as error:
        outcome.faults.append(str(error))
        return outcome
    outcome.zeros = 0
    for name, mask in base.masks.items():
        weight = merged.get_parameter(f"{name}.weight").detach()
        kept = mask.pruned - int(weight[~mask.unpack()].count_nonzero())
        outcome.zeros += kept
        if kept < mask.pruned:
            outcome.faults.append(f"{name}: merging loses {mask.pruned - kept} of {mask.pruned} zeros")
    return outcome
