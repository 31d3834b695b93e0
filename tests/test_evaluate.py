"""Perplexity against its definition."""

import math

import pytest
import torch

from optimum_barber.text.perplexity import perplexity
from optimum_barber.text.windows import consecutive_windows

from .conftest import tiny_model


def test_perplexity_is_the_exponential_of_the_mean_surprise():
    model = tiny_model()
    tokens = torch.randint(3, 300, (70,), generator=torch.Generator().manual_seed(0))
    result = perplexity(model, consecutive_windows(tokens, 16, None, "t"), quiet=True)
    surprises = []
    for start in range(0, 64, 16):
        window = tokens[start : start + 16]
        with torch.no_grad():
            probabilities = model(window[None]).logits[0].double().softmax(-1)
        surprises += [-math.log(float(probabilities[i, window[i + 1]])) for i in range(15)]
    assert result.perplexity == pytest.approx(math.exp(sum(surprises) / len(surprises)), rel=1e-5)
    assert (result.windows, result.available, result.sequence_length, result.split) == (4, 4, 16, "evaluation")
