"""Refinement: the divergence against loops and Hessians, steps that never do harm, checkpoints that stay whole."""

import json
import shutil

import pytest
import torch

from optimum_barber import BarberConfig, BarberRefiner, BarberSparsifier, RefineConfig
from optimum_barber.base.errors import BarberError
from optimum_barber.base.ranks import share_of
from optimum_barber.checkpoints.safetensors import SafetensorsWeights
from optimum_barber.checkpoints.verify import verify_checkpoint
from optimum_barber.cli import main
from optimum_barber.prune.block_quadratic import row_worth
from optimum_barber.prune.refine import whole
from optimum_barber.prune.refine.row_model import MOMENTUM, RowModel
from optimum_barber.prune.refine.settings import RefineSettings
from optimum_barber.prune.refine.steps import (
    FACTOR,
    MOVING,
    PATIENCE,
    WORTH_ITS_TIME,
    Search,
    first_tried,
    refined,
    rows_changed,
)
from optimum_barber.prune.refine.whole import Divergence, trial_of
from optimum_barber.prune.refine.windows import (
    GRAM_WINDOWS,
    batches_of,
    check_windows,
    gram_windows,
    measuring_stride,
    seen_share,
)
from optimum_barber.runs.recipe import run_recipe
from optimum_barber.runs.recipe.validation import RecipeError, read_recipe
from optimum_barber.tensors.masks import holds_pattern
from optimum_barber.tensors.patterns import SparsityPattern

from .conftest import tiny_model, tiny_windows

QUICK = ["--samples", "8", "--sequence-length", "16", "--quiet"]


@pytest.fixture
def judge():
    torch.manual_seed(0)
    weight = torch.randn(5, 3, dtype=torch.float64)
    return Divergence(lambda hidden: hidden @ weight.T)


def hidden(tokens=4):
    return torch.randn(1, tokens, 3, dtype=torch.float64)


def test_the_divergence_is_the_mean_over_tokens_of_its_definition(judge):
    output, target, weights = hidden(), hidden(), torch.rand(1, 4, 1, dtype=torch.float64)
    total, weighed = 0.0, 0.0
    for token in range(4):
        p, q = (torch.softmax(judge.logits(h)[0, token], 0).tolist() for h in (target, output))
        own = sum(a * torch.tensor(a / b).log().item() for a, b in zip(p, q, strict=True))
        total, weighed = total + own / 4, weighed + own * float(weights[0, token, 0]) / 4
    assert float(judge.error(output, target)) == pytest.approx(total, rel=1e-6)
    assert float(judge.error(output, target, weights)) == pytest.approx(weighed, rel=1e-6)
    assert float(judge.error(target, target)) == pytest.approx(0, abs=1e-12)


def test_probes_are_half_of_the_second_derivative_on_average(judge, monkeypatch):
    output = hidden(1)

    def summed(moved):
        return judge.units(output) * judge.error(moved.view(1, 1, 3), output)

    expected = torch.autograd.functional.hessian(summed, output.flatten()) / 2
    actual = torch.zeros(3, 3, dtype=torch.float64)
    for token, chance in enumerate(torch.softmax(judge.logits(output), -1).flatten()):
        monkeypatch.setattr(whole, "drawn_from", lambda *_, t=token: torch.tensor([[[t]]]))
        actual += chance * torch.outer(*[judge.probe(output, None, 0).flatten()] * 2)
    assert torch.allclose(actual, expected)


def test_drawn_tokens_follow_the_seed_and_the_distribution():
    likely = torch.tensor([0.2, 0.5, 0.3]).log().expand(1, 20000, 3)
    one, again, other = (whole.drawn_from(likely, seed) for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other) and one.shape == (1, 20000, 1)
    assert torch.allclose(one.flatten().bincount(minlength=3) / 20000, torch.tensor([0.2, 0.5, 0.3]), atol=0.02)


def blocks(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n}


