"""The work that is predicted is the work that torch counts in a real run; the page says how long it will take."""

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from optimum_barber.checkpoints.shards import Entry
from optimum_barber.models.loading import resolve_model
from optimum_barber.models.source import ModelSource
from optimum_barber.prune.cost.rates import Machine, predict
from optimum_barber.prune.cost.timing import CANDIDATES, spell, stages, table
from optimum_barber.prune.cost.work import BlockShape, Tokens, Work, shapes_of, total
from optimum_barber.prune.inspection import inspect_model
from optimum_barber.prune.pipeline import Plan, prune
from optimum_barber.prune.producers import PRODUCERS
from optimum_barber.prune.rebuilders import chain_of
from optimum_barber.prune.reconstructions import reconstructions_of
from optimum_barber.prune.settings import BarberConfig

from .conftest import tiny_model, tiny_windows

ATTENTION = BlockShape(linears=((32, 32), (16, 32), (16, 32), (32, 32)), scores=32)
MLP = BlockShape(linears=((48, 32), (48, 32), (32, 48)))
TOKENS = Tokens(samples=4, length=16, hidden=32)


def made_of(family, **settings):
    """A tiny model as the pipeline sees it, with attention that torch's counter knows; and what is to be done."""
    source = ModelSource(tiny_model(family, attn_implementation="eager"))
    config = BarberConfig(
        sparsity=settings.pop("sparsity", None) or (None if "pattern" in settings else 0.5), **settings
    )
    plan = Plan(
        PRODUCERS[config.producer_name], config.sparsity_pattern(), rebuilders=chain_of(config.rebuild),
        reconstructions=reconstructions_of(config.reconstruct), ignore=config.ignore,
        relative_error=config.rebuild.error == "relative",
    )  # fmt: skip
    return source, config, plan


def counted(source, plan, windows):
    """FLOP of a run by torch's counter."""
    source.begin(windows)  # records how layers are called, which runs the first of them once
    special = {
        torch.ops.aten.addmm_: lambda _, left, right, **__: 2 * left[0] * left[1] * right[1],
        torch.ops.aten.baddbmm: lambda *_, **__: 0,  # the costs of pairs, a part of what exchanges take
    }
    with FlopCounterMode(display=False, custom_mapping=special) as counter:
        prune(source, windows, plan)
    return counter.get_total_flops()


def foreseen(source, config, plan, tokens):
    """FLOP of a run by the formulas; eager attention keeps its scores, so that its gradients take 2 passes, not 2.5."""
    shapes = shapes_of(source.stack, source.path, source.architecture, tokens.hidden, config.ignore)
    work = total(stages(shapes, tokens, config, plan.producer.needs, 0).values())
    return replace(work, attention_backward=work.attention_backward * 2 / 2.5).flops


ONE = {"method": "barber", "rebuild_ratio": 0.5, "rounds": 1, "accept": "always"}


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"rebuild": "none"}),
        ("llama", {"rebuild": ONE}),
        ("llama", {"rebuild": ONE, "ignore": ["*.mlp.gate_proj"]}),
        ("qwen3", {"rebuild": {**ONE, "rounds": 3, "granularity": "output"}}),
        ("opt", {"rebuild": {"preset": "published-code"}}),
        ("phi3", {"rebuild": {**ONE, "method": "barber+swaps", "swaps": 3}}),
        ("llama", {"rebuild": {**ONE, "method": "barber+swaps", "rebuild_ratio": 0.2, "accept": "if-better"}}),
        ("gemma", {"rebuild": {"method": "swaps", "accept": "always"}, "pattern": "2:4"}),
        ("mistral", {"rebuild": {"method": "dsnot", "accept": "always"}}),
        ("qwen2", {"rebuild": {"method": "dsnot+swaps", "accept": "always", "error": "absolute"}}),
        ("llama-bias-untied", {"rebuild": ONE, "reconstruct": "least-squares"}),
        ("llama", {"rebuild": "none", "producer": "magnitude"}),
    ],
)
def test_the_products_of_a_run_are_those_that_torch_counts(family, settings):
    source, config, plan = made_of(family, **settings)
    predicted = foreseen(source, config, plan, replace(TOKENS, samples=2))
    assert counted(source, plan, tiny_windows(samples=2)) == predicted > 0


@pytest.mark.parametrize(("family", "settings"), [("llama", {}), ("opt", {}), ("phi3", {"pattern": "2:4"})])
def test_the_products_of_gauss_newton_are_those_that_torch_counts(family, settings, monkeypatch):
    monkeypatch.setattr("optimum_barber.prune.rebuilders.gauss_newton.climb", lambda see, at, *_, **__: (at, see(at)))
    monkeypatch.setattr("optimum_barber.prune.rebuilders.gauss_newton.LENGTH", 1 / 8)  # some pairs change places in all
    monkeypatch.setattr("optimum_barber.prune.cost.timing.LENGTHS", 1)
    rebuild = {"method": "swaps+gauss-newton", "newton_rounds": 2, "accept": "always"}
    source, config, plan = made_of(family, rebuild=rebuild, **settings)
    predicted = foreseen(source, config, plan, replace(TOKENS, samples=2))
    assert counted(source, plan, tiny_windows(samples=2)) == predicted > 0


def test_gram_matrices_of_a_producer_are_counted():
    source, config, _ = made_of("llama", rebuild="none", producer="sparsegpt")
    gram = 2 * TOKENS.count * 2 * (32**2 + 32**2 + 32**2 + 48**2)
    found = stages(shapes_of(source.stack, source.path, source.architecture, 32), TOKENS, config, ["gram"], 0)
    assert found["dense pass, statistics"].gram == gram
    assert found["producer"].factored == pytest.approx(2 * 4 / 3 * (6 * 32**3 + 48**3))


