"""The stage `permute`: channels change places, so that the N:M masks of a later stage drop less."""

from collections.abc import Sequence
from typing import Any

from ....shrink.permute_settings import PermuteConfig, PermuteSettings
from ..stage import SharedSettings, Stage, StageContext, stage


@stage("permute")
class PermuteStage(Stage, PermuteSettings):
    """Reorder channels of the FFN, of attention's values or of the stream; what follows works on the result."""

    follows = ("dense",)
    gives = "dense"
    first = "pattern"
    needs_model = True

    def config(self, shared: SharedSettings) -> PermuteConfig:
        """Return the run's settings."""
        settings = self.model_dump(include=set(PermuteSettings.model_fields))
        return PermuteConfig(**shared.run_settings(), dtype=shared.dtype, **settings)

    def check_model(self, model: Any, earlier: Sequence[Stage]) -> None:
        """Refuse a model whose channels are not known, or do not fit the pattern."""
        from ....models.source import ModelSource
        from ....shrink.permuter import checked_sites

        checked_sites(ModelSource(model), self)

    def run(self, context: StageContext) -> dict[str, Any]:
        """Permute the model that the stages before left."""
        from ....shrink.permuter import BarberPermuter

        permuter = BarberPermuter.from_pretrained(context.dense_model, context.shared.dtype)
        config = self.config(context.shared)
        record = permuter.permute(config, save_dir=context.output_model, quiet=context.quiet).record
        figures: dict[str, Any] = {}
        for kind, (before, after) in record.dropped().items():
            figures[kind] = {"dropped_before": before, "dropped_after": after}
        return figures
