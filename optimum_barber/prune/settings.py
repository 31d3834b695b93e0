"""The settings of a run, all checked before any work. Imports neither torch nor transformers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_serializer, field_validator, model_validator

from ..base.calibration import FLAT, Calibrated, CalibrationConfig, nested
from ..base.errors import BarberError
from ..base.fields import DTYPES, PRECISIONS, checked_chain, one_of, parts_of
from ..checkpoints.names import CONFIG_NAME
from ..tensors.patterns import SparsityPattern
from .effort import AUTO, EFFORTS, UNIFORM
from .rebuild_settings import RebuildConfig


class ReconstructConfig(BaseModel):
    """How the kept weights of each block get new values once its masks are fixed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str = Field("none", description="reconstructions, chained with '+': least-squares, gradient; or 'none'")
    iterations: int = Field(15, ge=1, description="number of conjugate-gradient steps of least-squares")
    shrinkage: float = Field(
        0.2, ge=0, le=1,
        description="share by which least-squares shrinks Gram matrices towards their diagonal",
    )  # fmt: skip
    passes: int = Field(4, ge=1, description="largest number of passes of gradient over the calibration windows")
    learning_rate: float = Field(1e-4, gt=0, description="learning rate of Adam in gradient")

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"method": value} if isinstance(value, str) else value

    @field_validator("method")
    @classmethod
    def _chain(cls, method: str) -> str:
        return checked_chain("reconstruct", "reconstructions", method)

    @property
    def chain(self) -> list[str]:
        """The names of the reconstructions in order; empty for 'none'."""
        return parts_of(self.method)


class PruneSettings(BaseModel):
    """Which masks a run makes, and how."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    producer: str | Callable[..., Any] = Field("wanda", description="method that makes the first masks")
    producer_args: dict[str, Any] = Field(default_factory=dict, description="arguments of the producer")
    effort: Annotated[str, one_of("effort", EFFORTS)] = Field(
        "default",
        description=f"fast ({EFFORTS['fast'].unstructured}), default ({EFFORTS['default'].unstructured}; for N:M "
        f"{EFFORTS['default'].grouped}) or best ({EFFORTS['best'].unstructured} with the measured allocation; for N:M "
        "as default). Other flags override its settings",
    )
    sparsity: float | None = Field(None, description="share of weights to prune, in (0, 1)")
    pattern: str | None = Field(
        None, description="'unstructured' (default), or N:M such as 2:4, which implies the sparsity"
    )
    allocation: str = Field(
        UNIFORM, description="how the sparsity is shared out over the blocks; auto: as the effort says"
    )
    allocation_args: dict[str, Any] = Field(default_factory=dict, description="arguments of the allocation")
    rebuild: RebuildConfig = Field(RebuildConfig(), description="how the masks are rebuilt")
    reconstruct: ReconstructConfig = Field(
        ReconstructConfig(), description="how kept weights get new values under the rebuilt masks"
    )
    batch_size: int | None = Field(
        None, ge=1,
        description="number of windows on the device at once (default: all that fit); never changes the result",
    )  # fmt: skip
    ignore: list[str] = Field(default_factory=list, description="glob of full names of Linears to leave dense")
    allow_dense_rest: bool = Field(
        False, description="prune a model of which more than a tenth of the layers' weights cannot be pruned"
    )

    calibrate_all_experts: bool = Field(
        False,
        description="let the producer see every expert on all tokens, not on those alone that are routed to it",
    )

    @field_serializer("producer")
    def _producer_name(self, producer: Any) -> str:
        return producer if isinstance(producer, str) else getattr(producer, "__qualname__", type(producer).__name__)


class BarberConfig(Calibrated, PruneSettings):
    """All settings of a run except the model and the output."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    calibration: CalibrationConfig = Field(CalibrationConfig(), description="the calibration windows")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of the windows and of random masks")
    device: str = Field(
        "auto",
        description="device to use: auto, cpu, cuda, cuda:1, ...; on the command line several too, such as "
        "cuda:0,cuda:1 or all, which share the samples (prune) or the cells (compare)",
    )
    dtype: Annotated[str, one_of("dtype", DTYPES)] = Field(
        "auto",
        description="dtype of the result: float32, float16, bfloat16, or auto (the model's own; GGUF: float16)",
    )
    precision: Annotated[str, one_of("precision", PRECISIONS)] = Field(
        "auto",
        description="precision of float32 matrix products, as in torch: highest (float32), high (TF32) or medium "
        "(bfloat16); auto: high or medium where the device has units for them, else highest, as for experts on a CPU. "
        "Masks differ a little",
    )

    @model_validator(mode="before")
    @classmethod
    def _open_allocation(cls, value: Any) -> Any:
        """Leave the allocation to an effort other than the default, unless it is set explicitly."""
        if isinstance(value, dict) and value.get("effort", "default") != "default":
            return {"allocation": AUTO, **value}
        return value

    @model_validator(mode="after")
    def _check(self) -> "BarberConfig":
        if self.sparsity is not None or self.pattern is not None:
            self.sparsity_pattern()
        return self

    @property
    def producer_name(self) -> str:
        """The producer's registered name, or the qualified name of a callable."""
        return self._producer_name(self.producer)

    def under(self, pattern: SparsityPattern, shares: bool = True) -> "BarberConfig":
        """Return the settings with `auto` and the effort resolved.

        Args:
            pattern: pattern of all masks.
            shares: False if the producer brings its masks, so that no sparsity is shared out.
        """
        named: dict[str, Any] = {"rebuild": self.rebuild.under(pattern, self.effort), "effort": "default"}
        if self.allocation == AUTO:
            effort = EFFORTS[self.effort if shares and not pattern.semi_structured else "default"]
            named["allocation"] = effort.allocation
            named["allocation_args"] = {**effort.allocation_args, **self.allocation_args}
        return self.model_copy(update=named)

    def sparsity_pattern(self) -> SparsityPattern:
        """Return the pattern that `pattern` and `sparsity` describe together."""
        return self.checked(SparsityPattern.parse(self.pattern, self.sparsity))

    def checked(self, pattern: SparsityPattern) -> SparsityPattern:
        """Return `pattern` if the allocation and the rebuild work with it; otherwise raise BarberError."""
        if pattern.semi_structured and self.allocation not in (UNIFORM, AUTO):
            raise BarberError(
                f"allocation {self.allocation!r} makes no sense with pattern {pattern}: it fixes every group"
            )
        if pattern.semi_structured and "besa" in self.rebuild.chain:
            raise BarberError(f"rebuild 'besa' makes no sense with pattern {pattern}: it learns how much a row prunes")
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
        """Read a configuration from a directory, a file or a hub repository; version 0.1.0 wrote it flat."""
        path = Path(name_or_path)
        if path.is_dir():
            path = path / CONFIG_NAME
        if not path.is_file():
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(str(name_or_path), CONFIG_NAME, **kwargs))
        content = json.loads(path.read_text(encoding="utf-8"))
        flat = isinstance(content, dict) and not {*FLAT}.isdisjoint(content)
        return cls.model_validate(nested(content) if flat else content)

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
