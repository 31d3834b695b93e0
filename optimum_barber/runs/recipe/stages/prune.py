"""Stages that make masks: `prune`, `rebuild` and `refine`."""

from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

from pydantic import Field

from ....base.errors import BarberError
from ....base.fields import parse_arguments
from ....checkpoints.record import read_record
from ....prune.pipeline import BlockReport
from ....prune.plan import check_allocation
from ....prune.producers import as_producer
from ....prune.rebuild_settings import RebuildConfig
from ....prune.rebuilders import chain_of
from ....prune.refine.settings import RefineConfig, RefineSettings
from ....prune.settings import BarberConfig, PruneSettings
from ..stage import SharedSettings, Stage, StageContext, stage

FIGURES = ("sparsity", "error_before", "error_after", "swaps", "seconds", "peak_memory")


@stage("prune")
class PruneStage(Stage, PruneSettings):
    """Prune the dense model; with `rebuild` the masks are rebuilt in the same pass."""

    follows = ("dense",)
    gives = "pruned"
    first = "producer"

    producer: str = Field("wanda", description="what makes the first masks")
    rebuild: RebuildConfig = Field(
        RebuildConfig(method="none"),
        description="rebuild in the same pass; default: none, or what a given effort names",
    )

    def config(self, shared: SharedSettings) -> BarberConfig:
        """Return the run's settings."""
        settings = {name: getattr(self, name) for name in self.model_fields_set}
        if "effort" not in settings:
            settings["rebuild"] = self.rebuild
        return shared.barber_config(**settings)

    def files(self) -> list[str]:
        """Return a checkpoint or a mask file that the producer reads."""
        return [str(self.producer_args[key]) for key in ("sparse_model", "masks") if key in self.producer_args]

    def check(self, shared: SharedSettings, earlier: Sequence[Stage]) -> None:
        """Refuse names and arguments that nobody knows, and a sparsity that contradicts the pattern."""
        config = self.config(shared)
        producer = as_producer(self.producer)
        parse_arguments(producer.function, self.producer, self.producer_args)
        check_allocation(config, producer)
        chain_of(self.rebuild)
        if producer.brings_pattern is None:
            config.sparsity_pattern()

    def changes_weights(self) -> bool:
        """True if kept weights get other values than the dense model's."""
        updates = str(self.producer_args.get("update", True)).lower() != "false"
        return (
            bool(self.reconstruct.chain)
            or "weights" in self.producer_args
            or (self.producer == "sparsegpt" and updates)
        )

    def run(self, context: StageContext) -> dict[str, Any]:
        """Prune the recipe's model, or what was cut out of it."""
        return _sparsify(self.config(context.shared), context)


@stage("rebuild")
class RebuildStage(Stage, RebuildConfig):
    """Rebuild the masks of the stage before, in a pass of its own over the dense model."""

    follows = ("pruned",)
    gives = "pruned"
    first = "method"

    def check(self, shared: SharedSettings, earlier: Sequence[Stage]) -> None:
        """Refuse rebuilders that nobody knows."""
        chain_of(self)

    def run(self, context: StageContext) -> dict[str, Any]:
        """Lay the masks over the dense model, with the weights that their producer may have changed."""
        record = read_record(context.input_model)
        masks = str(Path(context.input_model) / record.masks)
        config = context.shared.barber_config(
            producer="masks", producer_args={"masks": masks, "weights": context.input_model},
            ignore=record.ignored, rebuild=self.part(RebuildConfig),
        )  # fmt: skip
        return _sparsify(config, context)


@stage("refine")
class RefineStage(Stage, RefineSettings):
    """Refine the masks of the stage before by what they do to the next token; no weight changes its value."""

    follows = ("pruned",)
    gives = "pruned"
    first = "steps"

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

        shared = context.shared
        settings = {**shared.run_settings(), "precision": shared.precision, **self.part(RefineSettings).model_dump()}
        config = RefineConfig(**settings)
        refiner = BarberRefiner.for_checkpoint(context.input_model, context.dense_model)
        result = refiner.refine(context.input_model, config, save_dir=context.output_model, quiet=context.quiet)
        report = result.as_report()
        for look in report["looks"]:
            context.log({"divergence": look["divergence"]}, look["step"])
        return {name: report[name] for name in ("swaps", "divergence_before", "divergence_after")}


def _sparsify(config: BarberConfig, context: StageContext) -> dict[str, Any]:
    """Prune once; every block goes to the trackers."""
    from ....prune.sparsifier import BarberSparsifier

    blocks = count(1)

    def tell(report: BlockReport) -> None:
        figures = {"error_before": report.error_before, "error_after": report.error_after, "swaps": report.swaps}
        context.log(figures, next(blocks))

    sparsifier = BarberSparsifier.from_pretrained(context.dense_model, context.shared.dtype)
    result = sparsifier.sparsify(config, save_dir=context.output_model, callbacks=[tell], quiet=context.quiet)
    report = result.as_report()
    return {name: report[name] for name in FIGURES}
