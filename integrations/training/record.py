"""What decides a training, so that one is resumed only by the same settings, models and windows."""

from typing import Any

from optimum_barber.checkpoints.carry import files_digest
from optimum_barber.checkpoints.pruned import PrunedModel
from optimum_barber.checkpoints.record import mask_fingerprint
from optimum_barber.integrations.training.dense import DenseModel
from optimum_barber.integrations.training.settings import TrainingSettings
from optimum_barber.models.device import product_precision
from optimum_barber.models.linears import has_routed_experts
from optimum_barber.models.source import ModelSource
from optimum_barber.text.windows import TokenWindows


def stated_products(model: Any, settings: TrainingSettings) -> str:
    """Return the precision of float32 matrix products of a training, never `auto`."""
    device = next(model.parameters()).device
    return product_precision(settings.precision, device, has_routed_experts(ModelSource(model)))


def run_record(
    opened: PrunedModel, dense: DenseModel | None, settings: TrainingSettings, windows: TokenWindows
) -> dict[str, Any]:
    """Return what decides a training of an opened model on its device: checkpoints of another are not resumed."""
    return {
        "settings": settings.model_dump(exclude={"calibration"}),
        "base_model": opened.reference.full_name,
        "base_files": files_digest(opened.reference),
        "dense_model": dense.name if dense else None,
        "dense_files": files_digest(dense.reference) if dense else None,
        "device": str(opened.model.device),
        "precision": stated_products(opened.model, settings),
        "mask_fingerprint": mask_fingerprint(opened.masks) if opened.masks else None,
        "windows": windows.as_dict(),
    }
