"""The weights of a model on disk, whatever their format."""

from ..models.loading import ModelReference
from .gguf import GgufWeights
from .safetensors import SafetensorsWeights

StoredWeights = SafetensorsWeights | GgufWeights


def open_weights(reference: ModelReference) -> StoredWeights:
    """Open the files of a model; no weight is read.

    Raises:
        BarberError: a file is missing, truncated or damaged.
    """
    return GgufWeights.of(reference) if reference.gguf_file else SafetensorsWeights.open(reference)
