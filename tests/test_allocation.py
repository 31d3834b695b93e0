"""How the sparsity is shared out over blocks: from the dense model, exact in the end, the same from the disk."""

import json
import math
from fractions import Fraction

import pytest
import torch

from optimum_barber import BarberConfig, BarberSparsifier, verify_checkpoint
from optimum_barber.base.errors import BarberError
from optimum_barber.checkpoints.verify import Verification
from optimum_barber.cli import main
from optimum_barber.models.source import ModelSource
from optimum_barber.prune import sparsifier
from optimum_barber.prune.allocations import ALLOCATIONS, Budget, allocation
from optimum_barber.prune.pipeline import Plan, prune
from optimum_barber.prune.producers import PRODUCERS
from optimum_barber.tensors.budget import Shares

from . import oracles
from .conftest import tiny_model, tiny_windows
from .test_streaming import files, in_memory, stopped, stored, stream

OWL = {"outlier": 2.0, "spread": 0.08}


def uneven(family="llama", **changes):
    """A tiny model whose layers differ: some channels of the later ones carry more."""
    model = tiny_model(family, **changes)
    with torch.no_grad():
        for index, layer in enumerate(ModelSource(model).stack):
            for parameter in layer.parameters():
                if parameter.ndim > 1:
                    parameter[:, : 2 + index] *= 1 + index
    return model


def sparsify(model, allocation, producer="wanda", rebuild="none", save_dir=None, sparsity=0.5, args=None, **settings):
    config = BarberConfig(
        producer=producer, sparsity=sparsity, allocation=allocation, allocation_args=args or {}, rebuild=rebuild,
        **settings,
    )  # fmt: skip
    return BarberSparsifier(model).sparsify(config, tiny_windows(6), save_dir, quiet=True)


def streams(model, windows):
    """For every window and layer of a llama: what enters the layer, stands behind attention, and leaves the layer."""
    seen = []
    norms = [norm for layer in model.model.layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
    for norm in (*norms, model.model.norm):
        norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].double()))
    with torch.no_grad():
        for window in windows.split(1):
            model(window)
    each = len(norms) + 1
    return [
        [tuple(seen[start + i : start + i + 3]) for i in range(0, len(norms), 2)] for start in range(0, len(seen), each)
    ]


def linear_inputs(model, windows):
    """The inputs of every Linear of every layer on the dense stream, (tokens, in) float64."""
    inputs = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: inputs.setdefault(name, []).append(args[0][0]))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "layers" in name
    ]
    with torch.no_grad():
        for window in windows.split(1):
            model(window)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(rows).double() for name, rows in inputs.items()}


def test_owl_by_loops():
    model, windows = uneven(num_hidden_layers=3), tiny_windows(6)
    outliers = []
    for layer in range(3):
        scores = []
        for name, x in linear_inputs(model, windows).items():
            if f"layers.{layer}." in name:
                norms = [math.sqrt(sum(v * v for v in column)) for column in x.t().tolist()]
                weight = model.get_submodule(name).weight.tolist()
                scores += [abs(w) * norms[j] for row in weight for j, w in enumerate(row)]
        mean = sum(scores) / len(scores)
        outliers.append(sum(score > 2.0 * mean for score in scores) / len(scores))
    places = [(share - min(outliers)) / (max(outliers) - min(outliers)) for share in outliers]
    expected = [0.5 - 2 * 0.08 * (place - sum(places) / 3) for place in places]
    shares = sparsify(model, "owl", args=OWL).shares
    assert list(shares.basis["outliers"].values()) == pytest.approx(outliers, abs=1e-9)
    for layer in range(3):
        for block in ("attention", "mlp"):
            assert shares.sparsity[f"model.layers.{layer}.{block}"] == pytest.approx(expected[layer], abs=1e-9)
    assert len(set(outliers)) == 3


def pruned_rows(scores, share):
    """A keep mask, the lowest of each row pruned; floor(share * n) of all, the first rows one more."""
    rows, width = len(scores), len(scores[0])
    each, more = divmod(oracles.share(share, rows * width), rows)
    keep = [[True] * width for _ in range(rows)]
    for i, row in enumerate(scores):
        for j in oracles.lowest_pruned(row, each + (i < more)):
            keep[i][j] = False
    return torch.tensor(keep)


