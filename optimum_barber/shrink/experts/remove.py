"""Experts cut out of a mixture: checked against the model first, scored in one pass on the dense stream."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...base.errors import BarberError
from ...models.activations import Activations
from ...models.blocks import Block
from ...models.bounds import EXPERTS, EXPERTS_PER_TOKEN, first_setting
from ...models.loading import empty_model
from ...models.matrices import ROUTERS, MatrixView, is_experts
from ...models.source import ModelSource
from ...tensors.unit_scores import highest_in_groups
from ..scan import dense_pass
from .scores import EXPERT_SCORERS, Expert, ExpertInput, ExpertScorer, RoutedSums, cut_experts

GROUPS = ("n_group", "n_groups")


@dataclass
class ExpertRemoval:
    """A removal that has been checked and not yet made.

    Attributes:
        source: the model.
        experts: how many every sparse MLP has, by the name of the experts' module.
        kept: how many of them stay.
        groups: of the router, of which each keeps the same number.
        rows: for every tensor with one row an expert, the name of the experts' module.
        config: the configuration of the smaller model.
        scorer: ranks the experts.
    """

    source: ModelSource
    experts: dict[str, int]
    kept: int
    groups: int
    rows: dict[str, str]
    config: Any
    scorer: ExpertScorer


def plan_removal(model: Any, share: float, scorer: str, device: torch.device) -> ExpertRemoval:
    """Check a removal against the model.

    Raises:
        BarberError: an unknown scorer, a model without experts or whose counts differ, a share that takes none, or that
            leaves fewer experts than the router picks.
    """
    ranking, source = EXPERT_SCORERS[scorer], ModelSource(model, device)
    experts: dict[str, int] = {}
    rows: dict[str, str] = {}
    for name, module, parent in _sparse_mlps(source):
        experts[name] = len(module.get_parameter("down_proj"))
        rows |= dict.fromkeys(_tensors_by_expert(name, module, parent, experts[name]), name)
    if not experts:
        raise BarberError(f"remove experts needs a mixture of experts: {source.model_type} has none that is known")
    counts = set(experts.values())
    if len(counts) > 1:
        numbers = " and ".join(map(str, sorted(counts)))
        raise BarberError(f"model has {numbers} experts in its layers: one number is needed")
    before = counts.pop()
    text = model.config.get_text_config()
    groups = first_setting(text, GROUPS)
    kept = _kept_count(share, before, groups, text)
    return ExpertRemoval(source, experts, kept, groups, rows, _smaller_config(model.config, before, kept), ranking)


def _kept_count(share: float, before: int, groups: int, config: Any) -> int:
    """How many experts stay: the nearest number (of two the larger) that the router's groups share evenly."""
    each = before // groups
    gone = math.ceil(Fraction(str(share)) * each - Fraction(1, 2)) * groups
    kept = before - gone
    chosen = first_setting(config, EXPERTS_PER_TOKEN)
    if not gone:
        raise BarberError(f"remove experts {share:g} removes none of {before}: one is {groups / before:.2g} of them")
    if kept < max(chosen, groups):
        most = (before - max(chosen, groups)) / before
        raise BarberError(
            f"remove experts {share:g} leaves {kept} of {before}, and the router picks {chosen}: at most {most:.2g}"
        )
    return kept


def _smaller_config(config: Any, before: int, kept: int) -> Any:
    smaller = copy.deepcopy(config)
    text = smaller.get_text_config()
    names = [name for name in EXPERTS if getattr(text, name, None) == before]
    if not names:
        raise BarberError(f"{type(config).__name__} has no number of experts that is known: {', '.join(EXPERTS)}")
    for name in names:
        setattr(text, name, kept)
    return smaller


def _sparse_mlps(source: ModelSource) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Full name and module of the experts of each layer that has any, and the module that holds them."""
    for index, layer in enumerate(source.stack):
        for name, module in layer.named_modules():
            if is_experts(module):
                parent = layer.get_submodule(name.rpartition(".")[0])
                yield f"{source.path}.{index}.{name}", module, parent


def _tensors_by_expert(name: str, module: nn.Module, parent: nn.Module, count: int) -> Iterator[str]:
    """The tensors that have one row an expert: the experts' own, and those of the router beside them."""
    for own in module.state_dict():
        yield f"{name}.{own}"
    prefix = name.rpartition(".")[0]
    for other, tensor in parent.state_dict().items():
        router = other.partition(".")[0] in ROUTERS or "correction_bias" in other
        if router and tensor.ndim and len(tensor) == count:
            yield f"{prefix}.{other}"


@torch.no_grad()
def remove_experts(
    removal: ExpertRemoval, windows: Tensor, seed: int = 0, callback: Callable[[], object] = lambda: None
) -> tuple[Any, dict[str, list[int]], dict[str, list[float]]]:
    """Score all experts and cut the lowest out; the dense model does not change.

    Args:
        removal: what goes.
        windows: (samples, length) int64, the calibration tokens.
        seed: of random scores.
        callback: called after each sparse MLP.

    Returns:
        The smaller model; the experts that stay and the scores of all, by the name of the experts' module.
    """
    kept, scores = {}, {}
    for inputs in _scored(removal, windows, seed):
        values = removal.scorer.function(inputs)
        scores[inputs.name] = values.double().tolist()
        kept[inputs.name] = highest_in_groups(values, removal.groups, removal.kept)
        callback()
    model: Any = removal.source.model
    state = cut_experts(model.state_dict(), kept, removal.rows)
    small = empty_model(removal.config, attn_implementation=model.config._attn_implementation)
    small.load_state_dict(state, assign=True)
    small.tie_weights()
    small.generation_config = copy.deepcopy(model.generation_config)
    return small.eval(), kept, scores


def _scored(removal: ExpertRemoval, windows: Tensor, seed: int) -> Iterator[ExpertInput]:
    """The input of the scorer for each sparse MLP, in the order of computation."""
    names = iter(removal.experts)
    for _, block, trial in dense_pass(removal.source, windows):
        experts = _expert_views(block)
        if experts:
            sums = _routed_sums(block, trial.inputs, [views[-1] for views in experts])
            weights: list[Expert] = []
            for views in experts:
                weights.append([view.weight.detach() for view in views])
            norms = torch.tensor([total.gated_norm for total in sums], dtype=torch.float64)
            tokens = torch.tensor([total.tokens for total in sums])
            yield ExpertInput(next(names), weights, seed, norms, [total.gated_input for total in sums], tokens)


def _expert_views(block: Block) -> list[list[MatrixView]]:
    """The matrices of each expert of a block, its last projection last."""
    experts: dict[int, list[MatrixView]] = {}
    for linear in block.linears.values():
        if isinstance(linear, MatrixView) and linear.expert is not None:
            experts.setdefault(linear.expert, []).append(linear)
    for views in experts.values():
        views.sort(key=lambda view: view.closing)
    return [experts[index] for index in sorted(experts)]


def _routed_sums(block: Block, inputs: Activations, closing: Sequence[MatrixView]) -> list[RoutedSums]:
    """What the last projection of each expert is given and gives, summed over all windows."""
    sums = [RoutedSums() for _ in closing]
    with ExitStack() as stack:
        for view, total in zip(closing, sums, strict=True):
            stack.callback(view.register_forward_hook(partial(_add, total)).remove)
        for x in inputs:
            block(x)
    return sums


def _add(sums: RoutedSums, view: MatrixView, args: tuple[Tensor, ...], output: Tensor) -> None:
    sums.add(args[0], output, view.routing)
