"""The stage `quantize`."""

from typing import Any

from optimum_barber.integrations.quantization.settings import QuantizeSettings

from ..stage import Stage, StageContext, stage


@stage("quantize")
class QuantizeStage(Stage, QuantizeSettings):
    """Quantize the Linears of all blocks under the masks, on the recipe's calibration set."""

    follows = ("dense", "pruned", "tuned")
    gives = "quantized"

    def run(self, context: StageContext) -> dict[str, Any]:
        """Quantize, block by block."""
        from optimum_barber.integrations.quantization.quantize import quantize_model

        from ....models.loading import load_config, load_tokenizer, resolve_model
        from ....text.windows import calibration_windows, sequence_length

        calibration, reference = context.shared.calibration, resolve_model(context.input_model)
        length = sequence_length(load_config(reference), calibration.sequence_length)
        windows = calibration_windows(
            calibration.texts, load_tokenizer(reference), samples=calibration.samples, length=length,
            seed=calibration.seed, field=calibration.text_field,
        )  # fmt: skip
        return quantize_model(
            context.input_model, context.output_model, self.part(QuantizeSettings), windows, quiet=context.quiet,
            device=context.shared.device,
        )  # fmt: skip
