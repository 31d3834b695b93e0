"""The stage `shrink`: heads and channels, or experts, go, and the model becomes smaller."""

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from ....shrink.settings import ShrinkConfig, ShrinkSettings
from ..stage import SharedSettings, Stage, StageContext, stage


@stage("shrink")
class ShrinkStage(Stage, ShrinkSettings):
    """Cut heads and FFN channels, or experts, out of the dense model; what follows works on the smaller one."""

    follows = ("dense",)
    gives = "dense"
    first = "scorer"
    reshapes = True

    latency: bool = Field(True, description="measure prefill and decode before and after")

    def files(self) -> list[str]:
        """Return the record of a cut to be done again."""
        return [self.structure] if self.structure is not None else []

    def config(self, shared: SharedSettings) -> ShrinkConfig:
        """Return the run's settings."""
        settings = self.model_dump(include=set(ShrinkSettings.model_fields))
        return ShrinkConfig(**shared.run_settings(), dtype=shared.dtype, **settings)

    def check(self, shared: SharedSettings, earlier: Sequence[Stage]) -> None:
        """Refuse scorers and arguments that nobody knows."""
        from ....shrink.shrinker import scoring_function

        scoring_function(self.config(shared))

    def run(self, context: StageContext) -> dict[str, Any]:
        """Shrink the model that the stages before left."""
        from ....shrink.shrinker import BarberShrinker

        shrinker = BarberShrinker.from_pretrained(context.dense_model, context.shared.dtype)
        report = shrinker.shrink(
            self.config(context.shared), save_dir=context.output_model, latency=self.latency, quiet=context.quiet
        ).report
        figures: dict[str, Any] = {"removed": report["removed"]} if "removed" in report else {}
        for kind in ("heads", "channels", "experts"):
            if kind in report:
                figures[kind] = report[kind]["after"]
        for measure in ("parameters", "macs_per_token"):
            for state in ("before", "after"):
                if measure in report[state]:
                    figures[f"{measure}_{state}"] = report[state][measure]
        figures["latency"] = {}
        for state in ("before", "after"):
            if "latency" in report[state]:
                seconds = report[state]["latency"]
                figures["latency"][state] = {name: seconds[name]["median"] for name in ("prefill", "decode")}
        return figures
