"""Stages that change kept weights: `recover`, `lora` under the masks, `merge` and `quantize`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from optimum_barber.integrations.lora.settings import LoraSettings
from optimum_barber.integrations.quantization.settings import QuantizeSettings
from optimum_barber.integrations.training.settings import RecoverConfig, RecoverSettings, TrainingSettings

from ....base.errors import BarberError
from ..stage import SharedSettings, Stage, StageContext, stage
from .prune import PruneStage


class TrainingStage(Stage, TrainingSettings):
    """The text of the stages that train."""

    follows = ("dense", "pruned", "tuned")
    first = "loss"
    needs_model = True

    train_texts: list[str] = Field(default_factory=list, description="texts to train on; default: the calibration's")
    sequence_length: int | None = Field(None, ge=2, description="tokens a window; default: the calibration's")
    held_out: float = Field(0.1, gt=0, lt=1, description="share of the text's end that is only measured")

    def texts(self) -> list[str]:
        """Return texts to train on."""
        return self.train_texts

    def device_of(self, shared: SharedSettings) -> str:
        """Return the stage's own device, or the recipe's."""
        return shared.device if self.device == "auto" else self.device

    def check_recoverable(self, earlier: Sequence[Stage]) -> None:
        """Refuse to learn from the dense model where the model is that itself."""
        if not any(before.reshapes or isinstance(before, PruneStage) for before in earlier):
            raise BarberError(f"{self.kind} has nothing to recover: no stage before it prunes or shrinks")

    def windows(self, context: StageContext) -> tuple[Any, Any]:
        """Return the windows to train on, as many as steps and batches take, and those of the text's end."""
        from ....models.loading import load_config, load_tokenizer, resolve_model
        from ....text.tokens import Encoder
        from ....text.training import training_windows
        from ....text.windows import sequence_length

        calibration, reference = context.shared.calibration, resolve_model(context.input_model)
        config = load_config(reference)
        return training_windows(
            self.train_texts or calibration.texts, Encoder.of(config, load_tokenizer(reference), calibration),
            samples=self.steps * self.batch_size * self.gradient_accumulation,
            length=sequence_length(config, self.sequence_length or calibration.sequence_length),
            seed=calibration.seed, held_out=self.held_out,
        )  # fmt: skip


@stage("recover")
class RecoverStage(TrainingStage, RecoverSettings):
    """Train the kept weights, the masks held, to do what the recipe's model does; the end of the text is held out."""

    gives = "tuned"

    def check(self, shared: SharedSettings, earlier: Sequence[Stage]) -> None:
        """Refuse a recipe in which nothing was lost before."""
        self.check_recoverable(earlier)

    def check_model(self, model: Any, earlier: Sequence[Stage]) -> None:
        """Refuse parameters that the model has not."""
        from ....models.linears import check_globs

        check_globs("parameters", self.parameters, [name for name, _ in model.named_parameters()], "parameter")

    def run(self, context: StageContext) -> dict[str, Any]:
        """Train; goes on from its last checkpoint after a kill."""
        from optimum_barber.integrations.training.recover import BarberRecoverer

        shared = context.shared
        settings = {**self.part(RecoverSettings).model_dump(), "device": self.device_of(shared)}
        config = RecoverConfig(**settings, calibration=shared.run_settings()["calibration"])
        windows, held_out = self.windows(context)
        recoverer = BarberRecoverer(context.input_model, base=shared.model if self.loss == "distill" else None)
        report = recoverer.recover(
            config, context.output_model, windows, held_out, quiet=context.quiet, scratch=context.scratch,
            callbacks=[_loss_to(context)],
        ).report  # fmt: skip
        return {**_figures(report), "held_out_loss": _by_step(report["held_out_loss"])}


def _figures(report: dict[str, Any]) -> dict[str, Any]:
    """Return what a training's report says in figures."""
    before, after = report["perplexity_before"], report["perplexity_after"]
    return {
        "steps": report["steps"], "loss": _by_step(report["loss"]), "held_out_perplexity_before": before["perplexity"],
        "held_out_perplexity_after": after["perplexity"],
    }  # fmt: skip