def random_masks(linears, pattern=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    group = pattern.group if pattern else None
    actual = {}
    for name, linear in linears.items():
        scores = torch.rand(linear.weight.shape, generator=generator)
        rows = scores.view(-1, group) if group else scores
        actual[name] = (rows.argsort(1).argsort(1) >= rows.shape[1] // 2).view(scores.shape)
    return actual


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "qwen3", "phi3"])
@torch.no_grad()
def test_the_whole_model_is_judged_by_its_logits(family):
    model, windows = tiny_model(family), tiny_windows(3)
    linears = blocks(model)
    trial = trial_of(model, linears, windows, SparsityPattern(0.5))
    masks = random_masks(linears)
    dense = [model(input_ids=w).logits[0].double() for w in windows.split(1)]
    assert trial.error({n: torch.ones_like(m) for n, m in masks.items()}) == pytest.approx(0, abs=1e-6)
    error = trial.error(masks)
    for name, linear in linears.items():
        linear.weight.data *= masks[name]
    sparse = [model(input_ids=w).logits[0].double() for w in windows.split(1)]
    expected = [
        (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1).mean()
        for p, q in zip(dense, sparse, strict=True)
    ]
    assert error == pytest.approx(float(sum(expected)) / 3, rel=1e-3)


def test_a_head_that_is_not_all_is_refused():
    model = tiny_model()
    forward = model.forward

    def scaled(*args, **kwargs):
        actual = forward(*args, **kwargs)
        actual.logits = actual.logits * 2
        return actual

    model.forward = scaled
    with pytest.raises(BarberError, match="makes more of its head's output"):
        trial_of(model, blocks(model), tiny_windows(2), SparsityPattern(0.5))


@pytest.mark.parametrize("pattern", [SparsityPattern(0.5), SparsityPattern(0.5, 2, 4)])
@pytest.mark.parametrize("exchanges", [1, 3])
def test_steps_lower_the_divergence_and_keep_every_row_and_group(pattern, exchanges):
    model = tiny_model()
    linears = blocks(model)
    settings = RefineSettings(steps=15, batch_size=3, exchanges=exchanges)
    masks = random_masks(linears, pattern if pattern.semi_structured else None)
    before = {name: keep.clone() for name, keep in masks.items()}
    told = []
    trial = trial_of(model, linears, tiny_windows(12), pattern)
    actual, looks = refined(trial, masks, settings, lambda *said: told.append(said))
    divergences = [look["divergence"] for look in looks]
    looked = [look["step"] for look in looks]
    assert looked == [0, *range(1, 15, 2), 15][: len(looks)] and sum(look["swaps"] for look in looks) > 0
    assert divergences == sorted(divergences, reverse=True)
    assert [step for step, _ in told] == list(range(1, looked[-1] + 1))
    assert told[-1][1] == min(divergences) < divergences[0]
    measuring = whole.part_of(trial, range(12)[::6])
    assert measuring.error(actual) == pytest.approx(min(divergences), rel=1e-6)
    again, _ = refined(trial_of(model, linears, tiny_windows(12), pattern), before, settings)
    for name, keep in actual.items():
        assert torch.equal(masks[name], before[name])  # what was given is not touched
        assert torch.equal(keep.sum(1), before[name].sum(1))
        assert holds_pattern(keep, pattern)
        assert torch.equal(keep, again[name])


def test_masks_that_cannot_gain_come_back_as_they_are():
    model = tiny_model()
    linears = blocks(model)
    masks = {name: torch.ones_like(linear.weight, dtype=torch.bool) for name, linear in linears.items()}
    actual, looks = refined(trial_of(model, linears, tiny_windows(4), SparsityPattern(0.5)), masks, RefineSettings())
    assert actual is masks and [look["swaps"] for look in looks] == [0] * (1 + PATIENCE)


