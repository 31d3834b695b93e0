"""On a CUDA device the same masks as on the CPU, up to the order of float sums; skipped where there is none."""

import pytest
import torch

from optimum_barber import BarberConfig, BarberSparsifier
from optimum_barber.tensors.sums import Products
from optimum_barber.tensors.swaps import exchange

from .conftest import tiny_model, tiny_windows
from .test_swaps import case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CHAINS = ["none", "barber", "swaps", "dsnot", "barber+swaps", "swaps+gauss-newton"]


def pruned(device, rebuild="barber+swaps", producer="wanda", precision="highest", **settings):
    """The result and the model, whose weights are where they were."""
    model = tiny_model("llama")
    settings = {"sparsity": None if "pattern" in settings else 0.5, **settings}
    config = BarberConfig(producer=producer, rebuild=rebuild, device=device, precision=precision, **settings)
    return BarberSparsifier(model).sparsify(config, tiny_windows(), quiet=True), model


def agreement(one, other):
    """The share of bits that two results' masks have in common."""
    same = [one.masks[name].unpack() == other.masks[name].unpack() for name in one.masks]
    return sum(int(bits.sum()) for bits in same) / sum(bits.numel() for bits in same)


@pytest.mark.parametrize("group", [None, 4])
@pytest.mark.parametrize("most", [1, 20, None])
def test_exchanges_are_those_of_the_cpu(group, most):
    inputs, targets, values, keep = case(3, rows=16, width=24, group=group)
    gram = inputs.t() @ inputs
    problem = values, keep, gram, (targets - inputs @ (values * keep).t()).t() @ inputs
    expected = exchange(*problem, most, group)
    actual = exchange(*(tensor.cuda() for tensor in problem), most, group)
    assert torch.equal(actual.cpu(), expected)


def test_gram_matrices_are_those_of_the_cpu():
    x = torch.randn(64, 600, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    total = Products(symmetric=True)
    total.add(x.cuda(), x.cuda())
    assert torch.allclose(total.over().cpu(), x.t() @ x)


@pytest.mark.parametrize("producer", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("rebuild", CHAINS)
def test_runs_agree_with_the_cpu(producer, rebuild):
    there, model = pruned("cuda", rebuild, producer)
    here, _ = pruned("cpu", rebuild, producer)
    assert agreement(there, here) > 0.97
    assert {name: mask.pruned for name, mask in there.masks.items()}.keys() == here.masks.keys()
    for name, mask in there.masks.items():
        weight = model.get_submodule(name).weight
        assert not weight[~mask.unpack().to(weight.device)].any()
    blocks = there.as_report()["blocks"]
    assert all(block["error_after"] <= block["error_before"] for block in blocks)


def test_groups_hold_on_the_device():
    result, _ = pruned("cuda", "swaps+gauss-newton", pattern="2:4")
    for mask in result.masks.values():
        assert (mask.unpack().view(-1, 4).sum(1) == 2).all()


def test_the_same_masks_twice_and_whatever_the_batch_size():
    results = [pruned("cuda", batch_size=size)[0] for size in (None, None, 1, 3)]
    hashes = [{name: mask.sha256 for name, mask in result.masks.items()} for result in results]
    assert all(actual == hashes[0] for actual in hashes)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_rounded_products_give_nearly_the_same_masks(precision):
    assert agreement(pruned("cuda")[0], pruned("cuda", precision=precision)[0]) > 0.9