def test_one_pass_by_hand():
    forward = ATTENTION.forward(TOKENS)
    flops = sum(2 for _ in range(4 * 16) for out, width in ATTENTION.linears for _ in range(out * width))
    assert forward.forward == flops
    assert forward.attention == sum(4 * 32 for _ in range(4) for _ in range(16) for _ in range(16))
    assert MLP.gradient(TOKENS).backward == 2 * 64 * (3 * 48 * 32 + 48 * 32)
    assert MLP.inputs == [32, 48] and ATTENTION.inputs == [32, 32]


def test_a_search_measures_some_samples_for_every_candidate():
    config = BarberConfig(sparsity=0.5, rebuild={"method": "barber", "rounds": 3})
    many = replace(TOKENS, samples=32)
    found = stages([MLP], many, config, [], 0)
    candidates = CANDIDATES[0] + 2 * CANDIDATES[1]
    assert found["barber: search"].forward == pytest.approx(candidates * 4 / 32 * MLP.forward(many).forward)
    assert found["barber: search"].applied == candidates * MLP.weights
    fixed = config.model_copy(update={"rebuild": config.rebuild.model_copy(update={"rebuild_ratio": 0.1})})
    assert "barber: search" not in stages([MLP], many, fixed, [], 0)


def test_the_steps_of_adam_are_bounded_by_the_passes():
    config = BarberConfig(sparsity=0.5, rebuild="none", reconstruct={"method": "gradient", "passes": 3})
    tokens = replace(TOKENS, samples=16)
    found = stages([MLP], tokens, config, [], 0)["gradient steps"]
    assert found.backward == pytest.approx(3 * 14 / 16 * MLP.gradient(tokens).backward)
    assert found.forward == pytest.approx((3 * 14 / 16 + 4 * 2 / 16 + 1) * MLP.forward(tokens).forward)


def test_work_adds_up_over_blocks_and_seconds_over_kinds():
    config = BarberConfig(sparsity=0.5)
    one, two = (stages([ATTENTION, MLP] * n, TOKENS, config, ["input_norm"], 1000) for n in (1, 2))
    written = "check, write, verify"
    assert {n: w * 2 for n, w in one.items() if n != written} == {n: w for n, w in two.items() if n != written}
    assert one[written] == Work(kept=ATTENTION.weights + MLP.weights, written=1000 + 4 * 4 * 16 * 32)
    rates = Work(*range(1, 1 + len(fields(Work))))
    work = Work(*(2.0 * rate for rate in range(1, 1 + len(fields(Work)))))
    assert work.seconds(rates) == 2 * len(fields(Work))
    assert Work(gram=6.0).seconds(Work(gram=3.0)) == 2.0  # kinds that do not occur need no rate


def test_a_page_of_stages():
    lines = table({"dense": 3725.0, "exchanges": 0.25})
    assert lines[0] == "time          about 1 h 2 min, with nothing beside it on this machine"
    assert [line.split() for line in lines[1:]] == [["dense", "3,725.0", "s"], ["exchanges", "0.2", "s"]]
    assert [spell(s) for s in (0.25, 59.7, 61, 7322)] == ["0.2 s", "1 min 0 s", "1 min 1 s", "2 h 2 min"]


def test_of_a_plug_in_nothing_is_known():
    found = stages([MLP] * 2, TOKENS, BarberConfig(sparsity=0.5, rebuild="sorcery"), [], 0)
    assert found["sorcery"] is None
    assert "and what plug-ins take" in table({"sorcery": None, "dense": 1.0})[0]


class Unpacking:
    """Stored weights of which each is made in memory."""

    entries = {"norm": Entry(torch.float32, (4,)), "large": Entry(torch.float32, (64, 64))}

    def tensor(self, name):
        assert name == "large"
        return torch.randn(self.entries[name].shape)


@pytest.mark.parametrize(
    "settings", [{}, {"pattern": "2:4"}, {"producer": "sparsegpt", "rebuild": {"granularity": "output"}}]
)
def test_every_kind_of_work_has_a_rate(settings, tmp_path):
    _, config, plan = made_of("llama", **settings)
    machine = Machine([ATTENTION, MLP], TOKENS, config, plan.pattern, 8, tmp_path, torch.device("cpu"), Unpacking())
    before = torch.get_rng_state()
    rates = machine.rates(Work(*[1.0] * len(fields(Work))))
    assert all(0 < getattr(rates, field.name) < float("inf") for field in fields(Work))
    assert torch.equal(before, torch.get_rng_state())
    assert list(tmp_path.iterdir()) == []


def test_a_prediction_names_every_stage(tmp_path):
    source, config, plan = made_of("llama")
    found = predict(source, plan, config, (4, 16), 10**6, tmp_path / "not" / "there")
    assert list(found) == [
        "dense pass, statistics", "producer", "barber: gradients", "barber: ranking", "barber: search",
        "swaps: Gram matrices", "swaps: exchanges", "swaps: last masks", "check, write, verify",
    ]  # fmt: skip
    assert all(seconds > 0 for seconds in found.values())
    assert list(Path(tmp_path).iterdir()) == []


def test_inspect_says_how_long_a_default_run_takes(model_dir):
    page = inspect_model(resolve_model(str(model_dir)), 4, 16)
    assert "\ntime          about " in page and "\n  swaps: exchanges " in page
