"""The public verb of a recovery: a pruned or shrunk checkpoint in, the same with retrained kept weights out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from optimum_barber.base.errors import BarberError, FailedCheckError
from optimum_barber.base.files import read_json, write_json
from optimum_barber.base.output import check_output, staged
from optimum_barber.checkpoints.carry import save_tokenizer
from optimum_barber.checkpoints.names import REPORT_NAME
from optimum_barber.checkpoints.pruned import PrunedModel, carry_masks
from optimum_barber.checkpoints.record import fingerprint_of
from optimum_barber.checkpoints.verify import verify_checkpoint
from optimum_barber.checkpoints.write import check_settings, save_model
from optimum_barber.integrations.training.dense import DenseModel
from optimum_barber.integrations.training.masks import KeepMasks
from optimum_barber.integrations.training.settings import RecoverConfig, RecoverSettings
from optimum_barber.integrations.training.trainer import (
    Learner,
    Training,
    begin_training,
    finish_training,
    stated_products,
)
from optimum_barber.models.device import choose_device
from optimum_barber.models.dtypes import cast_parameters, parameter_dtypes, restore_dtypes
from optimum_barber.models.linears import check_globs, matches
from optimum_barber.text.perplexity import perplexity
from optimum_barber.text.sources import text_files
from optimum_barber.text.tokens import Encoder
from optimum_barber.text.training import training_windows
from optimum_barber.text.windows import TokenWindows, sequence_length

STEP = "recover"


@dataclass
class RecoverResult:
    """The recovered model, and what its `report.json` says of the recovery."""

    model: Any
    report: dict[str, Any]


class BarberRecoverer:
    """Trains the kept weights of a pruned or shrunk checkpoint, its masks held, to do what the dense model does.

    Args:
        sparse: directory that `prune`, `shrink` or a later step wrote.
        base: the dense model to learn from; None for the recorded one, before any cut.
    """

    def __init__(self, sparse: str | Path, base: str | Path | None = None) -> None:
        self.sparse = Path(sparse)
        self.base = base

    def recover(
        self,
        config: RecoverConfig,
        save_dir: str | Path,
        windows: TokenWindows | None = None,
        held_out: TokenWindows | None = None,
        overwrite: bool = False,
        quiet: bool = False,
        callbacks: Sequence[TrainerCallback] = (),
        scratch: Path | None = None,
    ) -> RecoverResult:
        """Train, choose the weights of the lowest held-out loss, and write them in the checkpoint's dtype.

        A call that finds the checkpoints of a killed one goes on from the last, on a CPU to the same bits.

        Args:
            config: everything that decides the training.
            save_dir: where the checkpoint goes; written beside and renamed at the end.
            windows: token windows to train on, and `held_out` to measure by; None for those of `config.calibration`.
            overwrite: whether `save_dir` may hold something already; it stays until the end.
            quiet: no progress bar.
            callbacks: of the Trainer.
            scratch: folder of the checkpoints, which outlives a kill; None for `SAVE_DIR.training`.

        Raises:
            BarberError: bad input; nothing was written.
            FailedCheckError: the training did not lower the held-out loss; nothing was written.
        """
        output = check_output(save_dir, overwrite, [self.sparse, *text_files(config.calibration.texts)])
        opened = PrunedModel.load(self.sparse)
        check_settings(opened.model)
        dtypes = parameter_dtypes(opened.model)
        cast_parameters(opened.model, "float32")
        dense = DenseModel.of(opened, self.base) if config.loss == "distill" else None
        choose_parameters(opened.model, config.parameters)
        if windows is None or held_out is None:
            windows, held_out = windows_of(opened, config)
        folder = scratch or output.with_name(output.name + ".training")
        with staged(output) as partial:
            report = self._trained(opened, dense, config, windows, held_out, folder, quiet, callbacks)
            restore_dtypes(opened.model, dtypes)
            report["perplexity_after"] = perplexity(opened.model, held_out, quiet).as_dict()
            self._save(partial, opened, report)
        finish_training(folder)
        return RecoverResult(opened.model, report)

    def _trained(
        self,
        opened: PrunedModel,
        dense: DenseModel | None,
        config: RecoverConfig,
        windows: TokenWindows,
        held_out: TokenWindows,
        folder: Path,
        quiet: bool,
        callbacks: Sequence[TrainerCallback],
    ) -> dict[str, Any]:
        """Train the model in memory and return the report."""
        settings = RecoverSettings(**{name: getattr(config, name) for name in RecoverSettings.model_fields})
        opened.model.to(choose_device(config.device))
        products = stated_products(opened.model, settings)
        run = run_record(opened, dense, settings, products, windows, held_out)
        begin_training(folder, run)
        before = perplexity(opened.model, held_out, quiet).as_dict()
        learner = Learner(opened.model, settings, dense.load(opened.model) if dense else None)
        training = Training(
            learner, settings, folder, windows.tokens, products, held_out.tokens, settings.patience,
            [KeepMasks(opened.model, opened.masks), *callbacks], quiet,
        )  # fmt: skip
        history = training.train()
        check_gain(history["held_out_loss"])
        return {**run, **history, "perplexity_before": before}

    def _save(self, directory: Path, opened: PrunedModel, report: dict[str, Any]) -> None:
        save_model(directory, opened.model, opened.reference)
        save_tokenizer(directory, opened.tokenizer, opened.reference)
        named = ("loss", "steps", "learning_rate", "temperature", "lm_weight", "seed")
        step = {"name": STEP, **{name: report["settings"][name] for name in named}}
        carry_masks(opened.reference.directory, directory, {**step, "dense_model": report["dense_model"]})
        earlier = opened.reference.directory / REPORT_NAME
        pages = read_json(earlier) if earlier.is_file() else {}
        write_json(directory / REPORT_NAME, {**pages, STEP: report})
        if opened.record is not None:
            for fault in verify_checkpoint(directory).faults:
                raise BarberError(f"the masks do not hold: {fault}; nothing was written")


def choose_parameters(model: Any, globs: Sequence[str]) -> None:
    """Make the parameters that any glob matches trainable, all without globs, and no other.

    Raises:
        BarberError: a glob matches none.
    """
    names = [name for name, _ in model.named_parameters()]
    check_globs("parameters", globs, names, kind="parameter")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not globs or matches(name, globs))


def windows_of(opened: PrunedModel, config: RecoverConfig) -> tuple[TokenWindows, TokenWindows]:
    """Return the windows to train on, as many as steps and batches take, and those of the text's end."""
    model, calibration = opened.model, config.calibration
    return training_windows(
        calibration.texts or ["c4"],
        Encoder.of(model, opened.tokenizer, calibration),
        samples=config.steps * config.batch_size * config.gradient_accumulation,
        length=sequence_length(model.config, calibration.sequence_length),
        seed=config.seed,
        held_out=config.held_out,
    )


def run_record(
    opened: PrunedModel,
    dense: DenseModel | None,
    settings: RecoverSettings,
    products: str,
    windows: TokenWindows,
    held_out: TokenWindows,
) -> dict[str, Any]:
    """Return what decides the result: checkpoints of a run with another record are not resumed."""
    masks = {name: mask.sha256 for name, mask in opened.masks.items()}
    return {
        "settings": settings.model_dump(),
        "base_model": opened.reference.full_name,
        "dense_model": dense.name if dense else None,
        "device": str(opened.model.device),
        "precision": products,
        "mask_fingerprint": fingerprint_of(masks) if masks else None,
        "windows": windows.as_dict(settings.seed),
        "held_out": held_out.as_dict(),
    }


def check_gain(losses: Sequence[dict[str, float]]) -> None:
    """Refuse a training under which the held-out loss never fell below that of the first look."""
    first, best = losses[0]["loss"], min(look["loss"] for look in losses)
    if not best < first:
        raise FailedCheckError(
            f"training did not lower the held-out loss of {first:.4g}: give a lower learning rate, or more text; "
            "nothing was written"
        )