def search_on_tiny_model(length):
    """A search at random masks of a tiny model, by the gradient of other windows than those that measure."""
    model = tiny_model()
    linears = blocks(model)
    masks = random_masks(linears)
    trial = trial_of(model, linears, tiny_windows(12), SparsityPattern(0.5))
    measuring = whole.part_of(trial, [0, 6])
    rows = RowModel(whole.part_of(trial, [1, 2, 3, 4, 5, 7, 8]), masks, RefineSettings())
    return Search(rows, measuring, 1, masks, measuring.error(masks), length)


def test_a_look_takes_the_length_that_lowers_the_measured_divergence_more_than_its_neighbours():
    search = search_on_tiny_model(2**-8)
    start, stepped = search.best, search.model.stepped

    def divergence(length):
        return search.measuring.error(stepped(start, length))

    before = search.lowest
    tried = {length: divergence(length) for length in (2.0**-power for power in range(15))}
    search.look(1)
    assert search.lowest == pytest.approx(tried[search.length], rel=1e-6)
    assert search.lowest < min(tried[search.length / FACTOR], tried[search.length * FACTOR], before)
    assert search.masks is search.best is not start
    swaps = rows_changed(start, search.best)  # one exchange a row
    assert search.looks[1:] == [{"step": 1, "divergence": search.lowest, "swaps": swaps, "length": search.length}]


def test_the_gradient_of_a_search_follows_its_masks():
    """As if every exchange had been a step of the row model, wherever the search went and came back."""
    search, expected = search_on_tiny_model(2**-8), search_on_tiny_model(2**-8)
    search.step()
    search.look(2)
    search.step()
    search.look(4)
    expected.model.follow(expected.best, search.best)
    for name, quadratic in expected.model.items():
        actual = search.model[name].correlation
        assert torch.allclose(actual, quadratic.correlation, rtol=1e-3, atol=1e-4 * float(actual.abs().max()))


def test_steps_that_did_harm_are_taken_back_and_the_next_ones_are_shorter():
    search = search_on_tiny_model(1.0)
    best = search.best
    while search.measuring.error(search.masks) <= search.lowest:
        search.step()
    search._keep_the_better()
    assert search.masks is search.best is best and search.length == 1 / FACTOR


def test_looks_that_hardly_gain_are_counted():
    search = search_on_tiny_model(2**-10)
    while search.vain == 0:
        search.look(1)  # no new gradient
    before = search.lowest
    for vain in range(search.vain, 4):
        assert search.vain == vain
        search.look(1)
        assert before * (1 - WORTH_ITS_TIME) <= search.lowest <= before
        before = search.lowest


def test_every_window_is_learned_from_once_a_turn():
    for count, size in ((7, 3), (7, 4), (11, 4), (8, 4), (3, 4), (84, 4), (14, 8)):
        batches = batches_of(range(count), size)
        assert sorted(window for batch in batches for window in batch) == list(range(count))
        lengths = {len(batch) for batch in batches}
        assert max(lengths) - min(lengths) <= 1 and max(lengths) <= 1.5 * size
    assert [measuring_stride(count) for count in (2, 3, 4, 8, 15, 16, 96)] == [2, 2, 2, 4, 7, 8, 8]


@pytest.mark.parametrize("ranks", [1, 2, 3, 21, 32, 64])
def test_the_gram_matrices_take_windows_of_every_rank(ranks):
    for windows in (2 * ranks, 4 * ranks + 1, 256):
        learned = [window for window in range(windows) if window % measuring_stride(windows)]
        some = gram_windows(learned, ranks)
        assert len(some) >= min(GRAM_WINDOWS, len(learned))
        for rank in range(ranks):
            share = share_of(windows, rank, ranks)
            assert any(share.first <= window < share.end for window in some)


def masked_in_place(model, linears, masks):
    """The dense weights, and the model with its weights under the masks."""
    dense = {name: linear.weight.detach().clone() for name, linear in linears.items()}
    for name, linear in linears.items():
        linear.weight.data *= masks[name]
    return dense


