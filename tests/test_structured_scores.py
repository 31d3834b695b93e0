"""Scores of heads and channels against float64 loops with the explicit products."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimum_barber.models.source import ModelSource
from optimum_barber.shrink.choose import Budget, highest
from optimum_barber.shrink.plan import Cut
from optimum_barber.shrink.scan import choose_units
from optimum_barber.shrink.scorers import SCORERS, ModelInput
from optimum_barber.shrink.units import CHANNELS, HEADS, Units, structure_of, units_of
from optimum_barber.tensors import unit_scores as scores

from .conftest import tiny_model, tiny_windows
from .oracles import explicit_bip, unit_sums

SMALL = {"hidden_size": 16, "intermediate_size": 12}
SHAPES = {
    "gated-mha": ("llama", {**SMALL, "num_key_value_heads": 4}),
    "gated-gqa": ("llama", SMALL),
    "fused-gqa": ("phi3", SMALL),
    "plain": ("opt", {"hidden_size": 16, "ffn_dim": 12, "word_embed_proj_dim": 16}),
}


def observed(model, windows):
    """Inputs, (tokens, in), of every Linear in a plain forward pass, and the layers' parts."""
    seen = {}
    handles = [
        module.register_forward_pre_hook(lambda _, args, n=name: seen.setdefault(n, []).append(args[0].flatten(0, -2)))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    with torch.no_grad():
        for window in windows.split(1):
            model(window, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def scored(model, windows, name, unit="group", **arguments):
    """The scores of one scorer by layer and kind."""
    source = ModelSource(model)
    units, structure, result = units_of(source, unit), structure_of(source), {}
    scorer = SCORERS[name]
    if scorer.whole_model:
        answer = scorer.function(ModelInput(source, windows, units, structure), **arguments)
        return units, {(i, kind): s for i, kinds in enumerate(answer) for kind, s in kinds.items()}

    def listening(given, **rest):
        result[int(given.layer.rsplit(".", 1)[1]), given.units.kind] = answer = scorer.function(given, **rest)
        return answer

    budget = Budget({kind: u.count // u.groups // 2 * u.groups for kind, u in units.items()}, 0.5)
    cut = Cut(source, structure, units, budget, type(scorer)(listening, scorer.needs), arguments)
    choose_units(source, windows, [cut])
    return units, result


def parts_of(model, layer):
    """W_o, W_down and the MLP's makers with their names, of a decoder layer."""
    stack = model.model.decoder.layers if model.config.model_type == "opt" else model.model.layers
    path = "model.decoder.layers" if model.config.model_type == "opt" else "model.layers"
    module = stack[layer]
    if model.config.model_type == "opt":
        return f"{path}.{layer}.self_attn.out_proj", f"{path}.{layer}.fc2", [module.fc1.weight], module.final_layer_norm
    makers = (
        list(module.mlp.gate_up_proj.weight.chunk(2))
        if model.config.model_type == "phi3"
        else [module.mlp.gate_proj.weight, module.mlp.up_proj.weight]
    )
    norm = module.post_attention_layernorm
    return f"{path}.{layer}.self_attn.o_proj", f"{path}.{layer}.mlp.down_proj", makers, norm


@pytest.mark.parametrize("norm_gain", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_bip_is_the_bound_with_the_explicit_product(shape, norm_gain):
    family, changes = SHAPES[shape]
    model, windows = tiny_model(family, **changes), tiny_windows(2, 8)
    for layer in range(2):
        parts_of(model, layer)[3].weight.data.uniform_(-2, 2)
    units, result = scored(model, windows, "bip", norm_gain=norm_gain)
    inputs = observed(model, windows)
    for layer in range(2):
        output, down, makers, norm = parts_of(model, layer)
        weight = model.get_submodule(down).weight
        expected = explicit_bip(inputs[down], weight)
        assert result[layer, CHANNELS].tolist() == pytest.approx(expected, rel=1e-5)
        gain = norm.weight.detach() if norm_gain else None
        columns = explicit_bip(inputs[output], model.get_submodule(output).weight, makers, weight, gain)
        width = len(columns) // units[HEADS].count
        heads = [sum(columns[u * width : (u + 1) * width]) for u in range(units[HEADS].count)]
        assert result[layer, HEADS].tolist() == pytest.approx(heads, rel=1e-5)


def test_gemmas_norms_add_one_to_their_gain():
    model, windows = tiny_model("gemma", **SMALL, head_dim=4), tiny_windows(2, 8)
    layer = model.model.layers[0]
    layer.post_attention_layernorm.weight.data.uniform_(-1, 1)
    _, result = scored(model, windows, "bip", norm_gain=True)
    makers = [layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight]
    name = "model.layers.0.self_attn.o_proj"
    columns = explicit_bip(observed(model, windows)[name], layer.self_attn.o_proj.weight, makers,
                           layer.mlp.down_proj.weight, 1 + layer.post_attention_layernorm.weight.detach())  # fmt: skip
    assert result[0, HEADS].tolist() == pytest.approx([sum(columns[:8]), sum(columns[8:])], rel=1e-5)


def members(unit):
    """(Linear, row or None, column or None) ranges of a unit of the tiny LLaMA with 2 groups of 2 heads of size 4."""
    heads, hidden = range(unit * 8, unit * 8 + 8), range(16)
    values = range(unit * 4, unit * 4 + 4)
    rows = [("q", i, j) for i in heads for j in hidden]
    rows += [(name, i, j) for name in "kv" for i in values for j in hidden]
    return rows, [("o", i, j) for i in hidden for j in heads]


@pytest.mark.parametrize("name", ["magnitude", "wanda", "taylor"])
def test_connected_weights_are_summed(name):
    model, windows = tiny_model(**SMALL), tiny_windows(3, 8)
    _, result = scored(model, windows, name)
    attention = model.model.layers[1].self_attn
    linears = {n: getattr(attention, f"{n}_proj") for n in "qkvo"}
    values = {n: linear.weight.detach().double().abs() for n, linear in linears.items()}
    if name == "wanda":
        norm = observed(model, windows)["model.layers.1.self_attn.q_proj"].double().norm(dim=0)
        values = {n: value * norm for n, value in values.items()}
    if name == "taylor":
        model(windows, labels=windows).loss.backward()
        values = {n: (linear.weight * linear.weight.grad).detach().double().abs() for n, linear in linears.items()}
    cells = [members(unit) for unit in range(2)]
    chosen = [rows if name == "wanda" else rows + columns for rows, columns in cells]
    plain = {n: value.tolist() for n, value in values.items()}
    assert result[1, HEADS].tolist() == pytest.approx(unit_sums(plain, chosen), rel=1e-4)


def test_taylor_leaves_no_gradients_and_changes_no_weight():
    model = tiny_model()
    before = {name: (p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    scored(model, tiny_windows(), "taylor")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert parameter.grad is None
        assert parameter.requires_grad == before[name][1]


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("unit", ["group", "query"])
def test_importance_goes_back_through_weights_and_residuals(family, unit):
    model = tiny_model(family, **SMALL)
    _, result = scored(model, tiny_windows(), "importance-propagation", unit)
    behind = [1.0] * 16
    for layer in (1, 0):
        output, down, makers, _ = parts_of(model, layer)
        attention = model.model.layers[layer].self_attn
        value = (attention.qkv_proj.weight[-8:] if family == "phi3" else attention.v_proj.weight).abs().double()
        last, mixed = (model.get_submodule(name).weight.abs().double() for name in (down, output))
        channels = [sum(last[k, j].item() * behind[k] for k in range(16)) for j in range(12)]
        ratio = result[layer, CHANNELS].double() / torch.tensor(channels, dtype=torch.float64)
        assert ratio.tolist() == pytest.approx([ratio[0].item()] * 12, rel=1e-5)
        middle = [
            behind[a] + sum(m[k, a].abs().item() * channels[k] for m in makers for k in range(12)) for a in range(16)
        ]
        heads = [sum(mixed[k, j].item() * middle[k] for k in range(16)) for j in range(16)]
        each = [sum(heads[u * 4 : u * 4 + 4]) for u in range(4)]
        expected = each if unit == "query" else [each[0] + each[1], each[2] + each[3]]
        ratio = result[layer, HEADS].double() / torch.tensor(expected, dtype=torch.float64)
        assert ratio.tolist() == pytest.approx([ratio[0].item()] * len(expected), rel=1e-5)
        values = [sum(heads[(g * 2 + q) * 4 + d] for q in range(2)) for g in range(2) for d in range(4)]
        behind = [middle[a] + sum(value[k, a].item() * values[k] for k in range(8)) for a in range(16)]


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 4), st.integers(0, 3))
def test_sums_over_units_are_the_loops(hidden, count, width, start):
    values = torch.randn(start + count * width, hidden, generator=torch.Generator().manual_seed(count))
    expected = [
        sum(values[start + u * width + i, j].item() for i in range(width) for j in range(hidden)) for u in range(count)
    ]
    assert scores.unit_sums(values, 0, start, width, count).tolist() == pytest.approx(expected, abs=1e-4)
    assert scores.unit_sums(values.t(), 1, start, width, count).tolist() == pytest.approx(expected, abs=1e-4)


@given(st.lists(st.integers(0, 4), min_size=4, max_size=12).filter(lambda v: len(v) % 2 == 0), st.sampled_from([1, 2]))
def test_every_group_keeps_its_highest(values, groups):
    units = Units("heads", len(values), (), groups=groups)
    each = len(values) // groups
    for keep in range(1, each + 1):
        kept = highest(torch.tensor(values, dtype=torch.float32), units, keep * groups)
        for start in range(0, len(values), each):
            group = range(start, start + each)
            best = sorted(group, key=lambda u: (-values[u], u))[:keep]
            assert sorted(best) == [u for u in kept if u in group]


def output_error(inputs, weight, width, kept):
    """Sum of squares of what the units that go contribute, by loops over tokens and outputs."""
    gone = [j for j in range(weight.shape[1]) if j // width not in kept]
    rows, tokens = weight.double().tolist(), inputs.double().tolist()
    return sum(sum(row[j] * token[j] for j in gone) ** 2 for token in tokens for row in rows)


@given(st.integers(0, 10**6), st.sampled_from([1, 2]), st.sampled_from([1, 3]))
def test_exchanges_find_a_choice_that_no_single_exchange_betters(seed, groups, width):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(7, 6 * width, generator=generator) @ torch.randn(6 * width, 6 * width, generator=generator)
    weight, each = torch.randn(4, 6 * width, generator=generator), 6 // groups
    matrix = scores.error_matrix(weight.double(), inputs.double().t() @ inputs.double(), width)
    start = [u for u in range(6) if u % each < 1]
    kept = scores.exchange_units(matrix, start, groups)
    best = output_error(inputs, weight, width, kept)
    assert len(kept) == len(start)
    assert best <= output_error(inputs, weight, width, start) * (1 + 1e-9)
    for leaves in kept:
        for returns in set(range(6)) - set(kept):
            if leaves // each == returns // each:
                other = sorted({*kept, returns} - {leaves})
                assert output_error(inputs, weight, width, other) >= best * (1 - 1e-6) - 1e-6


def test_barber_lowers_the_block_error_of_bips_choice():
    model, windows = tiny_model(), tiny_windows(8)
    inputs, result = observed(model, windows), {name: scored(model, windows, name) for name in ("bip", "barber")}
    before, after = ({} for _ in range(2))
    for errors, name in ((before, "bip"), (after, "barber")):
        units, answers = result[name]
        for (layer, kind), answer in answers.items():
            linear = f"model.layers.{layer}.{units[kind].reader}"
            kept = highest(answer, units[kind], units[kind].count // 2)
            width = units[kind].slices[-1].width
            errors[layer, kind] = output_error(inputs[linear], model.get_submodule(linear).weight, width, kept)
    assert all(after[key] <= before[key] * (1 + 1e-6) for key in before)
    assert any(after[key] < 0.99 * before[key] for key in before)


def test_scores_are_the_same_every_time():
    for name in SCORERS:
        first, second = (scored(tiny_model(), tiny_windows(), name)[1] for _ in range(2))
        assert all(torch.equal(first[key], second[key]) for key in first)
