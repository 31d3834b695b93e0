"""How masks are rebuilt: a chain of rebuilders and their settings. Imports neither torch nor transformers."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from ..base.errors import BarberError
from ..base.fields import checked_chain, one_of, parts_of
from ..tensors.patterns import SparsityPattern

METRICS = ("weight_gradient", "weight", "gradient")
REDUCTIONS = ("rms", "mean")
EXPANSIONS = ("sparse", "dense")
GRANULARITIES = ("auto", "block", "layer", "input", "output")
PAIRINGS = ("group", "row")
ERRORS = ("absolute", "relative")
ACCEPTANCE = ("if-better", "always")

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "published-code": {
        "method": "barber",
        "granularity": "block",
        "expansion": "dense",
        "reduction": "rms",
        "pairing": "row",
        "accept": "always",
        "error": "absolute",
        "rebuild_ratio": 0.1,
        "rounds": 1,
    },
}
EXCHANGING = frozenset({"swaps", "gauss-newton"})  # rebuilders that work with Gram matrices
AUTO, FREE, GROUPED = "auto", "barber+swaps", "swaps+gauss-newton"  # what `auto` means without and within N:M groups
OF_BARBER = {"preset", "granularity", "rebuild_ratio", "rounds", "metric", "expansion", "reduction", "pairing"}
WITH_SWAPS: dict[str, Any] = {"rounds": 1, "error": "relative"}  # defaults where these have their part of the work


def _ratio(value: Any) -> Any:
    if value == "auto":
        return value
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = -1.0
    if not 0 <= number <= 1:
        raise BarberError(f"rebuild ratio {value!r} is not legal: 'auto' or a number in [0, 1]")
    return number


class RebuildConfig(BaseModel):
    """How masks are rebuilt: a chain of rebuilders and the settings of LLM-Barber."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str = Field(
        AUTO,
        description=f"rebuilders, chained with '+', or 'none' for the producer's mask; auto is {FREE}, and for N:M "
        f"{GROUPED} unless a setting of barber is given",
    )
    preset: Annotated[str, one_of("preset", PRESETS)] = Field(
        "default", description="settings to start from: 'published-code' does what the authors' repository does"
    )
    granularity: Annotated[str, one_of("granularity", GRANULARITIES)] = Field(
        "auto",
        description="within what a swap may move: block, layer, input, output, or auto (block; output for N:M)",
    )
    rebuild_ratio: Annotated[float | Literal["auto"], BeforeValidator(_ratio)] = Field(
        "auto", description="alpha, the share of worthwhile pairs to swap: a number in [0, 1], or auto"
    )
    rounds: int = Field(4, ge=1, description="of gradient, exchange and measurement (default: 4; 1 with swaps)")
    swaps: int = Field(60, ge=1, description="most exchanges a row that the rebuilder 'swaps' makes in each Linear")
    newton_rounds: int = Field(
        2, ge=1, description="of gradient, exchange and measurement that the rebuilder 'gauss-newton' makes"
    )
    shrinkage: float = Field(
        0.3, ge=0, le=1, description="of the Gram matrices of exchanges to their diagonal: calibration tokens are few"
    )
    metric: Annotated[str, one_of("metric", METRICS)] = Field(
        "weight_gradient", description="importance of a weight: weight_gradient, weight or gradient"
    )
    expansion: Annotated[str, one_of("expansion", EXPANSIONS)] = Field(
        "sparse", description="where the gradient is taken: at the sparse (paper) or the dense (published code) weights"
    )
    reduction: Annotated[str, one_of("reduction", REDUCTIONS)] = Field(
        "rms", description="of the samples' gradients: rms (published code) or mean (paper)"
    )
    pairing: Annotated[str, one_of("pairing", PAIRINGS)] = Field(
        "group", description="for N:M, pair inside each M-group (group, paper) or by rows (row, published code)"
    )
    error: Annotated[str, one_of("error", ERRORS)] = Field(
        "absolute",
        description="of a block: absolute (paper), or relative to each token's residual stream (default with swaps)",
    )
    accept: Annotated[str, one_of("acceptance", ACCEPTANCE)] = Field(
        "if-better", description="keep a rebuilt mask only if the block's error fell (if-better), or always"
    )

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, given: Any) -> Any:
        """A bare string is the method; what is given lies over the preset's settings, and these over a chain's own."""
        given = {"method": given} if isinstance(given, str) else given
        if not isinstance(given, dict):
            return given
        given = {name: value for name, value in given.items() if (name, value) != ("method", AUTO)}
        given = {**PRESETS.get(str(given.get("preset")), {}), **given}
        usual = {name: WITH_SWAPS.get(name, cls.model_fields[name].default) for name in OF_BARBER}
        asked = any(given.get(name, value) != value for name, value in usual.items())
        given = {"method": FREE if asked else AUTO, **given}
        exchanging = {*EXCHANGING, AUTO} & {*str(given["method"]).split("+")}
        return {**(WITH_SWAPS if exchanging else {}), **given}

    @field_validator("method")
    @classmethod
    def _chain(cls, method: str) -> str:
        return checked_chain("rebuild", "rebuilders", method)

    def granularity_for(self, pattern: SparsityPattern) -> str:
        """The granularity that `auto` means under a pattern, or the configured one."""
        if self.granularity != "auto":
            return self.granularity
        return "output" if pattern.semi_structured else "block"

    def under(self, pattern: SparsityPattern) -> "RebuildConfig":
        """The same with the method that `auto` means under a pattern."""
        method = GROUPED if pattern.semi_structured else FREE
        return self.model_copy(update={"method": method}) if self.method == AUTO else self

    @property
    def chain(self) -> list[str]:
        """The names of the rebuilders in order; all that `auto` may mean where it is not settled; empty for 'none'."""
        return sorted({*parts_of(FREE), *parts_of(GROUPED)}) if self.method == AUTO else parts_of(self.method)
