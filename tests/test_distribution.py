"""The distribution of pair values against loops; what a round records; masks that recording does not touch."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimum_barber import BarberConfig, BarberSparsifier
from optimum_barber.tensors.exchange import BINS, DECADES, pair_value_histogram, worthwhile

from .conftest import tiny_model, tiny_windows


def looped(values, swapped):
    """The same in plain Python: bins by the logarithm, the cut by sorting."""
    positive = sorted((v for v in values if math.isfinite(v) and v > 0), reverse=True)
    low, high = math.log10(positive[-1]), math.log10(positive[0])
    low = max(low, high - DECADES)
    counts = [0] * BINS
    for value in positive:
        place = (math.log10(value) - low) / ((high - low) / BINS or 1.0)
        counts[min(max(int(place), 0), BINS - 1)] += 1
    return counts, positive[min(swapped, len(positive)) - 1] if swapped else None


@given(
    st.lists(
        st.floats(-66, 20).map(lambda power: 2.0**power) | st.sampled_from([0.0, -1.0, math.inf, math.nan]), max_size=60
    ),
    st.integers(0, 70),
)
def test_bins_and_cut_are_those_of_loops(values, swapped):
    pieces = torch.tensor(values, dtype=torch.float32).split(7)
    actual = pair_value_histogram(worthwhile(pieces), swapped)
    positive = [v for v in values if math.isfinite(v) and v > 0]
    if not positive:
        assert actual is None
        return
    counts, cut = looped(values, swapped)
    assert sum(actual["counts"]) == sum(counts) == len(positive)
    assert sum(abs(a - b) for a, b in zip(actual["counts"], counts, strict=True)) <= 4  # float32 at a bin's edge
    assert actual["cut"] == (None if cut is None else pytest.approx(cut, rel=1e-6))
    assert actual["highest"] == pytest.approx(max(positive), rel=1e-5)


@pytest.mark.parametrize(("pattern", "granularity"), [(None, "block"), (None, "output"), ("2:4", "output")])
def test_a_round_records_what_it_measured_and_chose(pattern, granularity):
    config = BarberConfig(
        sparsity=None if pattern else 0.5,
        pattern=pattern,
        rebuild={"method": "barber", "rounds": 2, "granularity": granularity},
    )
    result = BarberSparsifier(tiny_model()).sparsify(config, tiny_windows(), quiet=True)
    rounds = [record for report in result.reports for record in report.rounds]
    assert rounds
    for record in rounds:
        measured = dict(record["candidates"])
        searched = {ratio: error for ratio, error in measured.items() if ratio > 0}
        assert record["ratio"] == min(searched, key=searched.get)
        assert searched[record["ratio"]] < measured[0.0]
        assert sum(record["values"]["counts"]) == record["pairs"]
        assert record["values"]["lowest"] * 0.99 <= record["values"]["cut"] <= record["values"]["highest"] * 1.01


def test_a_given_ratio_records_the_pairs_that_were_ranked():
    config = BarberConfig(
        sparsity=0.5, rebuild={"method": "barber", "rebuild_ratio": 0.25, "rounds": 1, "granularity": "block"}
    )
    reports = BarberSparsifier(tiny_model()).sparsify(config, tiny_windows(), quiet=True).reports
    for record in (report.rounds[0] for report in reports):
        assert record["candidates"] == []
        assert sum(record["values"]["counts"]) == record["swaps"] < record["pairs"]
