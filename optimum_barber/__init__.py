"""Prune causal LMs with any mask producer and rebuild the mask with LLM-Barber."""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .base.moved import MovedModules
from .base.version import __version__ as __version__

if TYPE_CHECKING:
    from optimum_barber.integrations.training.masks import AppliedMasks as AppliedMasks
    from optimum_barber.integrations.training.masks import KeepMasks as KeepMasks
    from optimum_barber.integrations.training.masks import apply_masks as apply_masks
    from optimum_barber.integrations.training.masks import as_torch_pruning as as_torch_pruning
    from optimum_barber.integrations.training.recover import BarberRecoverer as BarberRecoverer
    from optimum_barber.integrations.training.recover import RecoverResult as RecoverResult
    from optimum_barber.integrations.training.settings import RecoverConfig as RecoverConfig

    from .base.calibration import CalibrationConfig as CalibrationConfig
    from .base.errors import BarberError as BarberError
    from .checkpoints.pruned import PrunedModel as PrunedModel
    from .checkpoints.push import push_to_hub as push_to_hub
    from .checkpoints.record import MaskFile as MaskFile
    from .checkpoints.record import SparsityConfig as SparsityConfig
    from .checkpoints.structure import PrunedStructure as PrunedStructure
    from .checkpoints.verify import verify_checkpoint as verify_checkpoint
    from .prune.describe import SparsifyResult as SparsifyResult
    from .prune.pipeline import BlockReport as BlockReport
    from .prune.producers import LinearInput as LinearInput
    from .prune.producers import Produced as Produced
    from .prune.producers import producer as producer
    from .prune.rebuild_settings import RebuildConfig as RebuildConfig
    from .prune.refine.refiner import BarberRefiner as BarberRefiner
    from .prune.refine.refiner import RefineResult as RefineResult
    from .prune.refine.settings import RefineConfig as RefineConfig
    from .prune.settings import BarberConfig as BarberConfig
    from .prune.sparsifier import BarberSparsifier as BarberSparsifier
    from .runs.sweep.runner import SweepResult as SweepResult
    from .runs.sweep.runner import run_sweep as run_sweep
    from .runs.sweep.settings import SweepConfig as SweepConfig
    from .shrink.permute_settings import PermuteConfig as PermuteConfig
    from .shrink.permuter import BarberPermuter as BarberPermuter
    from .shrink.permuter import PermuteResult as PermuteResult
    from .shrink.scorers import scorer as scorer
    from .shrink.settings import ShrinkConfig as ShrinkConfig
    from .shrink.shrinker import BarberShrinker as BarberShrinker
    from .shrink.shrinker import ShrinkResult as ShrinkResult
    from .tensors.patterns import SparsityPattern as SparsityPattern
    from .text.own_text.settings import OwnTextConfig as OwnTextConfig
    from .text.own_text.writer import own_documents as own_documents
    from .text.perplexity import perplexity as perplexity
    from .text.windows import TokenWindows as TokenWindows


_HOME = {
    "AppliedMasks": "integrations.training.masks",
    "BarberConfig": "prune.settings",
    "BarberError": "base.errors",
    "BarberPermuter": "shrink.permuter",
    "BarberRecoverer": "integrations.training.recover",
    "BarberRefiner": "prune.refine.refiner",
    "BarberShrinker": "shrink.shrinker",
    "BarberSparsifier": "prune.sparsifier",
    "BlockReport": "prune.pipeline",
    "CalibrationConfig": "base.calibration",
    "KeepMasks": "integrations.training.masks",
    "LinearInput": "prune.producers",
    "MaskFile": "checkpoints.record",
    "OwnTextConfig": "text.own_text.settings",
    "PermuteConfig": "shrink.permute_settings",
    "PermuteResult": "shrink.permuter",
    "Produced": "prune.producers",
    "PrunedModel": "checkpoints.pruned",
    "PrunedStructure": "checkpoints.structure",
    "RebuildConfig": "prune.rebuild_settings",
    "RecoverConfig": "integrations.training.settings",
    "RecoverResult": "integrations.training.recover",
    "RefineConfig": "prune.refine.settings",
    "RefineResult": "prune.refine.refiner",
    "ShrinkConfig": "shrink.settings",
    "ShrinkResult": "shrink.shrinker",
    "SparsifyResult": "prune.describe",
    "SparsityConfig": "checkpoints.record",
    "SparsityPattern": "tensors.patterns",
    "SweepConfig": "runs.sweep.settings",
    "SweepResult": "runs.sweep.runner",
    "TokenWindows": "text.windows",
    "apply_masks": "integrations.training.masks",
    "as_torch_pruning": "integrations.training.masks",
    "own_documents": "text.own_text.writer",
    "perplexity": "text.perplexity",
    "producer": "prune.producers",
    "push_to_hub": "checkpoints.push",
    "run_sweep": "runs.sweep.runner",
    "scorer": "shrink.scorers",
    "verify_checkpoint": "checkpoints.verify",
}
__all__ = sorted([*_HOME, "__version__"])


def __getattr__(name: str) -> Any:
    """Public names are imported when first asked for, so that importing the package costs nothing."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__


sys.meta_path.append(MovedModules())