def test_errors_of_blocks_by_the_models_own_forward_pass():
    """ln e is fitted through errors relative to the residual stream behind each block."""
    model, windows = uneven(), tiny_windows(6)
    inputs, dense = linear_inputs(model, windows[:4]), streams(model, windows[:4])
    changed = uneven().double()
    expected = {}
    for index, layer in enumerate(changed.model.layers):
        for block, part in (("attention", layer.self_attn), ("mlp", layer.mlp)):
            errors = []
            for share in (0.4, 0.5, 0.6):
                before = {n: m.weight.detach().clone() for n, m in part.named_modules() if hasattr(m, "weight")}
                for name in before:
                    full = f"model.layers.{index}.{'self_attn' if block == 'attention' else 'mlp'}.{name}"
                    scores = (before[name].abs() * inputs[full].norm(dim=0)).float().tolist()
                    part.get_submodule(name).weight.data = torch.where(pruned_rows(scores, share), before[name], 0.0)
                total = []
                for entering, between, leaving in (window[index] for window in dense):
                    with torch.no_grad():
                        if block == "mlp":
                            stream, out = leaving, part(layer.post_attention_layernorm(between))
                            gap = between + out - leaving
                        else:
                            position = changed.model.rotary_emb(entering, torch.arange(entering.shape[1])[None])
                            out = part(layer.input_layernorm(entering), position_embeddings=position)[0]
                            stream, gap = between, entering + out - between
                    total.append((gap.square().mean(-1) / stream.square().mean(-1)).mean().item())
                errors.append(sum(total) / len(total))
                for name, weight in before.items():
                    part.get_submodule(name).weight.data = weight
            expected[f"model.layers.{index}.{block}"] = errors
    actual = sparsify(model, "measured", args={"samples": 4, "spread": 0.1}).shares.basis
    assert list(actual) == list(expected)
    for block, errors in expected.items():
        assert [error for _, error in actual[block]["errors"]] == pytest.approx(errors, rel=2e-3)
        assert [share for share, _ in actual[block]["errors"]] == pytest.approx([0.4, 0.5, 0.6], abs=2e-3)


ARGUMENTS = {"owl": OWL, "measured": {"spread": 0.1, "samples": 3}}
CASES = [
    ("llama", "wanda", "none", {}),
    ("llama", "magnitude", "none", {}),
    ("llama", "magnitude", "none", {"producer_args": {"scope": "row"}}),
    ("llama", "random", "none", {"sparsity": 0.7}),
    ("llama", "sparsegpt", "none", {"sparsity": 0.6, "producer_args": {"block_size": 7}}),
    ("llama", "wanda", "barber+swaps", {"sparsity": 0.55}),
    ("llama", "wanda", "dsnot", {"ignore": ["*.k_proj", "model.layers.1.mlp.*"]}),
    ("opt", "wanda", "barber", {"sparsity": 0.6}),
    ("phi3", "sparsegpt", "swaps", {}),
]


@pytest.mark.parametrize("name", ["owl", "measured"])
@pytest.mark.parametrize(("family", "producer", "rebuild", "settings"), CASES, ids=str)
def test_every_total_is_exact_and_within_bounds(tmp_path, name, family, producer, rebuild, settings):
    result = sparsify(uneven(family), name, producer, rebuild, tmp_path / "out", args=ARGUMENTS[name], **settings)
    weights = sum(mask.weights for mask in result.masks.values())
    pruned = sum(mask.pruned for mask in result.masks.values())
    target = settings.get("sparsity", 0.5)
    assert pruned == math.floor(Fraction(str(target)) * weights)
    spread = 0.16 if name == "owl" else 0.1
    assert all(abs(share - target) <= spread + 1e-9 for share in result.shares.sparsity.values())
    assert len({round(share, 4) for share in result.shares.sparsity.values()}) > 1
    record = json.loads((tmp_path / "out" / "sparsity_config.json").read_text())
    assert record["allocation"]["sparsity"] == result.shares.sparsity
    assert sum(record["allocation"]["pruned"].values()) == sum(m["pruned"] for m in record["modules"].values())
    if rebuild == "none":
        assert record["allocation"]["pruned"] == {n: m["pruned"] for n, m in record["modules"].items()}
    assert verify_checkpoint(tmp_path / "out") == Verification("unstructured", len(result.masks), pruned, pruned)
    assert result.as_report()["allocation"]["sparsity"] == result.shares.sparsity


