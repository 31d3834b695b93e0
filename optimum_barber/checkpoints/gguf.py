"""A GGUF file's tensors one by one: named, dequantized and ordered as transformers does for the whole file."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..base.errors import BarberError
from ..models.bounds import check_gguf
from ..models.loading import ModelReference, brief, needs_gguf
from .names import WEIGHTS_NAME
from .shards import Entry, Layout, read_ahead

AT_ONCE = 2**22  # weights, about, that are dequantized together
ONE_BY_ONE = ("", "Llama", "Nemotron", "Gemma2")  # TensorProcessors that make one tensor of one tensor
COMBINED = "transformers puts its tensors together in a way of its own"


@dataclass
class GgufWeights:
    """The weights of a GGUF file, in float32 as they come out of its blocks."""

    name: str  # of the model, for messages
    path: Path
    processor: Any  # transformers' own, which works on one tensor at a time; None where the model needs more than that
    tensors: Mapping[str, Any]  # of the file, by its names; each a view of the mapped file
    sources: dict[str, str] = field(default_factory=dict)  # for each of the model's tensors, the name of the file's
    entries: dict[str, Entry] = field(default_factory=dict)
    dtype: torch.dtype = torch.float16  # of a pruned copy, where no other is asked for
    unpacks: bool = True  # a tensor is made in memory

    @classmethod
    def open(cls, reference: ModelReference) -> "GgufWeights":
        """Open the file; raises MissingExtraError without `gguf`, BarberError if it is damaged or no GGUF file."""
        needs_gguf()
        check_gguf(reference.path)
        from gguf import GGUFReader

        try:
            reader = GGUFReader(reference.path)
            processor = _processor_of(reader)
        except Exception as error:  # whatever the reader stumbles over
            raise BarberError(
                f"model {reference.name!r}: {reference.path.name} is truncated, damaged or no GGUF file: {brief(error)}"
            ) from None
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        return cls(reference.name, reference.path, processor, tensors)

    @property
    def obstacle(self) -> str | None:
        """Reason why tensors cannot be read one by one; None where they can."""
        return COMBINED if self.processor is None else None

    @property
    def layout(self) -> Layout:
        """One file, as transformers would save it."""
        return Layout(dict.fromkeys(self.sources, WEIGHTS_NAME), {WEIGHTS_NAME: {"format": "pt"}})

    @property
    def count(self) -> int:
        """How many tensors there are."""
        return len(self.tensors)

    def match_names(self, model: nn.Module) -> None:
        """Find the file's tensor for each of the model's."""
        if self.obstacle:
            return
        from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

        names: Mapping[str, str] = get_gguf_hf_weights_map(model, self.processor)
        state = model.state_dict()
        for source, name in names.items():
            if source in self.tensors and name in state:
                self.sources[name] = source
                self.entries[name] = Entry(torch.float32, _shape_of(self.tensors[source]))

    def tensor(self, key: str) -> Tensor:
        """The tensor of that name, float32; raises BarberError if there is none."""
        if key not in self.sources:
            raise BarberError(f"model {self.name!r} has no weight {key}")
        stored = self.tensors[self.sources[key]]
        return torch.from_numpy(np.ascontiguousarray(self.processor.process(_dequantized(stored), stored.name).weights))

    def parameter(self, name: str, empty: Tensor) -> Tensor:
        """A parameter of the model by its own name."""
        return self.tensor(name)

    def tensors_of(self, name: str, parameter: Tensor) -> dict[str, Tensor]:
        """The tensors that a parameter of the model will be in a file, by name."""
        return {name: parameter}

    def reopen(self) -> "GgufWeights":
        """Return the same object: every tensor is made anew."""
        return self

    def read_ahead(self, names: Iterable[str]) -> None:
        """Have the system read these tensors while others are worked on."""
        for name in names:
            stored = self.tensors[self.sources[name]]
            read_ahead(self.path, stored.data_offset, stored.n_bytes)


def _processor_of(reader: Any) -> Any:
    """The object that puts a tensor in transformers' order; None where that takes more than the one tensor."""
    architecture = str(reader.fields["general.architecture"].contents())
    try:
        from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor
    except ImportError:  # of another transformers
        return None
    kind = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
    if _has_newer_reader(architecture) or kind.__name__.removesuffix("TensorProcessor") not in ONE_BY_ONE:
        return None
    mapping: Mapping[str, Any] = GGUF_CONFIG_MAPPING
    config = {}
    for key, name in mapping.get(architecture, {}).items():
        field = reader.fields.get(f"{architecture}.{key}")
        if name and field is not None:
            config[name] = field.contents()
    return kind(config=config)


def _has_newer_reader(architecture: str) -> bool:
    """True if transformers reads this architecture by other rules than its tensor processors."""
    try:
        from transformers.integrations.gguf.utils import is_gguf_arch_supported
    except ImportError:
        return False
    return bool(is_gguf_arch_supported(architecture))


def _shape_of(stored: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in reversed(stored.shape))  # the file names the fastest dimension first


def _dequantized(stored: Any) -> np.ndarray:
    """A tensor of the file, float32; some rows at a time bound the memory."""
    from gguf import dequantize

    blocks = stored.data.reshape(-1, stored.data.shape[-1])
    values = np.empty((len(blocks), stored.n_elements // len(blocks)), np.float32)
    step = max(AT_ONCE // values.shape[1], 1)
    for start in range(0, len(blocks), step):
        values[start : start + step] = dequantize(blocks[start : start + step], stored.tensor_type)
    return values.reshape(_shape_of(stored))
