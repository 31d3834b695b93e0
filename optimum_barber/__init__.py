"""Prune causal LMs with any mask producer and rebuild the mask with LLM-Barber."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .artifacts import MaskFile as MaskFile
    from .artifacts import SparsityConfig as SparsityConfig
    from .calibration import TokenWindows as TokenWindows
    from .config import BarberConfig as BarberConfig
    from .errors import BarberError as BarberError
    from .evaluate import perplexity as perplexity
    from .own_text.settings import OwnTextConfig as OwnTextConfig
    from .own_text.writer import own_documents as own_documents
    from .patterns import SparsityPattern as SparsityPattern
    from .pipeline import BlockReport as BlockReport
    from .producers import LinearInput as LinearInput
    from .producers import Produced as Produced
    from .producers import producer as producer
    from .rebuild_config import RebuildConfig as RebuildConfig
    from .refine.refiner import BarberRefiner as BarberRefiner
    from .refine.refiner import RefineResult as RefineResult
    from .refine.settings import RefineConfig as RefineConfig
    from .sparsifier import BarberSparsifier as BarberSparsifier
    from .sparsifier import SparsifyResult as SparsifyResult
    from .structured.record import PrunedStructure as PrunedStructure
    from .structured.scorers import scorer as scorer
    from .structured.settings import ShrinkConfig as ShrinkConfig
    from .structured.shrinker import BarberShrinker as BarberShrinker
    from .structured.shrinker import ShrinkResult as ShrinkResult
    from .sweep.runner import SweepResult as SweepResult
    from .sweep.runner import run_sweep as run_sweep
    from .sweep.settings import SweepConfig as SweepConfig
    from .verify import verify_checkpoint as verify_checkpoint

__version__ = "0.1.0"

_HOME = {
    "BarberConfig": "config",
    "BarberError": "errors",
    "BarberRefiner": "refine.refiner",
    "BarberShrinker": "structured.shrinker",
    "BarberSparsifier": "sparsifier",
    "BlockReport": "pipeline",
    "LinearInput": "producers",
    "MaskFile": "artifacts",
    "OwnTextConfig": "own_text.settings",
    "Produced": "producers",
    "PrunedStructure": "structured.record",
    "RebuildConfig": "rebuild_config",
    "RefineConfig": "refine.settings",
    "RefineResult": "refine.refiner",
    "ShrinkConfig": "structured.settings",
    "ShrinkResult": "structured.shrinker",
    "SparsifyResult": "sparsifier",
    "SparsityConfig": "artifacts",
    "SparsityPattern": "patterns",
    "SweepConfig": "sweep.settings",
    "SweepResult": "sweep.runner",
    "TokenWindows": "calibration",
    "own_documents": "own_text.writer",
    "perplexity": "evaluate",
    "producer": "producers",
    "run_sweep": "sweep.runner",
    "scorer": "structured.scorers",
    "verify_checkpoint": "verify",
}
__all__ = sorted([*_HOME, "__version__"])


def __getattr__(name: str) -> Any:
    """Public names are imported when first asked for, so that importing the package costs nothing."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