@pytest.mark.parametrize("sparsity", [0.5, 0.7])
def test_uniform_looks_at_nothing_and_gives_the_same_bits(monkeypatch, sparsity):
    expected = prune(
        ModelSource(uneven()),
        tiny_windows(6),
        Plan(PRODUCERS["wanda"], BarberConfig(sparsity=sparsity).sparsity_pattern()),
    )
    monkeypatch.setattr(Budget, "trials", None)
    result = sparsify(uneven(), "uniform", sparsity=sparsity)
    assert {n: m.sha256 for n, m in result.masks.items()} == {n: m.sha256 for n, m in expected.items()}
    assert result.sparsity_config.allocation is result.as_report()["allocation"] is None


def test_shares_differ_by_layer_for_owl_and_by_block_for_measured():
    owl = sparsify(uneven(), "owl", args=OWL).shares.sparsity
    assert owl["model.layers.0.attention"] == owl["model.layers.0.mlp"] != owl["model.layers.1.mlp"]
    assert max(owl.values()) - min(owl.values()) == pytest.approx(0.16)
    measured = sparsify(uneven(), "measured").shares.sparsity
    assert len(set(measured.values())) > 2


def test_the_look_changes_neither_weights_nor_what_batches_give():
    model = uneven().to(torch.bfloat16)
    before = [parameter.clone() for parameter in model.parameters()]
    plan = Plan(PRODUCERS["sparsegpt"], BarberConfig(sparsity=0.5).sparsity_pattern())
    budget = Budget(0.5, {}, ModelSource(model), tiny_windows(), plan, quiet=True)
    for *_, trial in budget.trials(["gram"]):
        trial.error(budget.masks(trial, 0.5))
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))
    shares = [sparsify(uneven(), "measured", batch_size=size).shares for size in (None, 2)]
    assert shares[0] == shares[1]


@pytest.mark.parametrize("name", ["owl", "measured"])
@pytest.mark.parametrize("place", ["memory", "disk"])
def test_from_disk_the_same_files_and_a_resumed_run_has_the_same_shares(tmp_path, monkeypatch, name, place):
    config = BarberConfig(
        sparsity=0.55, rebuild={"method": "barber", "rounds": 1}, allocation=name, allocation_args=ARGUMENTS[name]
    )
    streaming = stored(tmp_path, num_hidden_layers=3)
    in_memory(tmp_path, config)
    stream(streaming, tmp_path / "disk", config, activations=place)
    assert files(tmp_path / "disk") == files(tmp_path / "memory")
    stopped(streaming, tmp_path / "out", 3, config, activations=place)
    monkeypatch.setattr(sparsifier, "share_out", None)  # what was known is not asked for again
    stream(streaming, tmp_path / "out", config, resume=True, activations=place)
    assert files(tmp_path / "out") == files(tmp_path / "memory")


QUICK = ["--calibration", "pydoc", "--samples", "2", "--sequence-length", "16", "--quiet"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--sparsity .5 --allocation owll", "unknown allocation 'owll': did you mean 'owl'"),
        ("--sparsity .5 --allocation-arg spread=.1", "allocation 'uniform' takes no argument 'spread': it takes none"),
        ("--sparsity .5 --allocation owl --allocation-arg spraed=1", "it takes outlier, spread"),
        ("--sparsity .5 --allocation owl --allocation-arg spread", "allocation-arg 'spread' is not legal: KEY=VALUE"),
        ("--sparsity .5 --allocation owl --allocation-arg spread=x", "spread=x of allocation 'owl' is no float"),
        ("--sparsity .5 --allocation owl --allocation-arg outlier=0", "outlier 0 of allocation 'owl' is not legal"),
        (
            "--sparsity .5 --allocation owl --allocation-arg spread=0",
            "not legal at sparsity 0.5: above 0 and below 0.5",
        ),
        ("--sparsity .95 --allocation measured", "spread 0.1 of allocation 'measured' is not legal at sparsity 0.95"),
        ("--sparsity .5 --allocation measured --allocation-arg samples=0", "samples 0 of allocation 'measured'"),
        ("--pattern 2:4 --allocation owl", "allocation 'owl' makes no sense with pattern 2:4"),
        ("--producer masks --masks M --allocation owl", "nothing to share out: producer 'masks' brings its masks"),
        ("--producer existing --sparse-model M --allocation owl", "producer 'existing' brings its masks"),
    ],
)
def test_bad_input_is_one_line(model_dir, tmp_path, capsys, flags, message):
    for how in ("auto", "never"):
        command = ["prune", str(model_dir), *flags.split(), *QUICK, "--stream", how, "-o", str(tmp_path / "out")]
        assert main(command) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
        assert list(tmp_path.iterdir()) == []


