"""Stages that make masks: `prune` and `rebuild`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, ValidationError

from ....base.arguments import parse_arguments
from ....base.errors import BarberError
from ....base.fields import one_line, one_of
from ....checkpoints.record import read_record
from ....prune.effort import EFFORTS, UNIFORM
from ....prune.pipeline import BlockReport
from ....prune.plan import check_allocation
from ....prune.producers import as_producer
from ....prune.rebuild_settings import RebuildConfig
from ....prune.rebuilders import chain_of
from ....prune.settings import BarberConfig, ReconstructConfig
from ..stage import Stage, Work, stage

if TYPE_CHECKING:
    from ..schema import Recipe

FIGURES = ("sparsity", "error_before", "error_after", "swaps", "seconds", "peak_memory")


@stage("prune")
class PruneStage(Stage):
    """Prune the dense model; with `rebuild` the masks are rebuilt in the same pass."""

    follows = ("dense",)
    gives = "pruned"

    producer: str = Field("wanda", description="what makes the masks")
    producer_args: dict[str, Any] = Field(default_factory=dict, description="arguments of the producer")
    effort: Annotated[str, one_of("effort", EFFORTS)] = Field(
        "default", description="what names the rebuild and the allocation where they are not given: fast, default, best"
    )
    sparsity: float | None = Field(None, description="share of weights to prune, in (0, 1)")
    pattern: str | None = Field(None, description="'unstructured' (default) or N:M, such as 2:4")
    allocation: str = Field(UNIFORM, description="how the sparsity is shared out over the blocks")
    allocation_args: dict[str, Any] = Field(default_factory=dict, description="arguments of the allocation")
    ignore: list[str] = Field(default_factory=list, description="Linears to leave dense, by glob of their full name")
    batch_size: int | None = Field(None, ge=1, description="samples on the device at once; never changes a result")
    rebuild: RebuildConfig = Field(RebuildConfig(method="none"), description="rebuild in the same pass")
    reconstruct: ReconstructConfig = Field(ReconstructConfig(), description="new values for the kept weights")

    def config(self, recipe: "Recipe") -> BarberConfig:
        """The run's settings."""
        open_ = {"rebuild", "allocation"} - self.model_fields_set if "effort" in self.model_fields_set else set()
        return recipe.config(**{name: getattr(self, name) for name in PruneStage.model_fields if name not in open_})

    def files(self) -> list[str]:
        """A checkpoint or a mask file that the producer reads."""
        return [str(self.producer_args[key]) for key in ("sparse_model", "masks") if key in self.producer_args]

    def faults(self, recipe: "Recipe") -> list[tuple[str, str]]:
        """Names and arguments that nobody knows, a sparsity that contradicts the pattern."""
        try:
            config = self.config(recipe)
            producer = as_producer(self.producer)
            parse_arguments(producer, self.producer, self.producer_args)
            check_allocation(config, producer)
            chain_of(self.rebuild)
            if producer.brings_pattern is None:
                config.sparsity_pattern()
        except ValidationError as error:
            return [("producer", str(one_line(error)))]
        except BarberError as error:
            return [("producer", str(error))]
        return []

    def run(self, work: Work) -> dict[str, Any]:
        """Prune the recipe's model, or what was cut out of it."""
        return sparsify(self.config(work.recipe), work)


@stage("rebuild")
class RebuildStage(Stage, RebuildConfig):
    """Rebuild the masks of the stage before, in a pass of its own over the dense model."""

    follows = ("pruned",)
    gives = "pruned"

    def faults(self, recipe: "Recipe") -> list[tuple[str, str]]:
        """Rebuilders that nobody knows."""
        try:
            chain_of(self)
        except BarberError as error:
            return [("method", str(error))]
        return []

    def run(self, work: Work) -> dict[str, Any]:
        """Lay the masks over the dense model, with the weights that their producer may have changed."""
        record = read_record(work.model)
        settings = RebuildConfig(**{name: getattr(self, name) for name in RebuildConfig.model_fields})
        masks = str(Path(work.model) / record.masks)
        config = work.recipe.config(
            producer="masks", producer_args={"masks": masks, "weights": work.model},
            ignore=record.ignored, rebuild=settings,
        )  # fmt: skip
        return sparsify(config, work)


def sparsify(config: BarberConfig, work: Work) -> dict[str, Any]:
    """One run of the pipeline; every block goes to the trackers."""
    from ....prune.sparsifier import BarberSparsifier

    done = 0

    def tell(report: BlockReport) -> None:
        nonlocal done
        done += 1
        work.log({"error_before": report.error_before, "error_after": report.error_after, "swaps": report.swaps}, done)

    sparsifier = BarberSparsifier.from_pretrained(work.base, work.recipe.dtype)
    result = sparsifier.sparsify(config, save_dir=work.target, callbacks=[tell], quiet=work.quiet)
    report = result.as_report()
    return {name: report[name] for name in FIGURES}
