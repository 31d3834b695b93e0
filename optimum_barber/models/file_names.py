"""How a model's parameters are named and cut in its files: transformers merges and renames some while it loads."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..base.errors import BarberError
from .loading import brief

STEP = 1 << 40  # between the row numbers of two parameters


@dataclass(frozen=True)
class Piece:
    """A part of a parameter that is one matrix of the files.

    Attributes:
        tensor: name in the files.
        span: first and last index, exclusive, of the parameter's first dimension that the tensor has.
        index: into the first dimension of the tensor, where that has three; None for all of it.
        expert: into the first dimension of the parameter, if that has three; None for all of it.
        rows: first and last row, exclusive, of the parameter's second-to-last dimension.
    """

    tensor: str
    span: tuple[int, int]
    index: int | None = None
    expert: int | None = None
    rows: tuple[int, int] = (0, 0)

    @property
    def matrix(self) -> str:
        """The name by which masks know the matrix."""
        name = self.tensor.removesuffix(".weight")
        return name if self.index is None else f"{name}.{self.index}"

    def part_of(self, parameter: Tensor) -> Tensor:
        """The piece's tensor as a view of its parameter."""
        if self.index is None and self.expert is not None:
            return parameter[self.expert, slice(*self.rows)]
        if parameter.ndim == 0 or self.span[1] - self.span[0] == len(parameter):
            return parameter
        return parameter[slice(*self.span)]


@dataclass
class FileNames:
    """The pieces of each parameter by its name; those that are not listed are in the files as they are in memory.

    Attributes:
        obstacles: parameters that the files have in another order of rows.
    """

    pieces: dict[str, list[Piece]] = field(default_factory=dict)
    obstacles: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, model: Any) -> "FileNames":
        """Ask transformers, which would write a model of row numbers to its files."""
        state = {name: tensor for name, tensor in model.state_dict().items() if tensor.ndim}
        numbers = {name: _row_numbers(tensor, index) for index, (name, tensor) in enumerate(state.items())}
        written = _written(model, dict(numbers))
        _turn_back(written, model, state)
        if written.keys() == state.keys() and all(torch.equal(written[name], numbers[name]) for name in state):
            return cls()
        return cls._traced(list(state), state, written)

    @classmethod
    def _traced(cls, order: list[str], state: Mapping[str, Tensor], written: Mapping[str, Tensor]) -> "FileNames":
        names = cls({name: [] for name in order})
        for tensor, rows in written.items():
            numbers = rows.flatten()
            first = int(numbers[0])
            name = order[first // STEP]
            contiguous = torch.equal(numbers, torch.arange(first, first + len(numbers)))
            if not contiguous or (rows.ndim > 1 and rows.shape[-1] != 1):
                names.obstacles.add(name)
            else:
                names.pieces[name] += _pieces(tensor, rows, first % STEP, state[name])
        for name, pieces in names.pieces.items():
            pieces.sort(key=lambda piece: (piece.expert or 0, piece.rows))
            if not pieces:
                names.obstacles.add(name)
        return names

    def tensors_of(self, name: str, parameter: Tensor) -> dict[str, Tensor]:
        """Cut a parameter into the tensors of the files, by name."""
        tensors = {}
        for piece in self.of_parameter(name, parameter):
            tensors[piece.tensor] = piece.part_of(parameter)
        return tensors

    def parameter_of(self, name: str, empty: Tensor, tensor: Callable[[str], Tensor]) -> Tensor:
        """Put a parameter together from the tensors of the files, which `tensor` gives by name."""
        pieces = {piece.tensor: piece for piece in self.of_parameter(name, empty)}
        if len(pieces) == 1:
            return tensor(next(iter(pieces)))
        whole: Tensor | None = None
        for stored, piece in pieces.items():
            part = tensor(stored)
            if whole is None:
                whole = part.new_empty(empty.shape)
            piece.part_of(whole).copy_(part)
        assert whole is not None
        return whole

    def of_parameter(self, name: str, parameter: Tensor) -> list[Piece]:
        """The pieces of a parameter in the order of its rows; raises BarberError if the files have another order."""
        if name in self.obstacles:
            raise BarberError(f"model has {name} in its files in another order of rows: it cannot be pruned")
        if name in self.pieces:
            return self.pieces[name]
        return _pieces(name, _row_numbers(parameter, 0), 0, parameter)


def _turn_back(written: dict[str, Any], model: Any, state: Mapping[str, Tensor]) -> None:
    """Turn back row numbers that are transposed for their single column alone, where a parameter itself is not."""
    for name, rows in written.items():
        if rows.ndim == 3 and rows.shape[1] == 1 and not _transposed(model, name, state.get(name)):
            written[name] = rows.mT


def _transposed(model: Any, name: str, parameter: Tensor | None) -> bool:
    """Whether transformers transposes a parameter for its files, which may depend on the shape."""
    if parameter is None:
        return True
    probe = torch.empty(parameter.mT.shape, device="meta").mT
    written = list(_written(model, {name: probe}).values())
    return len(written) != 1 or written[0].stride() != probe.stride()


def tensors_of_files(model: Any, values: bool = True) -> dict[str, Tensor]:
    """Return the tensors that transformers would write of a model, tied ones once, by their names in the files.

    Without `values` they are on the meta device.
    """
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tied -= {name for name, _ in model.named_parameters()}
    state = {}
    for name, tensor in model.state_dict().items():
        if name not in tied:
            state[name] = tensor if values else tensor.to("meta")
    return _written(model, state)


def _written(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Undo what transformers does to names and tensors while it loads."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # before transformers 5 a file had the names of memory
        return state
    try:
        written: dict[str, Tensor] = revert_weight_conversion(model, state)
    except Exception as error:  # whatever a conversion raises
        raise BarberError(f"model's files cannot be told from its parameters: {brief(error)}") from None
    return written


def _row_numbers(tensor: Tensor, index: int) -> Tensor:
    """Number the rows of a tensor, the last dimension of one with several left out."""
    shape = tensor.shape if tensor.ndim == 1 else (*tensor.shape[:-1], 1)
    return (torch.arange(torch.Size(shape).numel()) + index * STEP).reshape(shape)


def _pieces(tensor: str, rows: Tensor, first: int, parameter: Tensor) -> list[Piece]:
    """What a tensor of the files holds of a parameter, from row number `first` on."""
    if parameter.ndim != 3:
        span = (first, first + rows.numel())
        return [Piece(tensor, span, rows=span)]
    height = parameter.shape[1]
    start, expert = first % height, first // height
    if rows.ndim != 3:
        return [Piece(tensor, (expert, expert + 1), None, expert, (start, start + rows.numel()))]
    span = (expert, expert + len(rows))
    return [Piece(tensor, span, index, expert + index, (0, height)) for index in range(len(rows))]
