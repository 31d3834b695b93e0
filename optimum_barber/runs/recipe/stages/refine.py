"""The stage `refine`: better masks by the divergence of the whole model."""

from collections.abc import Sequence
from typing import Any

from ....base.errors import BarberError
from ....prune.refine.settings import RefineConfig, RefineSettings
from ..shared import SharedSettings
from ..stage import Stage, StageContext, stage
from .prune import PruneStage


@stage("refine")
class RefineStage(Stage, RefineSettings):
    """Refine the masks of the stage before by what they do to the next token; no weight changes its value."""

    follows = ("pruned",)
    gives = "pruned"
    first = "rounds"

    def check(self, shared: SharedSettings, earlier: Sequence[Stage]) -> None:
        """Refuse too few windows, and weights that were changed before."""
        faults = []
        if shared.calibration.samples < 2:
            faults.append("calibration samples 1 is not legal: at least 2, one of them measures")
        for before in earlier:
            if isinstance(before, PruneStage) and before.changes_weights():
                faults.append(f"{before.kind} changes weights: refine works on masks alone, before that")
        if faults:
            raise BarberError("\n".join(faults))

    def run(self, context: StageContext) -> dict[str, Any]:
        """Refine the checkpoint that the stages before left."""
        from ....prune.refine.refiner import BarberRefiner

        config = RefineConfig(**context.shared.run_settings(), **self.part(RefineSettings).model_dump())
        refiner = BarberRefiner.for_checkpoint(context.input_model, context.dense_model)
        result = refiner.refine(context.input_model, config, save_dir=context.output_model, quiet=context.quiet)
        report = result.as_report()
        for index, entry in enumerate(report["rounds"], start=1):
            context.log({"divergence_before": entry["before"], "divergence_after": entry["after"]}, index)
        return {name: report[name] for name in ("swaps", "divergence_before", "divergence_after")}
