"""The public verb of a recovery: a pruned or shrunk checkpoint in, the same with retrained kept weights out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from optimum_barber.base.errors import BarberError, FailedCheckError
from optimum_barber.base.files import read_json, write_json
from optimum_barber.base.notebook import notebook_table
from optimum_barber.base.output import check_output, staged
from optimum_barber.checkpoints.card import Step, write_card
from optimum_barber.checkpoints.carry import save_tokenizer
from optimum_barber.checkpoints.names import REPORT_NAME
from optimum_barber.checkpoints.pruned import PrunedModel, carry_masks
from optimum_barber.checkpoints.push import Published
from optimum_barber.checkpoints.verify import verify_checkpoint
from optimum_barber.checkpoints.write import check_settings, save_model
from optimum_barber.integrations.training.dense import DenseModel, recorded_name
from optimum_barber.integrations.training.masks import KeepMasks
from optimum_barber.integrations.training.record import run_record
from optimum_barber.integrations.training.settings import RecoverConfig
from optimum_barber.integrations.training.trainer import (
    Learner,
    Training,
    training_folder,
)
from optimum_barber.models.device import choose_device
from optimum_barber.models.dtypes import cast_parameters, parameter_dtypes, restore_dtypes
from optimum_barber.models.linears import check_globs, matches
from optimum_barber.text.perplexity import perplexity
from optimum_barber.text.sources import text_files
from optimum_barber.text.tokens import Encoder
from optimum_barber.text.training import training_windows
from optimum_barber.text.windows import Calibration, TokenWindows, sequence_length, windows_for

STEP = "recover"


@dataclass
class RecoverResult(Published):
    """The recovered model, what its `report.json` says of the recovery, and where both lie."""

    model: Any
    report: dict[str, Any]
    directory: Path | None = None

    def _repr_html_(self) -> str:
        title = f"Recovered in {self.report['steps']} steps; held-out loss in nats a token"
        return notebook_table(title, self.report["held_out_loss"], ["step", "loss"])


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
        windows: Calibration = None,
        held_out: Calibration = None,
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
            windows: texts or token windows to train on, and `held_out` to measure by; None for `config.calibration`.
            overwrite: whether `save_dir` may hold something already, which stays until the end, and whether the
                checkpoints of another run are discarded.
            quiet: no progress bar.
            callbacks: of the Trainer.
            scratch: folder of the checkpoints, which outlives a kill; None for `SAVE_DIR.training`.

        Raises:
            BarberError: bad input; nothing was written.
            FailedCheckError: the training did not lower the held-out loss; nothing was written.
        """
        opened, dense = self._open(config)
        inputs = [self.sparse, *text_files(config.calibration.texts)]
        if dense is not None:
            inputs.append(dense.reference.path)
        output = check_output(save_dir, overwrite, inputs)
        windows, held_out = self._windows(opened, config, windows, held_out)
        folder = scratch or output.with_name(output.name + ".training")
        run = {**run_record(opened, dense, config, windows), "held_out": held_out.as_dict()}
        with training_folder(folder, run, overwrite):
            before = perplexity(opened.model, held_out, quiet).as_dict()
            learner = Learner(opened.model, config, dense.load("float32", opened.model.device) if dense else None)
            training = Training(
                learner, config, folder, windows.tokens, run["precision"], held_out.tokens, config.patience,
                [KeepMasks(opened.model, opened.masks), *callbacks], quiet,
            )  # fmt: skip
            history = trained_in_float32(opened.model, training)
            after = perplexity(opened.model, held_out, quiet).as_dict()
            report = {**run, **history, "perplexity_before": before, "perplexity_after": after}
            with staged(output) as partial:
                self._save(partial, opened, report, config)
        return RecoverResult(opened.model, report, output)

    def _open(self, config: RecoverConfig) -> tuple[PrunedModel, DenseModel | None]:
        """Load the checkpoint onto the device, and find the dense model if the loss needs one."""
        opened = PrunedModel.load(self.sparse)
        dense = None
        if config.loss == "distill":
            dense = DenseModel.of(opened, self.base)
        else:
            self._check_without_dense(opened)
        check_settings(opened.model)
        choose_parameters(opened.model, config.parameters)
        opened.model.to(choose_device(config.device))
        return opened, dense

    def _check_without_dense(self, opened: PrunedModel) -> None:
        """Refuse, for a loss that needs no dense model, one that is given, and a checkpoint that is dense itself."""
        if self.base is not None:
            raise BarberError(f"base {str(self.base)!r} goes with loss distill: loss lm learns from text alone")
        if recorded_name(opened.reference.directory) is None and opened.record is None:
            raise BarberError(f"{self.sparse} is no pruned or shrunk checkpoint: it has no record of either")

    def _windows(
        self, opened: PrunedModel, config: RecoverConfig, windows: Calibration, held_out: Calibration
    ) -> tuple[TokenWindows, TokenWindows]:
        """Return the windows to train on and to measure by, those that are given or those of the text."""
        if (windows is None) != (held_out is None):
            raise BarberError("windows and held_out go together: give both, or neither")
        if windows is None:
            return windows_of(opened, config)
        wanted = []
        for one in (windows, held_out):
            wanted.append(windows_for(opened.model, opened.tokenizer, config.calibration, config.seed, one))
        return wanted[0], wanted[1]

    def _save(self, directory: Path, opened: PrunedModel, report: dict[str, Any], config: RecoverConfig) -> None:
        save_model(directory, opened.model, opened.reference)
        save_tokenizer(directory, opened.tokenizer, opened.reference)
        named = ("loss", "steps", "learning_rate", "temperature", "lm_weight", "seed")
        step = {"name": STEP, **{name: report["settings"][name] for name in named}}
        carry_masks(opened.reference.directory, directory, {**step, "dense_model": report["dense_model"]})
        earlier = opened.reference.directory / REPORT_NAME
        pages = read_json(earlier) if earlier.is_file() else {}
        write_json(directory / REPORT_NAME, {**pages, STEP: report})
        base = report["dense_model"] if self.base is not None else None
        write_card(directory, opened.reference, Step(STEP, config, report["windows"]["source"], base))
        if opened.record is not None:
            for fault in verify_checkpoint(directory).faults:
                raise BarberError(f"the masks do not hold: {fault}; nothing was written")


def trained_in_float32(model: Any, training: Training) -> dict[str, Any]:
    """Train a model's parameters in float32, whatever their dtypes, and return the history."""
    dtypes = parameter_dtypes(model)
    cast_parameters(model, "float32")
    history = training.train()
    check_gain(history["held_out_loss"])
    restore_dtypes(model, dtypes)
    return history


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


def check_gain(losses: Sequence[dict[str, float]]) -> None:
    """Refuse a training under which the held-out loss never fell below that of the first look."""
    first, best = losses[0]["loss"], min(look["loss"] for look in losses)
    if not best < first:
        raise FailedCheckError(
            f"training did not lower the held-out loss of {first:.4g}: give a lower learning rate, or more text; "
            "nothing was written"
        )
