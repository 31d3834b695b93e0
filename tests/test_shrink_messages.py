"""What `shrink` says is legal is legal: for every family, unit and share."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_barber import ShrinkConfig
from optimum_barber.base.errors import BarberError
from optimum_barber.shrink.plan import plan_cut

from .conftest import tiny_model

LONGROPE = {
    "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
    "original_max_position_embeddings": 32,
}
MODELS = {
    "llama": tiny_model("llama", num_hidden_layers=1),
    "llama-8": tiny_model("llama", num_hidden_layers=1, num_attention_heads=8),
    "llama-bias": tiny_model("llama-bias-untied", num_hidden_layers=1, num_attention_heads=8),
    "qwen3": tiny_model("qwen3", num_hidden_layers=1, num_attention_heads=6),
    "gemma2": tiny_model("gemma2", num_hidden_layers=1),
    "phi3": tiny_model("phi3", num_hidden_layers=1),
    "phi3-longrope": tiny_model("phi3", num_hidden_layers=1, **LONGROPE),
    "opt": tiny_model("opt", num_hidden_layers=1),
}


def kept(name, **shares):
    """Query heads that stay under these shares; a refusal where they are refused."""
    cut = plan_cut(MODELS[name], ShrinkConfig(**shares))
    assert cut.budget.share > 0
    return cut.budget.kept["heads"] * cut.units["heads"].heads


@settings(max_examples=150)
@given(
    name=st.sampled_from(sorted(MODELS)),
    unit=st.sampled_from(["group", "query"]),
    kind=st.sampled_from(["remove", "remove_heads", "remove_channels"]),
    share=st.floats(0.001, 0.99).map(lambda value: round(value, 3)),
)
def test_every_refusal_says_what_is_legal(name, unit, kind, share):
    try:
        kept(name, head_unit=unit, **{kind: share})
        return
    except BarberError as error:
        said = str(error)
    assert "\n" not in said
    if "remove nothing" in said:
        heads, channels = (float(number) for number in re.findall(r"above ([\d.e-]+\d)", said))
        assert share <= (heads if kind == "remove_heads" else channels) * 1.001
        kept(name, head_unit=unit, remove_channels=channels * 1.01)
    elif "these can stay: " in said:
        count, legal = re.search(r"of (\d+) heads these can stay: ([\d, ]+|none but all)$", said).groups()
        for stay in map(int, legal.split(", ") if legal[0].isdigit() else []):
            assert kept(name, head_unit=unit, remove_heads=round(1 - stay / int(count), 6)) == stay
    else:
        assert re.search("removes nothing: one channel is|would take all|cannot lose heads", said), said


@pytest.mark.parametrize(("unit", "share"), [("query", 0.1), ("group", 0.2), ("query", 0.0)])
def test_a_share_of_heads_that_is_too_small_is_named(unit, share):
    least = {"query": "of 2 query heads of every group a share above 0.25", "group": "of 2 key-value groups of a layer"}
    with pytest.raises(BarberError, match=f"remove heads {share:g} .*remove nothing: {least[unit]}"):
        kept("llama", head_unit=unit, remove_heads=share)


def test_heads_of_a_longrope_model_can_go_or_the_message_names_none():
    with pytest.raises(BarberError, match="of 4 heads these can stay: none but all"):
        kept("phi3-longrope", remove_heads=0.5)
