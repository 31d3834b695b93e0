"""What a refinement sums up: Gram matrices as a pass runs, and where they wait."""

from functools import partial
from weakref import WeakSet

import pytest
import torch
from torch import nn

from optimum_barber.base.errors import BarberError
from optimum_barber.base.ranks import Ranks
from optimum_barber.models.calls import recomputing
from optimum_barber.models.device import recomputing_contexts
from optimum_barber.prune.quadratic import quadratics
from optimum_barber.prune.refine import place
from optimum_barber.prune.refine.grams import SameInputs, gram_matrices, inputs_shown
from optimum_barber.prune.refine.place import FOR_THE_PASS, place_of_sums
from optimum_barber.prune.refine.row_model import RowModel
from optimum_barber.prune.refine.settings import RefineSettings
from optimum_barber.prune.refine.whole import trial_of
from optimum_barber.tensors.patterns import SparsityPattern

from .conftest import tiny_model, tiny_windows
from .test_refine import blocks, random_masks

SHARED = ("k_proj", "v_proj", "up_proj")  # each has the input of another Linear


def whole_trial(model, windows=4):
    linears = blocks(model)
    masks = random_masks(linears)
    return trial_of(model, linears, tiny_windows(windows), SparsityPattern(0.5)), masks


def looped_gram(trial, masks, name, shrinkage):
    """sum of x x^T token by token in float64, by a hook on one Linear of the masked model."""
    inputs = []
    width = trial.linears[name].in_features
    handle = trial.linears[name].register_forward_hook(lambda _, args, __: inputs.append(args[0].detach().double()))
    trial.watch(masks)
    handle.remove()
    gram = torch.zeros(width, width, dtype=torch.float64)
    for x in inputs:
        for token in x.reshape(-1, width):
            gram += torch.outer(token, token)
    off_diagonal = gram * (1 - shrinkage)
    off_diagonal.diagonal().copy_(gram.diagonal())
    return off_diagonal


@pytest.mark.parametrize("shrinkage", [0.0, 0.3])
@pytest.mark.parametrize("family", ["llama", "opt", "phi3"])
def test_gram_matrices_are_those_of_a_loop_over_tokens(family, shrinkage):
    trial, masks = whole_trial(tiny_model(family))
    grams = gram_matrices(trial, masks, shrinkage)
    assert set(grams) == set(trial.linears)
    for name, gram in grams.items():
        expected = looped_gram(trial, masks, name, shrinkage)
        assert torch.allclose(gram.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())), name


def test_linears_with_the_same_input_share_a_matrix():
    trial, masks = whole_trial(tiny_model())
    grams = gram_matrices(trial, masks, 0.3)
    for name in grams:
        leader = name.replace("k_proj", "q_proj").replace("v_proj", "q_proj").replace("up_proj", "gate_proj")
        assert (grams[name] is grams[leader]) and (name == leader or name.endswith(SHARED))
    assert len({id(gram) for gram in grams.values()}) == len(grams) * 4 // 7


def test_a_layer_that_stands_twice_in_a_stack_counts_both_its_calls():
    model = tiny_model()
    model.model.layers = nn.ModuleList([model.model.layers[0]] * 2)
    linears = blocks(model)
    trial, masks = trial_of(model, linears, tiny_windows(2), SparsityPattern(0.5)), random_masks(linears)
    grams = gram_matrices(trial, masks, 0.0)
    latest = quadratics(trial, masks, list(linears))
    for name, gram in grams.items():
        expected = looped_gram(trial, masks, name, 0.0)
        assert torch.allclose(gram.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())), name
        assert float(gram.trace()) > 1.1 * float(latest[name].gram.trace())


def test_no_input_outlives_its_call():
    """Of a chain of Linears, when the last one is called, the inputs of all before are gone."""
    chain = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(5)))
    linears = {str(index): linear for index, linear in enumerate(chain)}
    same = SameInputs()
    alive = []

    def see(name, x):
        same.note(name, x)
        alive.append(len(same._callers))

    with inputs_shown(linears, see), torch.no_grad():
        chain(torch.ones(1, 4))
    assert max(alive) <= 2 and len(alive) == 5
    assert same.first == {name: name for name in linears}
    chain(torch.ones(1, 4))
    assert len(alive) == 5  # the hooks are gone