def test_the_running_gradient_is_that_of_the_whole_model():
    """What learning adds to a fifth, C' h / (1 - rho) less its shrinkage, is the gradient of the summed divergence."""
    model, windows, shrinkage = tiny_model(), tiny_windows(8), 0.3
    linears = blocks(model)
    masks = random_masks(linears)
    dense_logits = [model(input_ids=window).logits.detach() for window in windows.split(1)]
    trial = trial_of(model, linears, windows, SparsityPattern(0.5))
    rows = RowModel(whole.part_of(trial, range(6)), masks, RefineSettings(shrinkage=shrinkage))
    before = {name: quadratic.correlation for name, quadratic in rows.items()}
    rows.learn(whole.part_of(trial, [6, 7]), masks)
    dense = masked_in_place(model, linears, masks)
    for window, logits in zip(windows[6:].split(1), dense_logits[6:], strict=True):
        sparse = model(input_ids=window).logits.log_softmax(-1)
        (logits.softmax(-1) * (logits.log_softmax(-1) - sparse)).sum().backward()
    for name, linear in linears.items():
        quadratic = rows[name]
        worth = rows.worth[name][:, None]
        missing = dense[name] - linear.weight.detach()
        own = shrinkage * missing * quadratic.gram.diagonal()
        learned = (quadratic.correlation - MOMENTUM * before[name]) / (1 - MOMENTUM)
        actual = (learned - own) * worth / (1 - shrinkage)
        expected = -linear.weight.grad * (6 / 2)  # in units of the six windows of the Gram matrix
        assert torch.allclose(actual, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())), name


