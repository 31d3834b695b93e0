"""What a run is told: pydantic models that check everything before any work. Imports neither torch nor transformers."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_serializer,
    field_validator,
    model_validator,
)

from .errors import BarberError, unknown_name
from .patterns import SparsityPattern

CONFIG_NAME = "barber_config.json"
METRICS = ("weight_gradient", "weight", "gradient")
REDUCTIONS = ("rms", "mean")
EXPANSIONS = ("sparse", "dense")
GRANULARITIES = ("auto", "block", "layer", "input", "output")
PAIRINGS = ("group", "row")
ERRORS = ("absolute", "relative")
ACCEPTANCE = ("if-better", "always")
UNIFORM = "uniform"
DTYPES = ("auto", "float32", "float16", "bfloat16")

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


def one_of(kind: str, legal: Iterable[str]) -> AfterValidator:
    """A validator that answers a name outside of `legal` with the nearest ones and the whole list."""

    def check(value: str) -> str:
        if value not in legal:
            raise unknown_name(kind, value, legal)
        return value

    return AfterValidator(check)


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
        method = FREE if OF_BARBER & given.keys() else AUTO
        given = {"method": method, **PRESETS.get(str(given.get("preset")), {}), **given}
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
        """The names of the rebuilders in order, as without groups where `auto` is not settled; empty for 'none'."""
        return parts_of(FREE if self.method == AUTO else self.method)


class ReconstructConfig(BaseModel):
    """How the kept weights of each block get new values once its masks are settled."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str = Field("none", description="reconstructions, chained with '+': least-squares, gradient; or 'none'")
    iterations: int = Field(15, ge=1, description="of conjugate gradients, for least-squares")
    shrinkage: float = Field(
        0.2, ge=0, le=1, description="of the Gram matrix to its diagonal, for least-squares: calibration tokens are few"
    )
    passes: int = Field(4, ge=1, description="over the calibration samples at most, for gradient")
    learning_rate: float = Field(1e-4, gt=0, description="of Adam, for gradient")

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, given: Any) -> Any:
        """A bare string is the method."""
        return {"method": given} if isinstance(given, str) else given

    @field_validator("method")
    @classmethod
    def _chain(cls, method: str) -> str:
        return checked_chain("reconstruct", "reconstructions", method)

    @property
    def chain(self) -> list[str]:
        """The names of the reconstructions in order; empty for 'none'."""
        return parts_of(self.method)


def checked_chain(argument: str, members: str, chain: str) -> str:
    """A chain without empty links."""
    if not all(chain.split("+")):
        raise BarberError(f"{argument} {chain!r} is not legal: {members} joined by '+', or 'none'")
    return chain


def parts_of(chain: str) -> list[str]:
    """The links of a chain; none for 'none'."""
    return [] if chain == "none" else chain.split("+")


class BarberConfig(BaseModel):
    """Everything that decides a run, but the model itself and where its result goes."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    producer: str | Callable[..., Any] = Field("wanda", description="what makes the first masks")
    producer_args: dict[str, Any] = Field(default_factory=dict, description="arguments of the producer")
    sparsity: float | None = Field(None, description="share of weights to prune, in (0, 1)")
    pattern: str | None = Field(
        None, description="'unstructured' (default) or N:M, such as 2:4, which implies its sparsity"
    )
    allocation: str = Field(UNIFORM, description="how the sparsity is shared out over the blocks")
    allocation_args: dict[str, Any] = Field(default_factory=dict, description="arguments of the allocation")
    rebuild: RebuildConfig = Field(RebuildConfig(), description="how the masks are rebuilt")
    reconstruct: ReconstructConfig = Field(
        ReconstructConfig(), description="how kept weights get new values under the rebuilt masks"
    )
    calibration: list[str] = Field(default_factory=list, description="texts to calibrate on")
    text_field: str = Field("text", description="the field of a .jsonl file that holds the text")
    samples: int = Field(128, ge=1, description="how many calibration windows")
    sequence_length: int | None = Field(
        None, ge=1, description="tokens a window; default 2048, or what the model supports if that is less"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="decides the windows and random masks")
    device: str = Field("auto", description="where blocks are worked on: auto, cpu, cuda, cuda:1, ...")
    dtype: Annotated[str, one_of("dtype", DTYPES)] = Field(
        "auto", description="of the result: auto keeps the model's own (GGUF: float16); float32, float16 or bfloat16"
    )
    batch_size: int | None = Field(
        None, ge=1, description="samples on the device at once (default: all); never changes a result"
    )
    ignore: list[str] = Field(default_factory=list, description="Linears to leave dense, by glob of their full name")

    @model_validator(mode="after")
    def _check(self) -> "BarberConfig":
        if self.sparsity is not None or self.pattern is not None:
            self.sparsity_pattern()
        return self

    @field_serializer("producer")
    def _producer_name(self, producer: Any) -> str:
        return producer if isinstance(producer, str) else getattr(producer, "__qualname__", type(producer).__name__)

    @property
    def producer_name(self) -> str:
        """The producer's registered name, or the qualified name of a callable."""
        return self._producer_name(self.producer)

    def under(self, pattern: SparsityPattern) -> "BarberConfig":
        """The same with the rebuild that `auto` means under a pattern."""
        return self.model_copy(update={"rebuild": self.rebuild.under(pattern)})

    def sparsity_pattern(self) -> SparsityPattern:
        """The pattern that `pattern` and `sparsity` mean together; N:M with another allocation is refused."""
        return self.checked(SparsityPattern.parse(self.pattern, self.sparsity))

    def checked(self, pattern: SparsityPattern) -> SparsityPattern:
        """`pattern`, if the allocation and the rebuild can work under it."""
        if pattern.semi_structured and self.allocation != UNIFORM:
            raise BarberError(
                f"allocation {self.allocation!r} makes no sense with pattern {pattern}: it fixes every group"
            )
        if pattern.semi_structured and self.rebuild.chain and self.rebuild.granularity == "input":
            raise BarberError(f"granularity 'input' makes no sense with pattern {pattern}: use output, layer or block")
        return pattern

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write `barber_config.json` into the directory; with `push_to_hub` also to the hub (`repo_id=...`)."""
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / CONFIG_NAME).write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", directory.name), **kwargs)

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **kwargs: Any) -> "BarberConfig":
        """Read a configuration from a directory, a file or a hub repository."""
        path = Path(name_or_path)
        if path.is_dir():
            path = path / CONFIG_NAME
        if not path.is_file():
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(str(name_or_path), CONFIG_NAME, **kwargs))
        return cls.model_validate(json.loads(path.read_text(encoding="utf-8")))

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Upload `barber_config.json` to a hub repository, which is created if need be."""
        from huggingface_hub import HfApi

        api = HfApi(token=kwargs.pop("token", None))
        repo_id = api.create_repo(repo_id, private=kwargs.pop("private", None), exist_ok=True).repo_id
        return api.upload_file(
            path_or_fileobj=self.model_dump_json(indent=2).encode(),
            path_in_repo=CONFIG_NAME,
            repo_id=repo_id,
            **kwargs,
        )


def one_line(error: ValidationError) -> BarberError:
    """All faults of a configuration in one line."""
    faults = []
    for fault in error.errors():
        message = fault["msg"].removeprefix("Value error, ")
        where = ".".join(str(part) for part in fault["loc"] if part != "rebuild")
        own = isinstance(fault.get("ctx", {}).get("error"), BarberError)
        faults.append(message if own else f"{where} {fault['input']!r} is not legal: {message}")
    return BarberError("; ".join(dict.fromkeys(faults)))