def test_an_input_is_known_again_after_others():
    """Of a parallel block, whose MLP gets what its attention got."""
    first, second, third = (nn.Linear(4, 4, bias=False) for _ in range(3))
    same, x = SameInputs(), torch.ones(1, 4)
    with inputs_shown({"q": first, "o": second, "up": third}, same.note), torch.no_grad():
        second(first(x)) + third(x)
    assert same.first == {"q": "q", "o": "o", "up": "q"}


class Held:
    """A tensor that autograd keeps for the backward pass."""

    def __init__(self, tensor):
        self.tensor = tensor


def most_kept_for_backward(run):
    """The most bytes that autograd keeps at once in `run`, outside of what is computed again."""
    kept, most = WeakSet(), 0

    def keep(tensor):
        nonlocal most
        held = Held(tensor)
        kept.add(held)
        most = max(most, sum(each.tensor.nbytes for each in kept))
        return held

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda held: held.tensor):
        run()
    return most


def test_the_first_pass_keeps_the_inputs_of_layers_alone_where_these_are_computed_again():
    model = tiny_model(num_hidden_layers=8)
    trial, masks = whole_trial(model)
    plain = most_kept_for_backward(lambda: RowModel(trial, masks, RefineSettings()))
    with recomputing(model.model.layers, partial(recomputing_contexts, "highest")):
        again = most_kept_for_backward(lambda: RowModel(trial, masks, RefineSettings()))
    assert again < plain / 3


class TwoRanks(Ranks):
    """One of two processes on this machine; the other one gathers `other`."""

    count = local = 2

    def __init__(self, other):
        self.other = other

    def gather(self, values):
        return [*values, self.other]


def needed(linears, weight_bytes):
    """Bytes by hand: a Linear with an own input brings a float64 Gram matrix."""
    total = 0
    for name, linear in linears.items():
        rows, columns = linear.weight.shape
        total += weight_bytes * rows * columns
        if not name.endswith(SHARED):
            total += 8 * columns * columns
    return total


def groups(linears):
    model = tiny_model()
    same = SameInputs()
    with inputs_shown(blocks(model), same.note), torch.no_grad():
        model(tiny_windows(1))
    assert set(same.first) == set(linears)
    return same.first


def test_sums_wait_in_host_memory_where_a_device_has_no_room(monkeypatch):
    linears = {name: linear.to("meta") for name, linear in blocks(tiny_model()).items()}
    everything, sums = needed(linears, 15), needed(linears, 8)
    cases = [
        (None, None, None),
        (1.01 * everything / (1 - FOR_THE_PASS), 0, None),
        (0.99 * everything / (1 - FOR_THE_PASS), 1.01 * sums, torch.device("cpu")),
    ]
    for on_device, on_host, expected in cases:
        monkeypatch.setattr(
            place, "free_memory", lambda device=None, a=on_device, b=on_host: b if device is None else a
        )
        assert place_of_sums(linears, groups(linears), Ranks()) == expected


def test_a_host_without_room_is_told_before_the_work(monkeypatch):
    linears = blocks(tiny_model())
    everything = needed(linears, 15)
    monkeypatch.setattr(place, "free_memory", lambda device=None: 1.01 * everything)
    assert place_of_sums(linears, groups(linears), Ranks()) is None
    with pytest.raises(BarberError, match="for each of 2 processes, more than is free"):
        place_of_sums(linears, groups(linears), TwoRanks(other=0.0))
    monkeypatch.setattr(place, "free_memory", lambda device=None: 0.99 * everything)
    with pytest.raises(BarberError, match=r"take 0\.0 GB of host memory, more than is free"):
        place_of_sums(linears, groups(linears), Ranks())


def test_all_ranks_move_their_sums_where_one_must(monkeypatch):
    linears = {name: linear.to("meta") for name, linear in blocks(tiny_model()).items()}
    monkeypatch.setattr(place, "_check_host", lambda needed, ranks: None)
    monkeypatch.setattr(place, "free_memory", lambda device=None: 2**40)
    assert place_of_sums(linears, groups(linears), TwoRanks(other=0.0)) is None
    assert place_of_sums(linears, groups(linears), TwoRanks(other=1.0)) == torch.device("cpu")