@pytest.fixture
def offered():
    """Allocations that somebody registers, gone afterwards."""
    with ALLOCATIONS.temporarily():
        yield allocation


@pytest.mark.parametrize(
    ("give", "message"),
    [
        (lambda blocks: {}, "gives no share of each of the 4 blocks"),
        (lambda blocks: dict.fromkeys(blocks, 0.6), "the allocation's shares come to sparsity 0.6000, expected 0.5"),
        (lambda blocks: dict.fromkeys(blocks, float("nan")), "gives model.layers.0.attention the sparsity nan"),
        (lambda blocks: dict.fromkeys(blocks, 1.0), "gives model.layers.0.attention the sparsity 1, outside of"),
    ],
)
def test_an_allocation_of_others_is_checked(offered, give, message):
    offered("mine")(lambda budget: Shares(give(budget.weights)))
    model = tiny_model()
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(BarberError, match=message):
        sparsify(model, "mine")
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))


def test_an_allocation_of_others_is_used(offered):
    @offered("front")
    def front(budget, *, less: float = 0.1):
        first = next(iter(budget.weights))
        rest = sum(budget.weights.values()) - budget.weights[first]
        more = less * budget.weights[first] / rest
        shares = {block: budget.target + (more if block != first else -less) for block in budget.weights}
        return Shares(shares, {"rest": rest})

    result = sparsify(tiny_model(), "front", args={"less": "0.2"})
    first = [mask for name, mask in result.masks.items() if "0.self_attn" in name]
    assert sum(m.pruned for m in first) / sum(m.weights for m in first) == pytest.approx(0.3, abs=2e-3)
    assert result.shares.basis["rest"] > 0


def test_recipes_and_comparisons_take_one(model_dir, text_file, tmp_path, capsys):
    text = f"""
model: {model_dir}
calibration: {{texts: [{text_file}], samples: 2, sequence_length: 16}}
stages:
  - prune: {{sparsity: 0.5, allocation: owl, allocation_args: {{outlier: 2}}}}
  - rebuild: {{rounds: 1}}
output: {tmp_path / "out"}
"""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    assert main(["run", str(recipe), "--quiet"]) == 0
    recipe.write_text(text.replace("outlier", "outliers").replace("out\n", "other\n"))
    assert main(["run", str(recipe), "--quiet"]) == 2
    assert (
        "recipe.yaml:5: stages 1, prune.producer: allocation 'owl' takes no argument 'outliers'"
        in capsys.readouterr().err
    )
    flags = ["--producers", "wanda", "--rebuilds", "none", "--sparsities", "0.5", "--evaluation", str(text_file)]
    command = ["compare", str(model_dir), *flags, "--calibration", str(text_file), *QUICK[2:]]
    assert main([*command, "--vary", "allocation=uniform,measured", "-o", str(tmp_path / "compare")]) == 0
    cells = [json.loads(path.read_text()) for path in sorted((tmp_path / "compare" / "cells").glob("wanda*"))]
    names = [(cell["record"]["allocation"] or {}).get("name") for cell in cells]
    assert names == ["measured", None]
    assert [cell["record"]["sparsity"] for cell in cells] == [0.5, 0.5]
    assert main([*command, "--vary", "allocation=owll", "-o", str(tmp_path / "x"), "--dry-run"]) == 2
    assert "unknown allocation 'owll': did you mean 'owl'" in capsys.readouterr().err


def test_plugins_lists_them(capsys):
    assert main(["plugins"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["measured", "built-in"] == next(line for line in lines if line[:1] == ["measured"])[:2]
    assert next(line for line in lines if line[:1] == ["owl"])[-3:] == ["takes", "outlier=5.0,", "spread=0.08"]