@pytest.mark.parametrize("precision", ["highest", "medium"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
def test_gradient_checkpointing_computes_again_and_changes_no_bit(family, precision, tmp_path):
    windows, results, calls = tiny_windows(8), [], []
    config = BarberConfig(sparsity=0.5, rebuild="none", dtype="float32")
    BarberSparsifier(tiny_model(family)).sparsify(config, windows, tmp_path / "sparse", quiet=True)
    for again in (False, True):
        refiner, before = BarberRefiner(tiny_model(family)), len(calls)
        linear = next(iter(blocks(refiner.model).values()))
        linear.register_forward_hook(lambda *_: calls.append(1))
        settings = RefineConfig(steps=4, batch_size=2, gradient_checkpointing=again, precision=precision)
        results.append((refiner.refine(tmp_path / "sparse", settings, windows, quiet=True), len(calls) - before))
    (plain, once), (checkpointed, more) = results
    assert plain.looks == checkpointed.looks and plain.swaps > 0
    assert more > once
    for name, mask in plain.masks.items():
        assert torch.equal(mask.unpack(), checkpointed.masks[name].unpack())


def rows_of_tiny_model():
    """Linears, masks, the trial, and its rows as a quadratic."""
    model = tiny_model()
    linears = blocks(model)
    masks = random_masks(linears)
    trial = trial_of(model, linears, tiny_windows(4), SparsityPattern(0.5))
    return linears, masks, trial, RowModel(trial, masks, RefineSettings())


def test_a_row_of_hardly_any_worth_without_a_gradient_stays_finite():
    """The factor of its gradient would be beyond float32."""
    linears, masks, trial, rows = rows_of_tiny_model()
    name = next(name for name in linears if name.endswith("up_proj"))
    down = linears[name.replace("up_proj", "down_proj")]
    down.weight.data[:, 0] = 0  # its row of up_proj gets no gradient
    rows.worth[name][0] = torch.finfo(torch.float32).tiny
    rows.learn(whole.part_of(trial, [0]), masks)
    assert torch.isfinite(rows[name].correlation).all()


def test_the_gradient_follows_an_exchange_by_the_quadratic_of_its_row():
    linears, masks, _, rows = rows_of_tiny_model()
    before = {name: quadratic.correlation for name, quadratic in rows.items()}
    after = rows.step(masks, 0.5)
    name, row = next((n, r) for n in masks for r in range(len(masks[n])) if not torch.equal(masks[n][r], after[n][r]))
    weight, expected = linears[name].weight[row].double(), before[name][row].double()
    for column in range(len(weight)):
        turn = int(after[name][row, column]) - int(masks[name][row, column])
        expected = expected - turn * weight[column] * rows[name].gram[column].double()
    assert torch.allclose(rows[name].correlation[row].double(), expected, rtol=1e-4, atol=1e-5)
    rows.follow(after, masks)
    for name, quadratic in rows.items():
        assert torch.allclose(quadratic.correlation, before[name], rtol=1e-3, atol=1e-4)


def test_the_first_length_counts_rows_among_those_that_can_move():
    model = tiny_model()
    linears = blocks(model)
    masks = random_masks(linears)
    for name in masks:
        if "mlp" in name:
            masks[name] = torch.ones_like(masks[name])  # nothing to exchange
    for exchanges in (1, 4):
        settings = RefineSettings(exchanges=exchanges)
        rows = RowModel(trial_of(model, linears, tiny_windows(4), SparsityPattern(0.5)), masks, settings)
        length = first_tried(rows, masks)
        moving, all_that_can = (rows_changed(masks, rows.stepped(masks, each)) for each in (length, 1.0))
        shorter = rows_changed(masks, rows.stepped(masks, length / 2))
        assert shorter < MOVING * all_that_can <= moving and length < 1


def test_rows_of_which_nothing_is_known_have_no_slope():
    gram = torch.eye(3)
    assert torch.isinf(row_worth(torch.zeros(4), gram)).all()
    assert torch.isinf(row_worth(torch.zeros(4), torch.zeros(3, 3))).all()
    assert torch.equal(row_worth(torch.tensor([3.0, 0.0]), gram), torch.tensor([1.0, 5e-7]))


@pytest.fixture(scope="module")
def pruned(tmp_path_factory, model_dir, text_file):
    directory = tmp_path_factory.mktemp("pruned") / "out"
    flags = ["--sparsity", "0.5", "--rebuild", "none", "--calibration", str(text_file), *QUICK]
    assert main(["prune", str(model_dir), *flags, "-o", str(directory)]) == 0
    return directory


def test_a_refined_checkpoint_is_whole_and_better(pruned, model_dir, text_file, tmp_path, capsys):
    steps = ["--steps", "12", "--batch-size", "2"]
    output, flags = tmp_path / "refined", ["--calibration", str(text_file), *steps, *QUICK[:-1]]
    before = {path.name: path.read_bytes() for path in pruned.iterdir()}
    assert main(["refine", str(pruned), *flags, "-o", str(output)]) == 0
    said = capsys.readouterr().out
    assert "nats a token" in said and str(output) in said
    assert {path.name: path.read_bytes() for path in pruned.iterdir()} == before
    assert {path.name for path in output.iterdir()} >= set(before) - {"model.safetensors.index.json"}
    assert not verify_checkpoint(output).faults
    report, record = (json.loads((output / f"{name}.json").read_text()) for name in ("report", "sparsity_config"))
    assert report["refine"]["divergence_after"] < report["refine"]["divergence_before"] and report["blocks"]
    assert record["steps"][-1]["name"] == "refine" and record["steps"][-1]["swaps"] == report["refine"]["swaps"] > 0
    dense, sparse, refined_ = (SafetensorsWeights.open(d) for d in (model_dir, pruned, output))
    changed = 0
    for name in record["modules"]:
        weight = refined_.linear(name)
        kept = weight != 0
        assert torch.equal(weight[kept], dense.linear(name)[kept])
        assert torch.equal(kept.sum(1), (sparse.linear(name) != 0).sum(1))
        changed += int((kept & (sparse.linear(name) == 0)).sum())
    assert changed == report["refine"]["swaps"]
    assert main(["report", str(output), "-o", str(tmp_path / "page")]) == 0
    assert "Steps of refine" in (tmp_path / "page" / "index.html").read_text(encoding="utf-8")
    assert main(["refine", str(output), *flags, "--quiet", "-o", str(tmp_path / "again")]) == 0


def test_a_model_in_memory_is_refined_without_a_file(tmp_path):
    config = BarberConfig(sparsity=0.5, rebuild="none", dtype="float32")
    windows = tiny_windows(8)
    BarberSparsifier(tiny_model()).sparsify(config, windows, tmp_path / "sparse", quiet=True)
    refiner = BarberRefiner(tiny_model())
    result = refiner.refine(tmp_path / "sparse", RefineConfig(), windows, quiet=True)
    for name, mask in result.masks.items():
        assert torch.equal(refiner.model.get_submodule(name).weight != 0, mask.unpack())


BAD = {
    "not pruned": ({"sparse": "model"}, "is no pruned checkpoint"),
    "one window": ({"flags": ["--samples", "1"]}, "samples 1 is not legal: at least 2"),
    "no steps": ({"flags": ["--steps", "0"]}, "steps"),
    "another base": ({"flags": ["--base", "other"]}, "is not the dense model's weight under its mask"),
    "missing base": ({"flags": ["--base", "nowhere"]}, "nowhere"),
    "itself": ({"output": "sparse"}, "not empty"),
    "text": ({"flags": ["--calibration", "nothing.txt"]}, "nothing.txt"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(case, pruned, model_dir, tokenizer, text_file, tmp_path, capsys):
    what, said = BAD[case]
    tiny_model(seed=1).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    places = {"model": model_dir, "sparse": pruned, "other": tmp_path / "other", None: tmp_path / "out"}
    flags = [str(places.get(flag, flag)) for flag in what.get("flags", [])]
    there = set(tmp_path.iterdir())
    command = ["refine", str(places[what.get("sparse", "sparse")]), "--calibration", str(text_file), *QUICK, *flags]
    assert main([*command, "-o", str(places[what.get("output")])]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert set(tmp_path.iterdir()) == there


def test_weights_that_were_reconstructed_are_refused(model_dir, text_file, tmp_path, capsys):
    flags = ["--sparsity", "0.5", "--reconstruct", "least-squares", "--calibration", str(text_file), *QUICK]
    assert main(["prune", str(model_dir), *flags, "-o", str(tmp_path / "sparse")]) == 0
    command = ["refine", str(tmp_path / "sparse"), "--calibration", str(text_file), *QUICK]
    assert main([*command, "-o", str(tmp_path / "out")]) == 2
    assert "before weights are changed" in capsys.readouterr().err


RECIPE = """\
model: {model}
calibration: {{texts: [pydoc], samples: 8, sequence_length: 16}}
stages:
  - prune: {{pattern: 2:4, {reconstruct}}}
  - refine: {{steps: 4}}
  - quantize: {{bits: 4, group_size: 16}}
output: {output}
"""


def test_a_recipe_refines_before_it_quantizes(model_dir, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(model=model_dir, output=tmp_path / "out", reconstruct=""), encoding="utf-8")
    run_recipe(path, quiet=True)
    stages = json.loads((tmp_path / "out" / "run.json").read_text())["stages"]
    assert stages["02-refine"]["divergence_after"] < stages["02-refine"]["divergence_before"]
    assert stages["03-quantize"]["zeros"] == stages["02-refine"]["zeros"] == stages["01-prune"]["zeros"]


def test_a_recipe_that_reconstructs_before_refining_is_refused(model_dir, tmp_path):
    path = tmp_path / "recipe.yaml"
    text = RECIPE.format(model=model_dir, output=tmp_path / "out", reconstruct="reconstruct: least-squares")
    path.write_text(text.replace("samples: 8", "samples: 1"), encoding="utf-8")
    with pytest.raises(RecipeError) as raised:
        read_recipe(path)
    faults = str(raised.value).splitlines()
    assert len(faults) == 2
    assert any("prune changes weights: refine works on masks alone" in fault for fault in faults)
    assert any("samples 1 is not legal" in fault for fault in faults)


def test_windows_that_are_learned_and_measured_are_noticed(caplog):
    apart = tiny_windows(8, 40)
    assert seen_share(apart) == 0
    doubled = torch.cat([apart[:4], apart[:4].roll(1, 0)])
    assert seen_share(doubled) == 1.0
    check_windows(apart)
    assert not caplog.records
    check_windows(doubled)
    assert "100 % of what measures is learned from too" in caplog.text


def test_a_base_that_is_pruned_itself_is_refused(pruned, text_file, tmp_path, capsys):
    command = ["refine", str(pruned), "--base", str(pruned), "--calibration", str(text_file), *QUICK]
    assert main([*command, "-o", str(tmp_path / "out")]) == 2
    assert "base is pruned itself" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["model.norm.weight", "model.embed_tokens.weight"])
def test_changes_beside_the_masks_would_be_lost_and_are_refused(key, pruned, text_file, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    changed = shutil.copytree(pruned, tmp_path / "changed")
    tensors = load_file(changed / "model.safetensors")
    tensors[key] = tensors[key] + 1
    save_file(tensors, changed / "model.safetensors", {"format": "pt"})
    command = ["refine", str(changed), "--calibration", str(text_file), *QUICK]
    assert main([*command, "-o", str(tmp_path / "out")]) == 2
    assert f"{key} differs from the dense model's" in capsys.readouterr().err


def test_values_that_are_not_finite_are_told(pruned):
    model, windows = tiny_model(), tiny_windows(4)
    linears = blocks(model)
    trial = trial_of(model, linears, windows, SparsityPattern(0.5))
    next(iter(trial.targets))[0, 0] = torch.nan
    with pytest.raises(BarberError, match="divergence from the dense model is nan"):
        refined(trial, random_masks(linears), RefineSettings())
    model.model.norm.weight.data[0] = torch.inf
    with pytest.raises(BarberError, match="base gives NaN or Inf"):
        trial_of(model, linears, windows, SparsityPattern(0.5))


def test_half_precision_stays_and_buffers_keep_theirs(tmp_path):
    config, windows = BarberConfig(sparsity=0.5, rebuild="none"), tiny_windows(8)
    BarberSparsifier(tiny_model().half()).sparsify(config, windows, tmp_path / "sparse", quiet=True)
    refiner = BarberRefiner(tiny_model().half())
    refiner.refine(tmp_path / "sparse", RefineConfig(), windows, tmp_path / "out", quiet=True)
    weights = SafetensorsWeights.open(str(tmp_path / "out"))
    assert {weights.tensor(key).dtype for key in weights.entries} == {torch.float16}
    assert refiner.model.model.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.parametrize("options", ["producer: sparsegpt", "producer: masks, producer_args: {{weights: x}}"])
def test_recipes_that_change_weights_before_refining_are_refused(options, model_dir, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        RECIPE.format(model=model_dir, output=tmp_path / "out", reconstruct=options.format()), encoding="utf-8"
    )
    with pytest.raises(RecipeError, match="prune changes weights"):
        read_recipe(path)


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_the_record_states_the_precision_under_which_masks_were_refined(precision, tmp_path, model_dir):
    config = BarberConfig(producer="magnitude", sparsity=0.5, rebuild="none")
    sparsifier = BarberSparsifier.from_pretrained(model_dir, stream="never")
    sparsifier.sparsify(config, tiny_windows(8), tmp_path / "sparse", quiet=True)
    before = torch.get_float32_matmul_precision()
    refiner = BarberRefiner.for_checkpoint(tmp_path / "sparse")
    result = refiner.refine(
        tmp_path / "sparse", RefineConfig(precision=precision), tiny_windows(8), tmp_path / "out", quiet=True
    )
    assert result.sparsity_config.steps[-1]["precision"] == precision
    assert torch.get_float32_matmul_precision() == before
    assert verify_checkpoint(tmp_path / "out").faults == []
