"""The stage `shrink`: heads and channels go, and the model becomes smaller."""

from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationError

from ....base.errors import BarberError
from ....base.fields import one_line
from ....shrink.settings import ShrinkConfig, ShrinkSettings
from ..stage import Stage, Work, stage

if TYPE_CHECKING:
    from ..schema import Recipe


@stage("shrink")
class ShrinkStage(Stage, ShrinkSettings):
    """Cut heads and FFN channels out of the dense model; what follows works on the smaller one."""

    follows = ("dense",)
    gives = "dense"

    latency: bool = Field(True, description="measure prefill and decode before and after")

    def files(self) -> list[str]:
        """The record of a cut to be done again."""
        return [self.structure] if self.structure is not None else []

    def config(self, recipe: "Recipe") -> ShrinkConfig:
        """The run's settings."""
        own = {name: getattr(self, name) for name in ShrinkSettings.model_fields}
        return ShrinkConfig(
            calibration=recipe.calibration.windows(), seed=recipe.calibration.seed, device=recipe.device,
            dtype=recipe.dtype, **own,
        )  # fmt: skip

    def faults(self, recipe: "Recipe") -> list[tuple[str, str]]:
        """Scorers and arguments that nobody knows, shares that exclude each other."""
        from ....base.arguments import parse_arguments
        from ....shrink.scorers import as_scorer

        try:
            config = self.config(recipe)
            parse_arguments(as_scorer(config.scorer), config.scorer, config.scorer_args, "scorer")
        except ValidationError as error:
            return [("scorer", str(one_line(error)))]
        except BarberError as error:
            return [("scorer", str(error))]
        return []

    def run(self, work: Work) -> dict[str, Any]:
        """Shrink the model that the stages before left."""
        from ....shrink.shrinker import BarberShrinker

        config = self.config(work.recipe)
        shrinker = BarberShrinker.from_pretrained(work.base, work.recipe.dtype)
        report = shrinker.shrink(config, save_dir=work.target, latency=self.latency, quiet=work.quiet).report
        return {
            "removed": report["removed"], "heads": report["heads"]["after"], "channels": report["channels"]["after"],
            "parameters_before": report["before"]["parameters"], "parameters_after": report["after"]["parameters"],
            "macs_per_token_before": report["before"]["macs_per_token"],
            "macs_per_token_after": report["after"]["macs_per_token"],
            "latency": {state: speeds(report[state]) for state in ("before", "after") if "latency" in report[state]},
        }  # fmt: skip


def speeds(measured: dict[str, Any]) -> dict[str, float]:
    """Median seconds of prefill and decode."""
    return {name: measured["latency"][name]["median"] for name in ("prefill", "decode")}
