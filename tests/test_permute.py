"""Permutations before N:M: the search against brute force, the permuted model's function, its files and their check."""

import copy
import json
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_barber import BarberConfig, BarberPermuter, BarberSparsifier, PermuteConfig
from optimum_barber.base.errors import BarberError, FailedCheckError
from optimum_barber.checkpoints.safetensors import SafetensorsWeights
from optimum_barber.cli.main import main
from optimum_barber.models.linears import matrices_of_model
from optimum_barber.models.source import ModelSource
from optimum_barber.runs.verify import verify_product
from optimum_barber.shrink import permuter
from optimum_barber.shrink.permutation import permute, sites_of
from optimum_barber.shrink.permuter import input_norms
from optimum_barber.tensors.channel_order import _exchanged, channel_order, dealt_order, dropped_scores

from .conftest import FAMILIES, tiny_model, tiny_windows

PATTERNS = [(2, 4), (1, 4), (3, 4), (1, 2), (4, 8)]
KINDS = ["channels", "values", "stream"]
QUICK = ["--calibration", "pydoc", "--samples", "4", "--sequence-length", "16"]


def slowly_dropped(scores, order, keep, group):
    """What N:M drops, by sorting every group of every row."""
    total = 0.0
    for row in scores.tolist():
        for start in range(0, len(order), group):
            total += sum(sorted(row[channel] for channel in order[start : start + group])[: group - keep])
    return total


@pytest.mark.parametrize(("keep", "group"), PATTERNS)
def test_what_an_order_drops_is_what_a_loop_drops(keep, group):
    scores = torch.rand(5, 16)
    order = torch.randperm(16)
    expected = slowly_dropped(scores, order.tolist(), keep, group)
    assert dropped_scores(scores, order, keep, group) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("keep", "group"), PATTERNS)
@pytest.mark.parametrize("place", [0, 1])
def test_one_exchange_is_the_best_of_all_ways_to_put_the_channels_back(keep, group, place):
    scores, order = torch.rand(7, 4 * group), torch.randperm(4 * group)
    grouped = order.view(4, group)
    costs = []
    for way in permutations(range(4)):
        candidate = grouped.clone()
        candidate[:, place] = grouped[list(way), place]
        costs.append(slowly_dropped(scores, candidate.flatten().tolist(), keep, group))
    result = _exchanged(scores, order, place, keep, group)
    assert slowly_dropped(scores, result.tolist(), keep, group) == pytest.approx(min(costs), rel=1e-5)


@settings(deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(PATTERNS), st.integers(1, 6), st.integers(1, 9))
def test_an_order_has_every_channel_once_and_never_drops_more(seed, pattern, groups, rows):
    keep, group = pattern
    scores = torch.rand(rows, groups * group, generator=torch.Generator().manual_seed(seed)).square()
    identity = torch.arange(groups * group)
    for order in (channel_order(scores, keep, group), dealt_order(scores, group)):
        assert torch.equal(order.sort().values, identity)
    best = channel_order(scores, keep, group)
    assert torch.equal(best, channel_order(scores, keep, group))
    assert dropped_scores(scores, best, keep, group) <= dropped_scores(scores, identity, keep, group)


def test_channels_that_matter_are_dealt_out_to_all_groups():
    scores = torch.ones(3, 16)
    scores[:, :8] = 10.0  # two groups of nothing but large ones, two of none: 2:4 drops four large ones
    assert dropped_scores(scores, torch.arange(16), 2, 4) == 3 * (4 * 10 + 4 * 1)
    assert dropped_scores(scores, channel_order(scores, 2, 4), 2, 4) == 3 * 8


@torch.no_grad()
def test_norms_are_those_of_the_inputs_of_the_dense_model():
    model, windows = tiny_model(), tiny_windows()
    norms = input_norms(ModelSource(model), windows)
    down = model.model.layers[1].mlp.down_proj
    inputs = []
    with down.register_forward_pre_hook(lambda module, args: inputs.append(args[0])):
        model(windows)
    expected = torch.cat(inputs).double().square().sum((0, 1)).sqrt()
    assert torch.allclose(norms["model.layers.1.mlp.down_proj"].double(), expected, rtol=1e-5)


