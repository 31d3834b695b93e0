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
from optimum_barber.prune.refine.place import Needs, place_of_sums
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
    assert same.first() == {name: name for name in linears}
    chain(torch.ones(1, 4))
    assert len(alive) == 5  # the hooks are gone


def test_an_input_is_known_again_after_others():
    """Of a parallel block, whose MLP gets what its attention got."""
    first, second, third = (nn.Linear(4, 4, bias=False) for _ in range(3))
    same, x = SameInputs(), torch.ones(1, 4)
    with inputs_shown({"q": first, "o": second, "up": third}, same.note), torch.no_grad():
        second(first(x)) + third(x)
    assert same.first() == {"q": "q", "o": "o", "up": "q"}


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


def test_needs_count_every_weight_and_each_input_once():
    model, same = tiny_model(), SameInputs()
    linears = blocks(model)
    with inputs_shown(linears, same.note), torch.no_grad():
        model(tiny_windows(1))
    weights, entries, widest = 0, 0, 0
    for name, linear in linears.items():
        rows, columns = linear.weight.shape
        weights += rows * columns
        widest = max(widest, columns * columns)
        if not name.endswith(SHARED):
            entries += columns * columns
    assert Needs.of(linears, same.first(), 7) == Needs(8 * weights + 4 * (entries + widest), 9 * weights, 7)


META, CPU = torch.device("meta"), torch.device("cpu")
NEEDS = Needs(sums=800, work=150, outputs=50)


def with_free(monkeypatch, on_device, on_host):
    told = {META: on_device, CPU: on_host}
    monkeypatch.setattr(place, "free_memory", lambda device: told[device])


def test_sums_wait_in_host_memory_where_a_device_has_no_room(monkeypatch):
    for on_device, on_host, expected in ((None, 0, None), (1251, 0, None), (1249, 1001, CPU), (251, 1001, CPU)):
        with_free(monkeypatch, on_device, on_host)
        assert place_of_sums(NEEDS, META, Ranks()) == expected
    with_free(monkeypatch, 0, 1251)
    assert place_of_sums(NEEDS, CPU, Ranks()) is None


@pytest.mark.parametrize(
    ("device", "on_device", "on_host", "ranks", "said"),
    [
        (CPU, None, 1249, Ranks(), "takes 0.0 MiB of the memory of cpu"),
        (CPU, None, 1251, TwoRanks(0.0), "or fewer processes on it"),
        (META, 249, 10**9, Ranks(), "of the memory of meta"),
        (META, 251, 999, Ranks(), "of the memory of cpu"),
        (CPU, None, None, TwoRanks(1.0), "and less is left for it"),
    ],
)
def test_memory_that_is_short_is_told(device, on_device, on_host, ranks, said, monkeypatch):
    with_free(monkeypatch, on_device, on_host)
    with pytest.raises(BarberError, match=said):
        place_of_sums(NEEDS, device, ranks)


def test_memory_that_is_short_is_told_before_the_dense_pass(monkeypatch):
    monkeypatch.setattr(place, "free_memory", lambda device: 0)
    model, calls = tiny_model(), []
    model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(BarberError, match="refine takes"):
        trial_of(model, blocks(model), tiny_windows(12), SparsityPattern(0.5))
    assert len(calls) == 2


def test_all_ranks_move_their_sums_where_one_must(monkeypatch):
    with_free(monkeypatch, 2**40, None)
    assert place_of_sums(NEEDS, META, TwoRanks(other=0.0)) is None
    monkeypatch.setattr(place, "_check", lambda device, needed, ranks: None)
    assert place_of_sums(NEEDS, META, TwoRanks(other=1.0)) == CPU


def calls(*pairs):
    """What is noted of Linears called with these tensors, one after the other."""
    same = SameInputs()
    for name, x in pairs:
        same.note(name, x)
    return same


def test_inputs_that_are_shared_in_some_calls_alone_are_refused():
    one, two = torch.ones(2), torch.ones(2)
    assert calls(("a", one), ("b", one), ("a", two), ("b", two)).first() == {"a": "a", "b": "a"}
    for partly in (
        [("a", one), ("b", one), ("a", two)],
        [("a", one), ("b", one), ("a", two), ("b", two.clone())],
    ):
        with pytest.raises(BarberError, match="b shares its input with a in some calls only"):
            calls(*partly).first()


def test_a_tensor_that_was_written_to_is_another_input():
    x, same = torch.ones(2), SameInputs()
    assert same.note("a", x) and not same.note("b", x)
    x.add_(1)
    assert same.note("c", x) and not same.note("d", x)
    assert same.first() == {"a": "a", "b": "a", "c": "c", "d": "c"}
