"""The stage `refine`: better masks by the divergence of the whole model."""

from typing import TYPE_CHECKING, Any

from ....prune.refine.settings import RefineConfig, RefineSettings
from ..stage import Stage, Work, stage
from .prune import PruneStage

if TYPE_CHECKING:
    from ..schema import Recipe


@stage("refine")
class RefineStage(Stage, RefineSettings):
    """Refine the masks of the stage before by what they do to the next token; no weight changes its value."""

    follows = ("pruned",)
    gives = "pruned"

    def faults(self, recipe: "Recipe") -> list[tuple[str, str]]:
        """Too few windows; weights that were changed before."""
        found = []
        if recipe.calibration.samples < 2:
            found.append(("rounds", "calibration samples 1 is not legal: at least 2, one of them measures"))
        for earlier in recipe.stages[: recipe.stages.index(self)]:
            if isinstance(earlier, PruneStage) and changes_weights(earlier):
                found.append(("rounds", f"{earlier.kind} changes weights: refine works on masks alone, before that"))
        return found

    def run(self, work: Work) -> dict[str, Any]:
        """Refine the checkpoint that the stages before left."""
        from ....prune.refine.refiner import BarberRefiner

        given = work.recipe.calibration
        config = RefineConfig(
            calibration=given.windows(), seed=given.seed, device=work.recipe.device,
            **{name: getattr(self, name) for name in RefineSettings.model_fields},
        )  # fmt: skip
        refiner = BarberRefiner.for_checkpoint(work.model, work.base)
        report = refiner.refine(work.model, config, save_dir=work.target, quiet=work.quiet).as_report()
        for index, done in enumerate(report["rounds"], start=1):
            work.log({"divergence_before": done["before"], "divergence_after": done["after"]}, index)
        return {name: report[name] for name in ("swaps", "divergence_before", "divergence_after")}


def changes_weights(stage: PruneStage) -> bool:
    """Whether kept weights get other values than the dense model's."""
    given = stage.producer_args
    updated = stage.producer == "sparsegpt" and str(given.get("update", True)).lower() != "false"
    return bool(stage.reconstruct.chain) or updated or "weights" in given