def uneven_model(family="llama", **changes):
    """A tiny model whose norms and biases differ from channel to channel, as its weights do."""
    model = tiny_model(family, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_permuted_model_computes_the_same_with_the_same_weights(family):
    model, windows = uneven_model(family), tiny_windows()
    before, dense = model(windows).logits, copy.deepcopy(model.state_dict())
    record = BarberPermuter(model).permute(PermuteConfig(kinds=KINDS), windows, quiet=True).record
    assert torch.allclose(model(windows).logits, before, atol=5e-5)
    moved = 0
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.flatten().sort().values, dense[name].flatten().sort().values)
        moved += not torch.equal(tensor, dense[name])
    assert moved >= 3 * len(model.model.layers if hasattr(model.model, "layers") else model.model.decoder.layers)
    for before_kind, after_kind in record.dropped().values():
        assert after_kind < before_kind


@torch.no_grad()
def test_a_site_is_all_that_depends_on_its_channels():
    model = tiny_model("llama")  # two query heads for each key-value head
    sites = {site.name: site for site in sites_of(ModelSource(model))}
    value = sites["model.layers.0.self_attn.o_proj.1"]
    assert [span.start for span in value.read] == [2 * value.size, 3 * value.size]
    assert [(span.tensor, span.start) for span in value.moved] == [
        ("model.layers.0.self_attn.v_proj.weight", value.size)
    ]
    down = sites["model.layers.0.mlp.down_proj"]
    mlp = "model.layers.0.mlp"
    assert [span.tensor for span in down.moved] == [f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight"]
    assert [site.kind for site in sites_of(ModelSource(model), ["channels"])] == ["channels"] * len(model.model.layers)


@pytest.mark.parametrize("rows", [2**17, 40])
@torch.no_grad()
def test_scores_are_those_of_wanda_and_every_reader_counts_the_same(monkeypatch, rows):
    monkeypatch.setattr(permuter, "ROWS", rows)
    model = tiny_model()
    source = ModelSource(model)
    site = sites_of(source, ["stream"])[0]
    norms = input_norms(source, tiny_windows())
    weights = {name: linear.weight for name, linear in matrices_of_model(source).items()}
    scores, readers = permuter.site_scores(site, weights, norms), []
    for layer in range(len(model.model.layers)):
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
            readers.append(f"model.layers.{layer}.{name}")
    stride = -(-sum(len(weights[name]) for name in readers) // rows)
    expected = []
    for name in readers:
        values = weights[name].double().abs() * norms[name].double()
        expected += list((values / values.sum())[::stride])
    assert torch.allclose(scores.double(), torch.stack(expected), rtol=1e-5)
    assert (stride == 1) == (rows > 40)


def test_a_stream_that_a_projection_makes_is_refused_by_name(tmp_path):
    model = uneven_model("opt", word_embed_proj_dim=16)
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(BarberError, match=r"kind 'stream' cannot be reordered in .*embed_tokens.weight: leave it out"):
        BarberPermuter(model).permute(PermuteConfig(kinds=KINDS), tiny_windows(), quiet=True)
    permuted = BarberPermuter(model)
    permuted.permute(PermuteConfig(kinds=["channels", "values"]), tiny_windows(), tmp_path / "out", quiet=True)
    assert verify_product(tmp_path / "out", str(tmp_path / "dense")).faults == []


def test_a_2_4_mask_of_the_permuted_model_has_the_smaller_error():
    windows, errors = tiny_windows(), []
    config = BarberConfig(pattern="2:4", rebuild={"method": "none"})
    for permuted in (False, True):
        model = tiny_model()
        if permuted:
            BarberPermuter(model).permute(PermuteConfig(), windows, quiet=True)
        reports = BarberSparsifier(model).sparsify(config, windows, quiet=True).reports
        errors.append(sum(report.error_after for report in reports if report.block.endswith("mlp")))
    assert errors[1] < errors[0]


@pytest.fixture(scope="module")
def permuted(tmp_path_factory, model_dir):
    output = tmp_path_factory.mktemp("permuted") / "out"
    assert main(["permute", str(model_dir), *QUICK, "-o", str(output), "--quiet"]) == 0
    return output


def test_the_checkpoint_is_verified_tensor_by_tensor(permuted, model_dir, tmp_path, capsys):
    assert main(["verify", str(permuted)]) == 0
    out = capsys.readouterr().out
    assert f"every weight is that of {model_dir}" in out
    assert {path.name for path in permuted.iterdir()} >= {"channel_order.json", "config.json", "tokenizer.json"}
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in permuted.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    record = json.loads((broken / "channel_order.json").read_text())
    order = record["sites"]["model.layers.0.mlp.down_proj"]["order"]
    order[0], order[1] = order[1], order[0]
    (broken / "channel_order.json").write_text(json.dumps(record))
    modules = [fault.partition(":")[0] for fault in verify_product(broken).faults]
    assert modules == [f"model.layers.0.mlp.{name}_proj" for name in ("down", "gate", "up")]
    order[0] = order[1]
    (broken / "channel_order.json").write_text(json.dumps(record))
    with pytest.raises(BarberError, match="not an order of"):
        verify_product(broken)


def test_the_permuted_checkpoint_is_the_dense_model_of_what_follows(permuted, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["prune", str(permuted), "--pattern", "2:4", *QUICK, "-o", str(out), "--quiet"]) == 0
    assert main(["verify", str(out)]) == 0
    assert json.loads((out / "sparsity_config.json").read_text())["base_model"]["name"] == str(permuted)
    assert not (out / "channel_order.json").exists()
    dense, pruned = SafetensorsWeights.open(permuted), SafetensorsWeights.open(out)
    for name in dense.entries:
        weight = pruned.tensor(name)
        assert torch.equal(weight[weight != 0], dense.tensor(name)[weight != 0])


def test_masks_and_cuts_of_the_model_do_not_fit_the_permuted_one(permuted, model_dir, tmp_path, capsys, caplog):
    masks = tmp_path / "masks" / "sparsity_masks.safetensors"
    prune = ["--pattern", "2:4", *QUICK, "--quiet"]
    replay = ["--producer", "masks", "--producer-arg", f"masks={masks}"]
    assert main(["prune", str(model_dir), *prune, "--rebuild", "none", "-o", str(masks.parent)]) == 0
    assert main(["prune", str(permuted), *QUICK, *replay, "-o", str(tmp_path / "out")]) == 2
    line = f"is made for {model_dir}, whose channels stand in another order than those of {permuted}"
    assert line in capsys.readouterr().err
    assert main(["prune", str(model_dir), *QUICK, *replay, "--quiet", "-o", str(tmp_path / "again")]) == 0
    own = tmp_path / "own"
    assert main(["prune", str(permuted), *prune, "--rebuild", "none", "-o", str(own)]) == 0
    replay[-1] = f"masks={own / 'sparsity_masks.safetensors'}"
    assert main(["prune", str(permuted), *QUICK, *replay, "--quiet", "-o", str(tmp_path / "same")]) == 0
    assert main(["prune", str(model_dir), *QUICK, *replay, "-o", str(tmp_path / "warned")]) == 0
    assert f"is made for {permuted}, whose channels stand in another order" in caplog.text
    cut = ["--remove-heads", "0", "--remove-channels", "0.5", "--scorer", "magnitude", "--no-latency", "--quiet"]
    assert main(["shrink", str(model_dir), *cut, "-o", str(tmp_path / "small")]) == 0
    structure = ["--structure", str(tmp_path / "small"), "--no-latency", "-o", str(tmp_path / "cut")]
    assert main(["shrink", str(permuted), *structure]) == 2
    assert line in capsys.readouterr().err


def test_a_shrunk_model_stays_one_on_record(tmp_path, model_dir, capsys):
    small, out = tmp_path / "small", tmp_path / "out"
    cut = ["--scorer", "magnitude", "--remove-heads", "0", "--remove-channels", "0.5", "--no-latency", "--quiet"]
    assert main(["shrink", str(model_dir), *cut, "-o", str(small)]) == 0
    assert main(["permute", str(small), *QUICK, "-o", str(out), "--quiet"]) == 0
    assert json.loads((out / "pruned_structure.json").read_text())["steps"] == [{"name": "permute"}]
    assert main(["verify", str(out)]) == 0
    assert f"every weight is that of {small}" in capsys.readouterr().out


@pytest.fixture
def recipe(tmp_path, model_dir):
    """Writes a recipe that permutes and prunes, and goes on as it is told."""

    def write(*stages):
        path = tmp_path / "recipe.yaml"
        lines = [
            f"model: {model_dir}", "calibration: {texts: [pydoc], samples: 4, sequence_length: 16}",
            f"output: {tmp_path / 'run'}", "stages:",
        ]  # fmt: skip
        for stage in ("permute: {pattern: '2:4'}", "prune: {producer: wanda, pattern: '2:4'}", *stages):
            lines.append(f"  - {stage}")
        path.write_text("\n".join(lines))
        return str(path)

    return write


def test_a_recipe_permutes_before_it_prunes(tmp_path, recipe):
    assert main(["run", recipe(), "--quiet"]) == 0
    stages = sorted(path.name for path in (tmp_path / "run").iterdir() if path.is_dir())
    assert stages == ["01-permute", "02-prune"]
    record = json.loads((tmp_path / "run" / "02-prune" / "model" / "sparsity_config.json").read_text())
    assert record["base_model"]["name"].endswith("01-permute/model")


def test_later_stages_are_checked_before_the_model_is_permuted(tmp_path, recipe, capsys):
    assert main(["run", recipe("quantize: {group_size: 24}"), "--quiet"]) == 2
    assert "group" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("01-permute/model"))


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--pattern", "unstructured"], "pattern 'unstructured' has no groups: give N:M with 0 < N < M, such as 2:4"),
        (["--pattern", "4:2"], "pattern '4:2' is not legal"),
        (["--kinds", "heads"], "unknown kind 'heads': known are channels, stream, values"),
        (["--pattern", "2:5"], "pattern 2:5 does not fit model.layers.0.self_attn.o_proj.0"),
    ],
)
def test_bad_input_is_one_line_before_any_work(tmp_path, model_dir, capsys, arguments, line):
    assert main(["permute", str(model_dir), *QUICK, *arguments, "-o", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert line in err and err.count("optimum-barber: ") == 1
    assert not list(tmp_path.iterdir())


def test_a_pruned_model_is_refused_since_its_masks_would_not_follow():
    model = tiny_model()
    model.config.sparsity_config = {"pattern": "2:4"}
    with pytest.raises(BarberError, match="model is pruned already: its masks would not follow"):
        BarberPermuter(model).permute(PermuteConfig(), tiny_windows(), quiet=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("part", ["model.norm.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.weight"])
def test_a_permutation_that_leaves_a_part_out_is_told(monkeypatch, tmp_path, dtype, part):
    def without_part(tensors, sites, orders):
        permute({name: tensor.clone() if name == part else tensor for name, tensor in tensors.items()}, sites, orders)

    windows, model = tiny_windows(), uneven_model("llama-bias-untied")
    BarberPermuter(model).permute(PermuteConfig(dtype=dtype, kinds=KINDS), windows, quiet=True)
    monkeypatch.setattr(permuter, "permute", without_part)
    with pytest.raises(FailedCheckError, match="permuted model computes something else: its logits differ by"):
        BarberPermuter(model).permute(PermuteConfig(seed=1, kinds=KINDS), windows.flip(1), tmp_path / "out", quiet=True)
    assert not list(tmp_path.iterdir())


def test_bad_input_leaves_the_model_in_memory_as_it_was():
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(BarberError, match="does not fit"):
        BarberPermuter(model).permute(PermuteConfig(pattern="2:5", dtype="bfloat16"), tiny_windows(), quiet=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
