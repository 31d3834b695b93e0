"""What one rebuilder measures for the next: the same masks and errors, one pass fewer, and nothing of other masks."""

import pytest
import torch

from optimum_barber.prune.pipeline import prune
from optimum_barber.prune.rebuild_settings import RebuildConfig
from optimum_barber.prune.rebuilders import chain_of
from optimum_barber.prune.rebuilders.foresight import BEGINNINGS, FORESEEN, begin, foresee

from .conftest import tiny_windows
from .test_timing import ONE, made_of
from .test_trial import trial  # noqa: F401

CONFIG = RebuildConfig(method="swaps+gauss-newton")


@pytest.mark.parametrize("following", ["swaps", "gauss-newton"])
def test_what_was_foreseen_is_handed_out_once_and_for_these_masks_only(trial, following):  # noqa: F811
    def passes():
        return trial.forward_passes + trial.gradient_passes

    trial.following = following
    known, trial.masks = trial.masks, dict(trial.masks)
    before = passes()
    foresee(trial, trial.masks, CONFIG)
    assert passes() > before
    foreseen, before = trial.notes[FORESEEN][2], passes()
    assert begin(following, trial, CONFIG) is foreseen and passes() == before
    assert begin(following, trial, CONFIG) is not foreseen and passes() > before

    trial.masks = dict(known)
    foresee(trial, trial.masks, CONFIG)
    trial.masks, before = known, passes()
    begin(following, trial, CONFIG)
    assert passes() > before and FORESEEN not in trial.notes


def test_nothing_is_foreseen_for_masks_that_are_measured_or_where_no_look_is_known(trial):  # noqa: F811
    trial.following = "barber"
    foresee(trial, trial.masks, CONFIG)
    trial.following = "swaps"
    trial.error(trial.masks)
    foresee(trial, trial.masks, CONFIG)
    assert FORESEEN not in trial.notes


def test_every_rebuilder_is_told_which_one_follows(trial):  # noqa: F811
    told = []
    for rebuild in chain_of(RebuildConfig(method="barber+swaps+gauss-newton", swaps=1, newton_rounds=1)):
        trial.masks = rebuild(trial).masks
        told.append(trial.following)
    assert told == ["swaps", "gauss-newton", None]


@pytest.mark.parametrize("method", ["barber+swaps", "barber+gauss-newton", "swaps+gauss-newton"])
def test_masks_that_the_next_rebuilder_measures_are_not_measured_twice(monkeypatch, method):
    reports, masks = {}, {}
    for seen in (True, False):
        source, _, plan = made_of("llama", rebuild={**ONE, "method": method, "accept": "if-better"})
        reports[seen] = []
        if not seen:
            monkeypatch.setattr("optimum_barber.prune.rebuilders.foresight.BEGINNINGS", BlindAtLast(BEGINNINGS))
        masks[seen] = prune(source, tiny_windows(), plan, reports[seen].append)
    assert {n: m.sha256 for n, m in masks[True].items()} == {n: m.sha256 for n, m in masks[False].items()}
    for one, two in zip(*reports.values(), strict=True):
        assert (one.error_after, one.rounds) == (two.error_after, two.rounds)
        assert one.gradient_passes == two.gradient_passes
        assert one.forward_passes == two.forward_passes - 1 or not one.rounds[0]["accepted"]


class BlindAtLast(dict):
    """Beginnings that nobody finds ahead of time."""

    def __contains__(self, name):
        return False


def test_rejected_masks_leave_nothing_behind(trial):  # noqa: F811
    trial.following = "swaps"
    worse = {name: torch.zeros_like(keep) for name, keep in trial.masks.items()}
    foresee(trial, worse, CONFIG)
    models = begin("swaps", trial, CONFIG)
    fresh = BEGINNINGS["swaps"](trial, trial.masks, CONFIG)
    assert all(torch.equal(models[name].correlation, fresh[name].correlation) for name in fresh)


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
    found = trial.error(trial.masks)
    trial.masks = first
    (swaps,) = chain_of(RebuildConfig(method="swaps", shrinkage=0.0))
    assert found == trial.error(swaps(trial).masks) < trial.error(first)


def test_a_look_by_other_settings_is_not_taken(trial):  # noqa: F811
    trial.following, trial.masks = "swaps", dict(trial.masks)
    foresee(trial, trial.masks, CONFIG)
    other = CONFIG.model_copy(update={"shrinkage": 0.0})
    models, fresh = begin("swaps", trial, other), BEGINNINGS["swaps"](trial, trial.masks, other)
    assert all(torch.equal(models[name].gram, fresh[name].gram) for name in fresh)
