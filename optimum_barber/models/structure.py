"""What is known of a decoder layer: its blocks and matrices, how it is called, in which order it calls them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..base.errors import BarberError
from .architectures import Architecture, layer_blocks
from .blocks import Block, DecoderLayer
from .calls import Replay
from .file_names import FileNames
from .matrices import Matrices, MatrixView, matrices_of


@dataclass(frozen=True)
class LayerReplay:
    """How the model calls a decoder layer, and the layer its blocks.

    Attributes:
        blocks: in the order of computation, without their modules.
        shared, writes, returns: see `DecoderLayer`.
    """

    replay: Replay
    blocks: list[Block]
    shared: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    returns: Mapping[str, str] = field(default_factory=dict)

    @property
    def arguments(self) -> tuple[str, ...]:
        """The places of what the model itself gives to each window."""
        return self.replay.places[1 + len(self.shared) :]


@dataclass(frozen=True)
class LayerStructure:
    """The blocks of a decoder layer by name, not yet in the order of computation, and their matrices."""

    name: str
    module: nn.Module
    blocks: dict[str, Block]
    matrices: dict[str, Matrices]

    @classmethod
    def of(cls, name: str, module: nn.Module, architecture: Architecture, names: FileNames) -> "LayerStructure":
        """Look at a layer, which may be without weights."""
        structure = cls(name, module, {}, {})
        for short, members in layer_blocks(module, architecture).items():
            block = f"{name}.{short}"
            matrices = structure.matrices[block] = matrices_of(name, module, members, names)
            modules = [module.get_submodule(member) for member in members]
            structure.blocks[block] = Block(block, modules, matrices.linears)
        return structure

    def layer(self, blocks: Sequence[Block], replay: Replay) -> DecoderLayer:
        """Return the layer to be worked on, with its blocks in order."""
        forwards = []
        for matrices in self.matrices.values():
            forwards += matrices.forwards
        return DecoderLayer(self.name, self.module, list(blocks), replay, forwards)

    def recorded(self, recorded: LayerReplay) -> DecoderLayer:
        """Return the layer as it was recorded."""
        for block in recorded.blocks:
            own = self.blocks[block.name]
            own.places, own.width, own.extra = block.places, block.width, block.extra
        layer = self.layer([self.blocks[block.name] for block in recorded.blocks], recorded.replay)
        layer.shared, layer.writes, layer.returns = recorded.shared, recorded.writes, recorded.returns
        return layer


class CallOrder:
    """Context manager: notes the order in which a layer calls its blocks, and which of its matrices it calls."""

    def __init__(self, structure: LayerStructure) -> None:
        self.name, self._blocks = structure.name, structure.blocks
        self._matrices: dict[str, nn.Module] = {}  # what must be called: Linears, and modules that hold views
        views = {module for matrices in structure.matrices.values() for module, _ in matrices.forwards}
        for name, module in structure.module.named_modules(prefix=structure.name):
            if module in views:
                self._matrices[name] = module
        for block in self._blocks.values():
            linears = {name: linear for name, linear in block.linears.items() if not isinstance(linear, MatrixView)}
            self._matrices |= linears
        self._called: list[nn.Module] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> None:
        for module in {block.members[0] for block in self._blocks.values()} | {*self._matrices.values()}:
            self._handles.append(module.register_forward_pre_hook(self._note))

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _note(self, module: nn.Module, _: Any) -> None:
        self._called.append(module)

    def blocks(self) -> list[Block]:
        """Return the blocks in order; raises BarberError for one that is not called just once."""
        order: dict[int, Block] = {}
        for block in self._blocks.values():
            times = [time for time, module in enumerate(self._called) if module is block.members[0]]
            if len(times) != 1:
                count = len(times)
                raise BarberError(f"{self.name} cannot be replayed: it calls {block.name} {count} times, not once")
            order[times[0]] = block
        return [order[time] for time in sorted(order)]

    def check_matrices(self) -> None:
        """Refuse a matrix whose weight is used without a call, or not at all: its input is not to be seen."""
        for name, matrix in self._matrices.items():
            if not any(module is matrix for module in self._called):
                raise BarberError(f"{self.name} cannot be pruned: it never calls its {type(matrix).__name__} {name}")
