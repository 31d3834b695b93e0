"""The closing Linear alone, against passes of the whole block."""

import pytest
import torch

from optimum_barber.models.activations import Activations
from optimum_barber.prune.block_cache import CLOSING_BYTES, closing_inputs_fit
from optimum_barber.prune.quadratic import quadratics

from .test_trial import trial  # noqa: F401


@pytest.fixture
def calls(trial, monkeypatch):  # noqa: F811
    """How often the whole block runs."""
    made, inner = [], trial.forward
    monkeypatch.setattr(trial, "forward", lambda x: (made.append(x), inner(x))[1])
    return made


@torch.no_grad()
def watched(trial, **changed):  # noqa: F811
    """The trial behind a pass for the closing Linear, and masks that differ by those named."""
    quadratics(trial, trial.masks, ["down"], keep_closing_inputs=True)
    return {name: ~keep if name in changed else keep for name, keep in trial.masks.items()}


@pytest.mark.parametrize("weighted", [False, True])
def test_it_gives_the_same_error_and_outputs_to_the_bit(trial, calls, weighted):  # noqa: F811
    if weighted:
        trial.token_weights = Activations(torch.rand(1, 5, 1, dtype=torch.float64) for _ in range(3))
    masks = watched(trial, down=True)
    calls.clear()
    error, outputs = trial.error(masks), list(trial.outputs(masks))
    assert not calls and trial.cache.closing_inputs is None
    again = {name: keep.clone() for name, keep in masks.items()}
    assert trial.error(again) == error
    assert len(calls) == 3 and all(map(torch.equal, outputs, trial.outputs(again)))


@pytest.mark.parametrize("other", ["gate", "up"])
def test_where_another_mask_differs_the_whole_block_runs(trial, calls, other):  # noqa: F811
    masks = watched(trial, down=True, **{other: True})
    calls.clear()
    trial.error(masks)
    assert len(calls) == 3


def test_where_another_mask_was_written_to_the_whole_block_runs(trial, calls):  # noqa: F811
    masks = watched(trial, down=True)
    masks["up"][0] = False
    calls.clear()
    trial.error(masks)
    assert len(calls) == 3


@pytest.mark.parametrize(
    "between",
    [
        lambda block: block.outputs({name: ~keep for name, keep in block.masks.items()}),
        lambda block: block.gradients(block.masks),
        lambda block: block.adopt({"up": block.weight("up") * 2}),
    ],
)
def test_what_was_kept_does_not_outlive_its_masks(trial, calls, between):  # noqa: F811
    masks = watched(trial, down=True)
    between(trial)
    calls.clear()
    trial.error(masks)
    assert len(calls) == 3


def test_nothing_is_kept_that_is_large_or_waits_elsewhere_or_is_shared(trial, tmp_path):  # noqa: F811
    linears, samples = trial.linears, list(trial.inputs)
    assert closing_inputs_fit(linears, "down", trial.inputs)
    assert not closing_inputs_fit(linears, "down", Activations(samples, batch_size=2))
    assert not closing_inputs_fit(linears, "down", Activations(samples, folder=tmp_path))
    tokens = CLOSING_BYTES // (4 * 8) + 1
    assert not closing_inputs_fit(linears, "down", Activations([torch.empty(1, tokens, 3, device="meta")]))
    linears["gate"].weight = linears["down"].weight
    assert not closing_inputs_fit(linears, "down", trial.inputs)
