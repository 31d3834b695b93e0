"""DSnoT (arXiv 2310.08915): growing and pruning by expected errors, without a gradient and without a Gram matrix."""

from ...tensors.dsnot import grow_and_prune
from ...tensors.input_statistics import InputRecorder
from ..rebuild_settings import RebuildConfig
from ..trial import Trial
from .base import REBUILDERS, Outcome, swap_count

CYCLES = 50  # as published
LEAST_VARIANCE = 1e-6  # of the mean square: below, a float32 difference of the two says nothing
NEEDS = frozenset({"input_norm", "input_sum"})


@REBUILDERS.register("dsnot")
def dsnot(trial: Trial, config: RebuildConfig) -> Outcome:
    """All Linears at once, by the inputs that the masks give them; kept only if the block error falls (`accept`)."""
    group = trial.pattern.group if trial.pattern.semi_structured else None
    with InputRecorder(trial.linears, NEEDS) as recorder:
        trial.watch(trial.masks)
    candidate = {}
    for name, inputs in recorder.result(trial.ranks).items():
        assert inputs.input_sum is not None and inputs.input_norm is not None
        mean = inputs.input_sum / inputs.tokens
        power = inputs.input_norm.square() / inputs.tokens
        variance = (power - mean.square()).maximum(LEAST_VARIANCE * power)
        values, keep = trial.values(name), trial.masks[name]
        candidate[name] = grow_and_prune(values, keep, mean, variance, inputs.input_norm, CYCLES, group)
    swaps = swap_count(trial.masks, candidate)
    accepted = config.accept == "always" or trial.error(candidate) < trial.error(trial.masks)
    return Outcome(candidate if accepted else trial.masks, [{"swaps": swaps, "accepted": accepted}])
