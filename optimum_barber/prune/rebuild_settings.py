"""How masks are rebuilt: a chain of rebuilders and their settings. Imports neither torch nor transformers."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from ..base.errors import BarberError
from ..base.fields import checked_chain, one_of, parts_of
from ..tensors.patterns import SparsityPattern
from .effort import AUTO, EFFORTS

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
DEFAULT = EFFORTS["default"]
DEFAULT_NAMES = ("barber", "gauss-newton", "swaps")  # of all chains that `auto` may mean
OF_BARBER = ("granularity", "rebuild_ratio", "rounds", "metric", "expansion", "reduction", "pairing")
EXCHANGING = frozenset({"swaps", "gauss-newton"})  # rebuilders that work with Gram matrices
WITH_EXCHANGES: dict[str, Any] = {"rounds": 1, "error": "relative"}  # defaults of chains with one of them


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
    """A chain of rebuilders and their settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str = Field(
        AUTO,
        description="rebuilders joined by '+', or 'none' to keep the producer's masks. auto: those of the effort; by "
        f"default {DEFAULT.unstructured}, for N:M {DEFAULT.grouped}. If a flag of barber is set: {DEFAULT.with_barber}",
    )
    preset: Annotated[str, one_of("preset", PRESETS)] = Field(
        "default", description="settings to start from: default, or published-code for those of the authors' repository"
    )
    granularity: Annotated[str, one_of("granularity", GRANULARITIES)] = Field(
        "auto",
        description="unit that keeps its number of weights: block, layer (one Linear), input (a column), output (a "
        "row), or auto (block; output for N:M)",
    )
    rebuild_ratio: Annotated[float | Literal["auto"], BeforeValidator(_ratio)] = Field(
        "auto",
        description="share of the candidate pairs to exchange (alpha), in [0, 1], or auto to search for the best",
    )
    rounds: int = Field(
        4, ge=1, description="number of barber's rounds, each of gradient, exchange and measurement (default: 4; 1 "
        "with swaps)",
    )  # fmt: skip
    swaps: int = Field(60, ge=1, description="largest number of exchanges per row of each Linear")
    newton_rounds: int = Field(2, ge=1, description="number of gauss-newton's rounds")
    shrinkage: float = Field(
        0.3, ge=0, le=1,
        description="share by which swaps and gauss-newton shrink Gram matrices towards their diagonal",
    )  # fmt: skip
    metric: Annotated[str, one_of("metric", METRICS)] = Field(
        "weight_gradient", description="importance of a weight: weight_gradient, weight or gradient"
    )
    expansion: Annotated[str, one_of("expansion", EXPANSIONS)] = Field(
        "sparse", description="weights at which the gradient is taken: sparse (paper) or dense (published code)"
    )
    reduction: Annotated[str, one_of("reduction", REDUCTIONS)] = Field(
        "rms", description="mean over the gradients of the windows: rms (published code) or mean (paper)"
    )
    pairing: Annotated[str, one_of("pairing", PAIRINGS)] = Field(
        "group",
        description="how weights are paired for N:M: group (inside each M-group, paper) or row (published code)",
    )
    error: Annotated[str, one_of("error", ERRORS)] = Field(
        "absolute",
        description="error of a block: absolute (paper), or relative to the residual stream of each token (default "
        "with swaps)",
    )
    accept: Annotated[str, one_of("acceptance", ACCEPTANCE)] = Field(
        "if-better", description="when a rebuilt mask is kept: if-better (the error of the block fell) or always"
    )

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, value: Any) -> Any:
        """Read a bare string as the method; explicit settings override the preset, and both the chain's defaults."""
        explicit = {"method": value} if isinstance(value, str) else value
        if not isinstance(explicit, dict):
            return explicit
        if explicit.get("method") == AUTO:
            explicit = {name: setting for name, setting in explicit.items() if name != "method"}
        settings = {**PRESETS.get(str(explicit.get("preset")), {}), **explicit}
        chain = str(settings.get("method", AUTO)).split("+")
        exchanging = chain == [AUTO] or not EXCHANGING.isdisjoint(chain)
        return {**WITH_EXCHANGES, **settings} if exchanging else settings

    @field_validator("method")
    @classmethod
    def _chain(cls, method: str) -> str:
        return checked_chain("rebuild", "rebuilders", method)

    def granularity_for(self, pattern: SparsityPattern) -> str:
        """Return the granularity, with `auto` resolved for the pattern."""
        if self.granularity != "auto":
            return self.granularity
        return "output" if pattern.semi_structured else "block"

    def under(self, pattern: SparsityPattern, effort: str = "default") -> "RebuildConfig":
        """Return the settings with the method `auto` resolved for a pattern and an effort."""
        if self.method != AUTO:
            return self
        usual = RebuildConfig()
        barber_is_set = any(getattr(self, name) != getattr(usual, name) for name in OF_BARBER)
        return self.model_copy(update={"method": EFFORTS[effort].rebuild(pattern.semi_structured, barber_is_set)})

    @property
    def chain(self) -> list[str]:
        """The names of the rebuilders in order; for `auto` all that it may stand for; empty for 'none'."""
        return list(DEFAULT_NAMES) if self.method == AUTO else parts_of(self.method)