def _by_step(curve: Sequence[dict[str, float]]) -> dict[str, float]:
    return {str(point["step"]): point["loss"] for point in curve}


@stage("lora")
class LoraStage(TrainingStage, LoraSettings):
    """Train a LoRA whose delta the masks hold, on text; the end of the text is held out."""

    gives = "adapter"

    def check(self, shared: SharedSettings, earlier: Sequence[Stage]) -> None:
        """Refuse to learn from the dense model where nothing was lost before."""
        if self.loss == "distill":
            self.check_recoverable(earlier)

    def check_model(self, model: Any, earlier: Sequence[Stage]) -> None:
        """Refuse targets that the model has not, and pruned experts as targets."""
        from optimum_barber.integrations.lora.training import target_linears

        from ....models.linears import linear_shapes, target_names
        from ....models.source import ModelSource

        pruned: list[str] = []
        for before in earlier:
            if isinstance(before, PruneStage):
                pruned = target_names(linear_shapes(ModelSource(model)), before.ignore)
        target_linears(model, pruned, self.targets)

    def run(self, context: StageContext) -> dict[str, Any]:
        """Train; goes on from its last checkpoint after a kill."""
        from optimum_barber.integrations.lora.training import train_lora

        windows, held_out = self.windows(context)
        settings = LoraSettings(**{**self.part(LoraSettings).model_dump(), "device": self.device_of(context.shared)})
        report = train_lora(
            context.input_model, context.output_model, settings, windows, held_out,
            quiet=context.quiet, scratch=context.scratch, callbacks=[_loss_to(context)], dense=context.shared.model,
        )  # fmt: skip
        return _figures(report)


def _loss_to(context: StageContext) -> Any:
    """Return a callback of transformers' Trainer that passes the loss on to the trackers."""
    from transformers import TrainerCallback

    class LossLogger(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            figures = {key: value for key, value in (logs or {}).items() if key == "loss"}
            context.log(figures, state.global_step)

    return LossLogger()


@stage("merge")
class MergeStage(Stage):
    """Merge the adapter into its base: an ordinary checkpoint again, every zero kept."""

    follows = ("adapter",)
    gives = "tuned"

    def run(self, context: StageContext) -> dict[str, Any]:
        """Merge."""
        from optimum_barber.integrations.lora.checkpoint import merge_lora

        merge_lora(Path(context.input_model), context.output_model)
        return {}


@stage("quantize")
class QuantizeStage(Stage, QuantizeSettings):
    """Quantize the Linears of all blocks under the masks, on the recipe's calibration set."""

    follows = ("dense", "pruned", "tuned")
    gives = "quantized"
    needs_model = True

    def check_model(self, model: Any, earlier: Sequence[Stage]) -> None:
        """Refuse a group size that does not fit, and what could not be packed or read back."""
        from optimum_barber.integrations.quantization.quantize import check_quantizable

        from ....models.source import ModelSource

        check_quantizable(ModelSource(model), self.part(QuantizeSettings))

    def run(self, context: StageContext) -> dict[str, Any]:
        """Quantize, block by block."""
        from optimum_barber.integrations.quantization.quantize import quantize_model

        from ....models.loading import load_config, load_tokenizer, resolve_model
        from ....text.tokens import Encoder
        from ....text.windows import calibration_windows, sequence_length

        calibration, reference = context.shared.calibration, resolve_model(context.input_model)
        config = load_config(reference)
        windows = calibration_windows(
            calibration.texts, Encoder.of(config, load_tokenizer(reference), calibration),
            samples=calibration.samples, length=sequence_length(config, calibration.sequence_length),
            seed=calibration.seed,
        )  # fmt: skip
        return quantize_model(
            context.input_model, context.output_model, self.part(QuantizeSettings), windows, quiet=context.quiet,
            device=context.shared.device, dtype=context.shared.dtype,
        )  # fmt: skip
