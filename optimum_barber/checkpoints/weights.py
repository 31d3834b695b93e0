"""Reading single weights out of a safetensors checkpoint, without building a model."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from ..base.errors import BarberError
from ..tensors.quantize import Quantized, unpack_codes


class CheckpointWeights:
    """Weights of a safetensors checkpoint by name, read when asked for.

    Args:
        files: file of each tensor, by tensor name.
        name: of the checkpoint, for messages.
    """

    def __init__(self, files: dict[str, Path], name: str) -> None:
        self.files, self.name = files, name
        self._opened: dict[Path, Any] = {}

    @classmethod
    def open(cls, name: str) -> "CheckpointWeights":
        """Open a directory or hub id.

        Raises:
            BarberError: there is no such checkpoint, or it has no safetensors files.
        """
        from safetensors import SafetensorError, safe_open

        from ..models.loading import resolve_model

        directory = resolve_model(name).directory
        index = directory / "model.safetensors.index.json"
        if index.is_file():
            where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return cls({key: directory / file for key, file in where.items()}, name)
        file = directory / "model.safetensors"
        if not file.is_file():
            raise BarberError(f"model {name!r} has no safetensors files in {directory}")
        try:
            with safe_open(file, "pt") as opened:
                return cls(dict.fromkeys(opened.keys(), file), name)
        except SafetensorError as error:
            raise BarberError(f"model {name!r}: {file.name} cannot be read: {error}") from None

    def linear(self, module: str) -> Tensor:
        """The weight of a Linear, (out, in), in the checkpoint's dtype; a packed one (compressed-tensors) dequantized.

        Raises:
            BarberError: the checkpoint has no such module, or it is packed in an unknown way.
        """
        key = f"{module}.weight"
        packed = f"{key}_packed"
        if packed in self.files:
            scale, shape = self.tensor(f"{key}_scale"), self.tensor(f"{key}_shape").tolist()
            return self._dequantize(module, self.tensor(packed), scale, shape)
        return self.tensor(key)

    def _dequantize(self, module: str, packed: Tensor, scale: Tensor, shape: list[int]) -> Tensor:
        width = shape[-1]
        fitting = [bits for bits in (4, 8) if packed.shape == (shape[0], -(-width * bits // 32))]
        if len(fitting) != 1 or width % scale.shape[-1] or f"{module}.weight_zero_point" in self.files:
            raise BarberError(f"model {self.name!r}: {module} is not packed as symmetric groups of 4 or 8 bits")
        return Quantized(unpack_codes(packed, fitting[0], width), scale).dequantize()

    def tensor(self, key: str) -> Tensor:
        """The tensor of that name, whatever it is.

        Raises:
            BarberError: there is none, or its file is broken.
        """
        from safetensors import SafetensorError, safe_open

        if key not in self.files:
            raise BarberError(f"model {self.name!r} has no weight {key}")
        file = self.files[key]
        try:
            if file not in self._opened:
                self._opened[file] = safe_open(file, "pt")
            return self._opened[file].get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise BarberError(f"model {self.name!r}: {file.name} cannot be read: {error}") from None
