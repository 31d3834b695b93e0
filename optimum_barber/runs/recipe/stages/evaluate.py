"""The stage `evaluate`: perplexity and lm-eval tasks, with the dense model beside them."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from pydantic import Field

from ..stage import Stage, Work, stage

if TYPE_CHECKING:
    from ..schema import Recipe

PROTOCOL = ("perplexity", "sequence_length", "windows", "tasks", "limit", "dtype")


@stage("evaluate")
class EvaluateStage(Stage):
    """Measure whatever model the stages before left."""

    follows = ("dense", "pruned", "adapter", "tuned", "quantized")

    perplexity: list[str] = Field(default_factory=list, description="texts for perplexity: files or registered names")
    sequence_length: int | None = Field(None, ge=2, description="tokens a window; default: the calibration's")
    windows: int | None = Field(None, ge=1, description="spread so many windows over each text; default: all")
    tasks: list[str] = Field(
        default_factory=list, description="lm-eval tasks; choice:FILE.jsonl and rolling:FILE are local ones"
    )
    limit: int | None = Field(None, ge=1, description="rows a task; default: all")
    batch_size: int = Field(1, ge=1, description="of the tasks")
    dtype: str = Field("auto", description="of the computation: auto is float32 on a CPU, else the model's own")
    dense: bool = Field(True, description="measure the dense model too, once a recipe and protocol")

    def files(self) -> list[str]:
        """Local task files."""
        return [task.split(":", 1)[1] for task in self.tasks if task.split(":", 1)[0] in ("choice", "rolling")]

    def texts(self) -> list[str]:
        """Texts for perplexity."""
        return self.perplexity

    def faults(self, recipe: "Recipe") -> list[tuple[str, str]]:
        """A stage that measures nothing, an adapter's tasks."""
        if not self.perplexity and not self.tasks:
            return [("perplexity", "nothing to measure: give perplexity or tasks")]
        return []

    def run(self, work: Work) -> dict[str, Any]:
        """Figures of the model, and of the dense one unless an earlier stage has them under the same protocol."""
        figures = {"model": self.measure(work.model, work), "protocol": self._protocol(work)}
        if self.dense and work.model != work.recipe.model:
            figures["dense"] = _known(work.earlier.values(), figures["protocol"]) or self.measure(
                work.recipe.model, work
            )
        work.log(flat(figures["model"]), None)
        return figures

    def measure(self, model: str, work: Work) -> dict[str, Any]:
        """Perplexity of each text, results of each task."""
        from ...evaluate import evaluate_model

        length = self.sequence_length or work.recipe.calibration.sequence_length
        field, device = work.recipe.calibration.text_field, work.recipe.device
        found: dict[str, Any] = {
            "perplexity": {
                text: evaluate_model(
                    model, text, field=field, length=length, windows=self.windows, dtype=self.dtype,
                    device=device, quiet=work.quiet,
                )
                for text in self.perplexity
            }
        }  # fmt: skip
        if self.tasks:
            from optimum_barber.integrations.lm_eval.run import evaluate_tasks

            found["tasks"] = evaluate_tasks(
                model, self.tasks, limit=self.limit, batch_size=self.batch_size, device=device, dtype=self.dtype,
                seed=work.recipe.calibration.seed, quiet=work.quiet,
            )  # fmt: skip
        return found

    def _protocol(self, work: Work) -> dict[str, Any]:
        length = self.sequence_length or work.recipe.calibration.sequence_length
        return {**{name: getattr(self, name) for name in PROTOCOL}, "sequence_length": length}


def _known(earlier: Iterable[dict[str, Any]], protocol: dict[str, Any]) -> Any:
    """Figures of the dense model that were measured before under the same protocol."""
    return next((figures["dense"] for figures in earlier if figures.get("protocol") == protocol), None)


def flat(figures: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested figures as one level of numbers, as trackers want them."""
    found: dict[str, float] = {}
    for key, value in figures.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[prefix + key] = value
    return found
