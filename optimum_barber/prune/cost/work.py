"""The work of one block, counted from its shapes: products, and what is done to numbers and weights one by one."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase

from torch import nn

from ...models.architectures import Architecture, linears_of
from ...tensors.sums import entries
from ..block_cache import CLOSING_BYTES


@dataclass(frozen=True)
class Work:
    """Work by its kind; or, as rates, how much of each kind a machine does in a second.

    Attributes:
        forward: floating-point operations (FLOP) of products of activations with weights.
        backward: FLOP of the products that make the gradients of weights, and of the closing Linear's input.
        gram: FLOP of X^T X and of residual^T X over all tokens.
        attention: FLOP of attention scores times values, no triangle spared.
        attention_backward: FLOP of their gradients.
        pointwise: numbers that Linears put out and norms, activations, residuals and errors go over.
        weights: weights that are masked, or that one elementwise operation goes over.
        chosen: weights among which a producer chooses.
        factored: FLOP of Cholesky factors and inverses.
        ranked: weights that Barber ranks.
        applied: weights whose masks are made from a ranking.
        exchanged: weights times exchanges a row.
        kept: weights that are checked, packed, written as masks and verified.
        written: bytes on their way to the disk.
        unpacked: weights that are made of a file's blocks as they are read.
    """

    forward: float = 0.0
    backward: float = 0.0
    gram: float = 0.0
    attention: float = 0.0
    attention_backward: float = 0.0
    pointwise: float = 0.0
    weights: float = 0.0
    chosen: float = 0.0
    factored: float = 0.0
    ranked: float = 0.0
    applied: float = 0.0
    exchanged: float = 0.0
    kept: float = 0.0
    written: float = 0.0
    unpacked: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, factor: float) -> "Work":
        return Work(*(factor * getattr(self, f.name) for f in fields(self)))

    @property
    def kinds(self) -> list[str]:
        """The kinds of which there is any."""
        return [f.name for f in fields(self) if getattr(self, f.name)]

    @property
    def flops(self) -> float:
        """FLOP of all products over the tokens."""
        return self.forward + self.backward + self.gram + self.attention + self.attention_backward

    def seconds(self, rates: "Work") -> float:
        """How long it takes at these rates."""
        return float(sum(getattr(self, kind) / getattr(rates, kind) for kind in self.kinds))


def total(works: Iterable[Work]) -> Work:
    """All of it together."""
    return sum(works, Work())


@dataclass(frozen=True)
class Tokens:
    """What is calibrated on.

    Attributes:
        samples: windows.
        length: tokens a window.
        hidden: width of the hidden states.
    """

    samples: int
    length: int
    hidden: int

    @property
    def count(self) -> int:
        """Tokens in all."""
        return self.samples * self.length


@dataclass(frozen=True)
class BlockShape:
    """One block in numbers.

    Attributes:
        linears: (out, in) of the Linears that are pruned, the one that closes the block last.
        dense: (out, in) of those that are not.
        scores: width over which attention forms its scores, heads times their size; 0 without attention.
    """

    linears: tuple[tuple[int, int], ...]
    dense: tuple[tuple[int, int], ...] = ()
    scores: int = 0

    @property
    def weights(self) -> int:
        """Those of the Linears that are pruned."""
        return weights_of(self.linears)

    @property
    def inputs(self) -> list[int]:
        """Widths of the different inputs: Linears of one width share theirs, and the closing one has its own."""
        return [*{width for _, width in self.linears[:-1]}, *(width for _, width in self.linears[-1:])]

    def forward(self, tokens: Tokens) -> Work:
        """One pass with dense weights over all tokens: 2 out in FLOP a token and Linear, 4 length scores a token."""
        everything = (*self.linears, *self.dense)
        return Work(
            forward=2 * tokens.count * weights_of(everything),
            attention=4 * tokens.count * tokens.length * self.scores,
            pointwise=2 * tokens.count * (sum(out for out, _ in everything) + 4 * tokens.hidden),
        )

    def masked(self, tokens: Tokens) -> Work:
        """The same under masks."""
        return self.forward(tokens) + Work(weights=self.weights)

    def last(self, tokens: Tokens) -> Work:
        """The same where only the mask of the closing Linear is another one than in the pass before."""
        *inner, (out, width) = self.linears
        if not inner or 4 * tokens.count * width > CLOSING_BYTES:
            return self.masked(tokens)
        pointwise = 2 * tokens.count * (out + 2 * tokens.hidden)
        return Work(forward=2 * tokens.count * out * width, pointwise=pointwise, weights=self.weights)

    def gradient(self, tokens: Tokens) -> Work:
        """One masked pass forward and backward: gradients of the weights, and on the way that of the closing input."""
        forward, closing = self.masked(tokens), self.linears[-1:]
        return forward + Work(
            backward=2 * tokens.count * (self.weights + weights_of(closing)),
            attention_backward=2.5 * forward.attention,  # scores anew, and two products for each of the two
            pointwise=2 * forward.pointwise,
            weights=3 * tokens.samples * self.weights,  # squared, made float64, added up
        )

    def grams(self, tokens: Tokens) -> Work:
        """Gram matrices of the inputs, and the correlation of each Linear's residual with its input."""
        return self.inner_grams(tokens) + self.closing_grams(tokens)

    def closing_grams(self, tokens: Tokens) -> Work:
        """Those of the Linear that closes the block."""
        closing = self.linears[-1]
        return Work(gram=2 * tokens.count * (entries(closing[1]) + weights_of([closing])))

    def inner_grams(self, tokens: Tokens) -> Work:
        """The same without the Linear that closes the block."""
        inner = self.linears[:-1]
        squares = sum(entries(width) for width in {width for _, width in inner})
        return Work(gram=2 * tokens.count * squares, forward=2 * sum(out * width * width for out, width in inner))


def weights_of(linears: Iterable[tuple[int, int]]) -> int:
    """How many weights Linears of these shapes (out, in) have."""
    return sum(out * width for out, width in linears)


def shapes_of(
    stack: nn.ModuleList, path: str, architecture: Architecture, hidden: int, ignore: Sequence[str] = ()
) -> list[BlockShape]:
    """Every block of a stack of decoder layers, which may be without weights.

    Args:
        stack: the layers.
        path: of the stack.
        architecture: their blocks.
        hidden: width of the hidden states; the last Linear that gives it closes its block.
        ignore: globs of Linears that stay dense.
    """
    found = []
    for index, layer in enumerate(stack):
        for block, members in architecture.blocks.items():
            linears = linears_of(layer, members)
            closing = [name for name, linear in linears.items() if linear.out_features == hidden][-1:]
            ordered = [*(name for name in linears if name not in closing), *closing]
            left = {n for n in ordered if any(fnmatchcase(f"{path}.{index}.{n}", glob) for glob in ignore)}
            shapes = {name: (linears[name].out_features, linears[name].in_features) for name in ordered}
            found.append(
                BlockShape(
                    linears=tuple(shape for n, shape in shapes.items() if n not in left),
                    dense=tuple(shape for n, shape in shapes.items() if n in left),
                    scores=shapes[ordered[-1]][1] if block == "attention" else 0,
                )
            )
    return found
