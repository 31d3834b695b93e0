"""The one loop over decoder layers and blocks that prunes: observe, produce, rebuild, commit, advance."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..base.memory import peak_memory
from ..base.notebook import notebook_table
from ..base.ranks import ALONE, Ranks
from ..models.activations import Activations, retry_with_fewer_samples
from ..models.blocks import Block, DecoderLayer
from ..models.calls import forward_of
from ..models.matrices import RoutedExperts, is_transposed
from ..models.source import ModelSource
from ..tensors.input_statistics import InputRecorder, InputStatistics
from ..tensors.masks import PackedMask, count_all
from ..tensors.patterns import SparsityPattern
from .block_cache import Masks
from .contract import ask, check_rebuilt
from .producers import LinearInput, Producer
from .rebuilders import Rebuilder
from .rebuilders.base import swap_count
from .reconstructions import Reconstruction
from .stream import advance, stream_weights
from .trial import Trial

logger = logging.getLogger(__name__)
SHOWN = ("error_before", "error_after", "swaps", "pairs", "rows_without_swap", "seconds")  # of a block, in notebooks


@dataclass
class BlockReport:
    """What happened to one block, such as "model.layers.0.attention".

    Attributes:
        error_before: E at the producer's masks.
        error_after: E at the masks and weights that were committed.
        error_rebuilt: E at the rebuilt masks, before the kept weights were given new values.
        pairs: worthwhile pairs considered, over all rounds.
        swaps: kept weights that differ between first and last masks.
        rows: output rows of the block's Linears; in `rows_without_swap` the mask is as the producer made it.
        rounds: ratio taken, pairs, swaps and acceptance of each round.
        forward_passes: over all samples, beside the gradient passes (forward and backward).
        peak_memory: bytes, of the process or of the CUDA device, so far.
    """

    block: str
    error_before: float
    error_after: float
    error_rebuilt: float
    pairs: int = 0
    swaps: int = 0
    rows: int = 0
    rows_without_swap: int = 0
    rounds: list[dict[str, Any]] = field(default_factory=list)
    reconstructions: list[dict[str, Any]] = field(default_factory=list)
    forward_passes: float = 0.0
    gradient_passes: float = 0.0
    seconds: float = 0.0
    peak_memory: int = 0

    def _repr_html_(self) -> str:
        return notebook_table(self.block, [vars(self)], SHOWN)


@dataclass
class Plan:
    """What `prune` does to every block.

    Attributes:
        producer: makes the first masks, by its arguments and the seed.
        rebuilders: improve them, one after the other.
        reconstructions: give the kept weights new values under them, one after the other.
        ignore: globs of Linears that stay dense.
        batch_size: samples on the device at once; None for all.
        scratch: folder for activations; None to hold them in memory.
        exact: whether the producer must meet the pattern's sparsity.
        all_experts: whether the producer's statistics are of all tokens for every expert, routed to it or not.
        relative_error: whether the error of a token counts relative to the size of its residual stream.
        own_statistics: of the inputs of some Linears, in place of those that are summed; by layer and trial.
        ranks: that share the samples; all of them prune the same layers.
        patterns: of blocks and Linears by name, where they have a share of the budget of their own.
    """

    producer: Producer
    pattern: SparsityPattern
    arguments: Mapping[str, Any] = field(default_factory=dict)
    rebuilders: Sequence[Rebuilder] = ()
    reconstructions: Sequence[Reconstruction] = ()
    ignore: Sequence[str] = ()
    seed: int = 0
    batch_size: int | None = None
    scratch: Path | None = None
    exact: bool = True
    all_experts: bool = False
    relative_error: bool = False
    own_statistics: Callable[[DecoderLayer, Trial], dict[str, InputStatistics]] | None = None
    ranks: Ranks = ALONE
    patterns: Mapping[str, SparsityPattern] = field(default_factory=dict)

    def pattern_of(self, name: str) -> SparsityPattern:
        """What the masks of a block, or the first mask of a Linear, must look like."""
        return self.patterns.get(name, self.pattern)


BlockCallback = Callable[[BlockReport], None]


@torch.no_grad()
def prune(
    source: ModelSource, windows: Tensor, plan: Plan, callback: BlockCallback = lambda report: None
) -> dict[str, PackedMask]:
    """Prune every block of `source` in a single pass; each block sees what the pruned ones before it give.

    Args:
        source: the decoder layers, changed in place or written to the disk; layers that are done already are left out.
        windows: (samples, length) int64, the calibration tokens of all ranks.
        callback: called after each block.

    Returns:
        The keep masks by Linear, of the layers of this call.
    """
    masks: dict[str, PackedMask] = {}
    share = plan.ranks.share(len(windows))
    hidden = Activations(source.begin(windows[share.slice]), plan.batch_size, plan.scratch, share)
    for index in range(source.done, len(source)):
        layer_masks, hidden = _prune_layer(source, index, hidden, plan, callback)
        masks |= layer_masks
    return masks


def _prune_layer(
    source: ModelSource, index: int, hidden: Activations, plan: Plan, callback: BlockCallback
) -> tuple[dict[str, PackedMask], Activations]:
    """Prune the blocks of a layer one after the other: its masks as the source keeps them, and what it passes on.

    On return nothing refers to the layer's weights, so the next one takes their memory.
    """
    with source.layer(index) as layer:
        outputs: list[Activations] = []
        masks: dict[str, PackedMask] = {}
        for block in layer.blocks:
            block_masks, output = _prune_block(layer, block, hidden, outputs, plan, callback)
            masks |= block_masks
            outputs.append(output)
        passed_on = partial(advance, layer, hidden, outputs)
        hidden = retry_with_fewer_samples(layer.name, passed_on, [hidden, *outputs], plan.ranks.count == 1)
        return source.commit(index, masks, hidden), hidden


def _prune_block(
    layer: DecoderLayer,
    block: Block,
    hidden: Activations,
    outputs: list[Activations],
    plan: Plan,
    callback: BlockCallback,
) -> tuple[dict[str, PackedMask], Activations]:
    """Settle and commit a block: its masks, and its outputs under them."""
    started, alone = time.perf_counter(), plan.ranks.count == 1
    settled = partial(_settle, layer, block, hidden, outputs, plan)
    trial, report = retry_with_fewer_samples(block.name, settled, [hidden, *outputs], alone)
    output = trial.outputs(trial.masks)
    report.seconds, report.peak_memory = time.perf_counter() - started, peak_memory()
    callback(report)
    trial.commit()
    return {name: PackedMask.pack(keep) for name, keep in trial.masks.items()}, output


def _settle(
    layer: DecoderLayer, block: Block, hidden: Activations, outputs: list[Activations], plan: Plan
) -> tuple[Trial, BlockReport]:
    """Observe, produce, rebuild, reconstruct: the block with its last masks, under which its outputs are known.

    The block itself stays as it was.
    """
    trial = observe(layer, block, hidden, outputs, plan)
    trial.masks = first = produce(trial, plan)
    rounds: list[dict[str, Any]] = []
    for rebuilder in plan.rebuilders if trial.linears else ():
        outcome = rebuilder(trial)
        check_rebuilt(block.name, trial.masks, outcome.masks, trial.pattern)
        trial.masks = outcome.masks
        rounds += outcome.rounds
    error_before, error_rebuilt = trial.error(first), trial.error(trial.masks)
    reconstructions = [reconstruct(trial) for reconstruct in plan.reconstructions if trial.linears]
    trial.outputs(trial.masks)
    unchanged = [(trial.masks[name] == keep).all(1) for name, keep in first.items()]
    return trial, BlockReport(
        block.name,
        error_before,
        trial.error(trial.masks),
        error_rebuilt,
        pairs=sum(int(record.get("pairs", 0)) for record in rounds),
        swaps=swap_count(first, trial.masks),
        rows=sum(len(rows) for rows in unchanged),
        rows_without_swap=count_all(unchanged),
        rounds=rounds,
        reconstructions=reconstructions,
        forward_passes=trial.forward_passes,
        gradient_passes=trial.gradient_passes,
    )


def observe(layer: DecoderLayer, block: Block, hidden: Activations, outputs: list[Activations], plan: Plan) -> Trial:
    """Inputs and dense outputs of a block on the sparse stream, with the statistics that the producer needs."""
    linears = {}
    for name, linear in block.linears.items():
        if not any(fnmatchcase(name, glob) for glob in plan.ignore):
            linears[name] = linear
    needs = plan.producer.needs
    trial = watch(layer, block, hidden, outputs, linears, needs, plan.pattern_of(block.name), plan.ranks)
    if plan.all_experts and needs:
        trial.statistics |= statistics_of_experts(layer, trial, needs)
    if plan.own_statistics is not None:
        trial.statistics |= plan.own_statistics(layer, trial)
    if plan.relative_error:
        trial.token_weights = stream_weights(layer, hidden, [*outputs, trial.targets])
    return trial


def watch(
    layer: DecoderLayer,
    block: Block,
    hidden: Activations,
    outputs: list[Activations],
    linears: dict[str, nn.Linear],
    needs: frozenset[str],
    pattern: SparsityPattern,
    ranks: Ranks = ALONE,
) -> Trial:
    """Run a block once on every sample: its inputs, its outputs as it stands, and statistics of its Linears' inputs.

    `hidden` is what enters the layer, `outputs` those of its blocks before; `linears` are on trial.
    """
    streams = zip(layer.inputs(hidden), *outputs, strict=True)
    inputs = hidden.like(layer.input_of(block, x, before) for x, *before in streams)
    with InputRecorder(linears, needs) as recorder:
        targets = hidden.like(block(x) for x in inputs)
    return Trial(block, linears, inputs, targets, pattern, statistics=recorder.result(ranks), ranks=ranks)


def statistics_of_experts(layer: DecoderLayer, trial: Trial, needs: frozenset[str]) -> dict[str, InputStatistics]:
    """Statistics of the routed experts on trial from all tokens, whose outputs nobody uses.

    The input of a down projection is what its own expert makes of each token.
    """
    experts = {module: forward for module, forward in layer.forwards if isinstance(forward, RoutedExperts)}
    routed: set[nn.Linear] = set()
    for forward in experts.values():
        routed |= forward.linears()
    linears = {name: linear for name, linear in trial.linears.items() if linear in routed}
    with ExitStack() as stack:
        recorder = stack.enter_context(InputRecorder(linears, needs))
        for module, forward in experts.items():
            stack.enter_context(forward_of(module, forward.on_all_tokens))
        for x in trial.inputs if linears else ():
            trial.forward(x)
    return recorder.result(trial.ranks)


def produce(trial: Trial, plan: Plan) -> Masks:
    """The producer's masks, checked; weights that it changes become those of the trial.

    The statistics of a Linear that no token reaches leave magnitudes to compare: a warning counts them.
    """
    masks: Masks = {}
    updated = {}
    if plan.producer.needs:
        unreached = [name for name in trial.linears if not trial.statistics[name].tokens]
        if unreached:
            message = "no token reaches %d of %d Linears of a block, such as %s: only the size of their weights counts"
            logger.warning(message, len(unreached), len(trial.linears), unreached[0])
    for name in trial.linears:
        stored = is_transposed(trial.linears[name])
        linear = LinearInput(name, trial.weight(name), plan.pattern_of(name), trial.statistics[name], plan.seed, stored)
        made = ask(plan.producer, linear, plan.arguments, plan.exact)
        masks[name] = made.keep
        if made.weight is not None:
            updated[name] = trial.ranks.broadcast(torch.where(made.keep, made.weight, linear.weight))
    trial.use_values(updated)
    return masks
