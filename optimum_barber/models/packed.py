"""The weights of a compressed-tensors checkpoint, dequantized: symmetric integers by group or row."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..base.errors import BarberError
from ..tensors.quantize import Quantized, unpack_codes

WIDTHS = (2, 4, 8)  # bits of a code
PARTS = ("packed", "scale", "shape", "zero_point")  # of a weight, by what follows its name


def dequantizing_options(directory: Path, config: Any) -> dict[str, Any]:
    """Return the options under which transformers loads a compressed-tensors checkpoint as a plain model.

    It dequantizes while it loads, but all Linears by the bits of one group: several are dequantized here. Empty for
    other checkpoints; `config`, the model's, is changed.
    """
    settings = getattr(config, "quantization_config", None) or {}
    if settings.get("quant_method") != "compressed-tensors":
        return {}
    if len(settings.get("config_groups", {})) == 1:
        config.quantization_config = {**settings, "dequantize": True}
        return {"config": config}
    del config.quantization_config
    return {"config": config, "state_dict": dequantized_tensors(directory)}


def dequantized_tensors(directory: Path) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint by name, dequantized weights in the place of packed ones.

    Raises:
        BarberError: a weight is packed in another way.
    """
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(path)
    for key in [key for key in tensors if key.endswith(".weight_packed")]:
        name = key.removesuffix("_packed")
        parts = {part: tensors.pop(f"{name}_{part}") for part in PARTS if f"{name}_{part}" in tensors}
        tensors[name] = dequantized(name.removesuffix(".weight"), parts)
    return tensors


def dequantized(name: str, parts: Mapping[str, Tensor]) -> Tensor:
    """Return a weight, (out, in) in the scales' dtype, from its parts: packed, scale and shape.

    Raises:
        BarberError: it has a zero point, or its size is that of no known number of bits.
    """
    packed, scale = parts["packed"], parts["scale"]
    rows, width = parts["shape"].tolist()
    fitting = [bits for bits in WIDTHS if packed.shape == (rows, -(-width * bits // 32))]
    if len(fitting) != 1 or width % scale.shape[-1] or "zero_point" in parts:
        raise BarberError(f"{name} is not packed as symmetric groups of 2, 4 or 8 bits")
    return Quantized(unpack_codes(packed, fitting[0], width), scale).dequantize()
