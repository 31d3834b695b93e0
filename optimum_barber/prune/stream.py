"""The residual stream behind the blocks of a decoder layer: how large it is, and what goes on to the next layer."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from ..models.activations import Activations
from ..models.blocks import DecoderLayer


def stream_weights(layer: DecoderLayer, hidden: Activations, outputs: Sequence[Activations]) -> Activations:
    """1 / mean square of the residual stream behind a block, for every token, (1, tokens, 1) a sample.

    Under these weights the block error is relative to what the next norm divides by, and the few tokens with massive
    activations no longer decide it. The layer adds the outputs to the stream, those of later blocks as zeros; where it
    norms them first (Gemma 2), the error is still of what goes into that norm.
    """

    def weights() -> Iterator[Tensor]:
        for inputs, *before in zip(layer.inputs(hidden), *outputs, strict=True):
            stream = layer.output(inputs, before)
            energy = stream.square().mean(-1, keepdim=True)
            if stream.ndim > 3:  # several streams side by side
                token_axis = stream.shape.index(before[-1].shape[-2])
                others = [axis for axis in range(stream.ndim - 1) if axis != token_axis]
                energy = energy.mean(others).reshape(1, -1, 1)
            yield 1 / energy.clamp(min=1e-12)

    return hidden.like(weights())


def advance(layer: DecoderLayer, hidden: Activations, outputs: list[Activations]) -> Activations:
    """What the next layer gets of every sample, from the outputs of this one's blocks."""
    streams = zip(layer.inputs(hidden), *outputs, strict=True)
    return hidden.like(layer.passed_on(x, blocks) for x, *blocks in streams)
