"""Whether a checkpoint, a dense model and calibration windows belong together."""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ...base.errors import BarberError
from ...checkpoints.record import MaskFile, SparsityConfig, read_record
from ...checkpoints.safetensors import SafetensorsWeights
from ...tensors.masks import PackedMask
from .rounds import MEASURING

logger = logging.getLogger(__name__)
SEEN = 0.25  # share of the measuring windows that may be learned from too, without a warning
PIECE = 32  # tokens by which a window is known again


def pruned_record(sparse: str | Path) -> tuple[SparsityConfig, Mapping[str, PackedMask]]:
    """Record and masks of a pruned checkpoint.

    Raises:
        BarberError: it is none.
    """
    record = read_record(sparse)
    return record, MaskFile(Path(sparse) / record.masks)


def linears_under(
    model: nn.Module, record: SparsityConfig, weights: SafetensorsWeights, masks: Mapping[str, PackedMask]
) -> dict[str, nn.Linear]:
    """The pruned Linears of the dense model, by name.

    Raises:
        BarberError: the model has others, or what is kept has other values than in the model.
    """
    modules = dict(model.named_modules())
    linears: dict[str, nn.Linear] = {}
    for name, recorded in record.modules.items():
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear) or tuple(linear.weight.shape) != recorded.shape:
            raise BarberError(f"base has no Linear {name} of shape {recorded.shape}: it is another model")
        sparse, dense, keep = weights.linear(name), linear.weight.detach().cpu(), masks[name].unpack()
        if masks[name].pruned and not dense[~keep].any():
            raise BarberError(f"base is pruned itself: all of {name} that the masks prune is zero there")
        if not torch.equal(sparse, torch.where(keep, dense, 0).to(sparse.dtype)):
            raise BarberError(
                f"{name} is not the dense model's weight under its mask: refine the masks before weights are changed "
                "(SparseGPT's update, --reconstruct, LoRA, quantization), by the model that they were made from"
            )
        linears[name] = linear
    check_others(model, weights, linears)
    return linears


def check_others(model: nn.Module, weights: SafetensorsWeights, pruned: Iterable[str]) -> None:
    """Refuse a checkpoint that holds other values than the dense model where nothing is pruned.

    Raises:
        BarberError: it does; they would be lost.
    """
    state, seen = model.state_dict(), {f"{name}.weight" for name in pruned}
    for key in weights.entries.keys() & state.keys() - seen:
        held = weights.tensor(key)
        if not torch.equal(held, state[key].cpu().to(held.dtype)):
            raise BarberError(
                f"{key} differs from the dense model's: refine takes all but masks from that, and would lose it"
            )


def check_windows(tokens: Tensor) -> None:
    """Refuse too few windows; warn where those that measure are learned from too.

    Raises:
        BarberError: there are fewer than 2.
    """
    if len(tokens) < 2:
        raise BarberError("samples 1 is not legal: at least 2, one to learn from and one to measure")
    share = seen_share(tokens)
    if share > SEEN:
        logger.warning("%.0f %% of what measures is learned from too: give fewer windows, or more text", 100 * share)


def seen_share(windows: Tensor) -> float:
    """Share of the windows that measure, (samples, length) int64 in all, whose middle stands in one that is learned."""
    length = windows.shape[1]
    piece = min(PIECE, length)
    start = (length - piece) // 2
    learned: set[tuple[int, ...]] = set()
    for index, window in enumerate(windows):
        if index % MEASURING:
            learned.update(map(tuple, window.unfold(0, piece, 1).tolist()))
    middles = windows[::MEASURING, start : start + piece].tolist()
    return sum(tuple(middle) in learned for middle in middles) / len(middles)
