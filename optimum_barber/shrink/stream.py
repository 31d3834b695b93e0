"""The pass over the dense model that scorers and block errors share."""

from collections.abc import Iterator

from torch import Tensor

from ..models.activations import Activations
from ..models.blocks import Block, DecoderLayer
from ..models.source import ModelSource
from ..prune.pipeline import advance, watch
from ..prune.trial import Trial
from ..tensors.patterns import SparsityPattern

ANY = SparsityPattern(0.5)  # a trial wants a pattern; units follow none


def dense_pass(
    source: ModelSource, windows: Tensor, needs: frozenset[str] = frozenset(), batch_size: int | None = None
) -> Iterator[tuple[DecoderLayer, Block, Trial]]:
    """Run every block once on the dense stream and yield its layer, itself and its inputs and outputs.

    Args:
        source: the dense model.
        windows: (samples, length) int64.
        needs: statistics of the inputs of the block's Linears to sum.
        batch_size: samples on the device at once; None for all.
    """
    hidden = Activations(source.begin(windows), batch_size)
    for layer in source.layers():
        outputs: list[Activations] = []
        for block in layer.blocks:
            linears = block.linears if needs else {}
            trial = watch(layer, block, hidden, outputs, linears, needs, ANY)
            yield layer, block, trial
            outputs.append(trial.targets)
        hidden = advance(layer, hidden, outputs)
