"""One pass for two rebuilders: same masks and errors, one pass fewer, and nothing kept of other masks."""

import pytest
import torch

from optimum_barber.models.source import ModelSource
from optimum_barber.prune.block_cache import SharedPass
from optimum_barber.prune.pipeline import Plan, prune
from optimum_barber.prune.producers import PRODUCERS
from optimum_barber.prune.rebuild_settings import RebuildConfig
from optimum_barber.prune.rebuilders import REBUILDERS, Outcome, chain_of, starts_with
from optimum_barber.prune.trial import Trial
from optimum_barber.tensors.patterns import SparsityPattern

from .conftest import tiny_model, tiny_windows
from .test_trial import trial  # noqa: F401

CONFIG = RebuildConfig(method="swaps+gauss-newton")
METHODS = ["swaps", "gauss-newton"]


def passes(trial):  # noqa: F811
    return trial.forward_passes + trial.gradient_passes


def copied(masks):
    """Other tensors with the same values."""
    return {name: keep.clone() for name, keep in masks.items()}


def wish(name):
    """The pass that the named rebuilder starts with."""
    return SharedPass(REBUILDERS[name].measure, CONFIG)


def recording(name):
    """The named rebuilder's pass, and a rebuilder that starts with it and only notes the statistics."""
    received = []

    @starts_with(REBUILDERS[name].measure)
    def note(block, config, statistics):
        received.append(statistics)
        return Outcome(block.masks)

    return note, received


@pytest.mark.parametrize("name", METHODS)
def test_the_statistics_of_a_shared_pass_are_handed_out_once_and_for_these_masks_only(trial, name):  # noqa: F811
    note, received = recording(name)
    trial.shared_pass = wish(name)
    trial.share_last_pass(trial.masks)
    shared, before = trial.cache.shared[2], passes(trial)
    note(trial, CONFIG)
    assert received[0] is shared and passes(trial) == before > 0
    note(trial, CONFIG)
    assert received[1] is not shared and passes(trial) > before

    standing, trial.masks = trial.masks, copied(trial.masks)
    trial.share_last_pass(trial.masks)
    shared, trial.masks, before = trial.cache.shared[2], standing, passes(trial)
    note(trial, CONFIG)
    assert received[2] is not shared and passes(trial) > before and trial.cache.shared is None


def test_statistics_of_masks_that_were_written_to_are_not_used(trial):  # noqa: F811
    note, received = recording("swaps")
    trial.shared_pass = wish("swaps")
    trial.share_last_pass(trial.masks)
    shared = trial.cache.shared[2]
    trial.masks["down"][:, 0] = False
    note(trial, CONFIG)
    assert received[0] is not shared


@pytest.mark.parametrize(("accept", "shared"), [("if-better", ["swaps", "gauss-newton"]), ("always", [])])
def test_the_chain_tells_the_trial_what_the_next_rebuilder_starts_with(trial, accept, shared):  # noqa: F811
    config = RebuildConfig(method="barber+swaps+gauss-newton+barber", swaps=1, newton_rounds=1, accept=accept)
    wishes = []
    for rebuild in chain_of(config):
        trial.masks = rebuild(trial).masks
        wishes.append(trial.shared_pass)
    assert [each for each in wishes if each] == [SharedPass(REBUILDERS[name].measure, config) for name in shared]
    assert wishes[2:] == [None, None]


def test_no_pass_is_shared_for_measured_masks_or_where_the_next_rebuilder_has_none(trial):  # noqa: F811
    trial.share_last_pass(trial.masks)
    assert trial.cache.shared is None and passes(trial) == 0
    trial.shared_pass = wish("swaps")
    trial.error(trial.masks)
    trial.share_last_pass(trial.masks)
    assert trial.cache.shared is None and passes(trial) == 1


@pytest.mark.parametrize("method", ["barber+swaps", "barber+gauss-newton", "swaps+gauss-newton"])
def test_masks_that_the_next_rebuilder_measures_are_not_measured_twice(monkeypatch, method):
    reports, masks = {}, {}
    for sharing in (True, False):
        config = RebuildConfig(method=method, rebuild_ratio=0.5, rounds=1)
        plan = Plan(PRODUCERS["wanda"], SparsityPattern(0.5), rebuilders=chain_of(config), relative_error=True)
        reports[sharing] = []
        if not sharing:
            monkeypatch.setattr(Trial, "share_last_pass", lambda trial, masks: None)
        masks[sharing] = prune(ModelSource(tiny_model()), tiny_windows(), plan, reports[sharing].append)
    assert {n: m.sha256 for n, m in masks[True].items()} == {n: m.sha256 for n, m in masks[False].items()}
    for one, two in zip(*reports.values(), strict=True):
        assert (one.error_after, one.rounds) == (two.error_after, two.rounds)
        assert one.gradient_passes == two.gradient_passes
        assert one.forward_passes == two.forward_passes - 1 or not one.rounds[0]["accepted"]


def test_rejected_masks_leave_nothing_to_the_next_rebuilder(trial):  # noqa: F811
    note, received = recording("swaps")
    trial.shared_pass = wish("swaps")
    trial.share_last_pass({name: torch.zeros_like(keep) for name, keep in trial.masks.items()})
    note(trial, CONFIG)
    fresh = REBUILDERS["swaps"].measure(trial, trial.masks, CONFIG)
    assert all(torch.equal(received[0][name].correlation, fresh[name].correlation) for name in fresh)


def test_a_pass_by_other_settings_is_not_used(trial):  # noqa: F811
    note, received = recording("swaps")
    trial.shared_pass = wish("swaps")
    trial.share_last_pass(trial.masks)
    other = CONFIG.model_copy(update={"shrinkage": 0.0})
    note(trial, other)
    fresh = REBUILDERS["swaps"].measure(trial, trial.masks, other)
    assert all(torch.equal(received[0][name].gram, fresh[name].gram) for name in fresh)


@pytest.mark.parametrize(("method", "left"), [("swaps+gauss-newton", ["down"]), ("swaps+barber", []), ("swaps", [])])
def test_swaps_leave_the_closing_linear_to_gauss_newton(trial, method, left):  # noqa: F811
    trial.masks = {n: torch.arange(m.numel()).view_as(m) % 2 == 0 for n, m in trial.masks.items()}
    outcome = chain_of(RebuildConfig(method=method, shrinkage=0.0))[0](trial)
    assert [name for record in outcome.rounds for name in record["linears"]] == [
        name for name in trial.linears if name not in left
    ]


def test_the_closing_linear_has_its_turn_even_where_no_inner_step_helps(trial):  # noqa: F811
    inner = {name: torch.ones_like(keep) for name, keep in trial.masks.items() if name != "down"}
    trial.masks = first = {**trial.masks, **inner}
    for rebuild in chain_of(RebuildConfig(method="swaps+gauss-newton", shrinkage=0.0)):
        trial.masks = rebuild(trial).masks
    result = trial.error(trial.masks)
    trial.masks = first
    (swaps,) = chain_of(RebuildConfig(method="swaps", shrinkage=0.0))
    assert result == trial.error(swaps(trial).masks) < trial.error(first)
