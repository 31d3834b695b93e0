"""The stage `quantize`."""

from typing import Any

from optimum_barber.integrations.quantization.settings import QuantizeSettings

from ..stage import Stage, Work, stage


@stage("quantize")
class QuantizeStage(Stage, QuantizeSettings):
    """Quantize the Linears of all blocks under the masks, on the recipe's calibration set."""

    follows = ("dense", "pruned", "tuned")
    gives = "quantized"

    def run(self, work: Work) -> dict[str, Any]:
        """Quantize, block by block."""
        from optimum_barber.integrations.quantization.quantize import quantize_model

        from ....models.loading import load_config, load_tokenizer, resolve_model
        from ....text.windows import calibration_windows, sequence_length

        given, reference = work.recipe.calibration, resolve_model(work.model)
        length = sequence_length(load_config(reference), given.sequence_length)
        windows = calibration_windows(
            given.texts, load_tokenizer(reference), samples=given.samples, length=length, seed=given.seed,
            field=given.text_field,
        )  # fmt: skip
        settings = QuantizeSettings(**{name: getattr(self, name) for name in QuantizeSettings.model_fields})
        return quantize_model(work.model, work.target, settings, windows, quiet=work.quiet, device=work.recipe.device)
