"""Samples on their way to the device: how many are there at once, and what happens when they are too many."""

import logging
from dataclasses import replace

import pytest
import torch

from optimum_barber import BarberConfig, BarberSparsifier
from optimum_barber.base.errors import UnfinishedError
from optimum_barber.models import activations as activations_module
from optimum_barber.models.activations import Activations, Transfer, retry_with_fewer_samples
from optimum_barber.models.loading import resolve_model
from optimum_barber.prune.cost.needs import with_batch_size

from .conftest import tiny_model, tiny_windows
from .test_preflight import NEEDS

CONFIG = BarberConfig(sparsity=0.5, rebuild="barber+swaps+gauss-newton", reconstruct="gradient")


class Device:
    """A block's forward with room for so many samples at once: more end as they do on a GPU."""

    def __init__(self, monkeypatch, room):
        self.room, self.failures = room, 0
        original = Activations.__iter__

        def iterate(samples):
            for number, sample in enumerate(original(samples)):
                if number == 2 and samples.together > self.room:
                    self.failures += 1
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nand more")
                yield sample

        monkeypatch.setattr(Activations, "__iter__", iterate)


def pruned(config=CONFIG, **changes):
    """Masks and weights of a run over eight windows."""
    model = tiny_model()
    result = BarberSparsifier(model).sparsify(config.model_copy(update=changes), tiny_windows(8), quiet=True)
    return {name: mask.unpack() for name, mask in result.masks.items()}, model.state_dict(), result.reports


@pytest.mark.parametrize("batch_size", [None, 1, 3, 7, 99])
def test_no_more_samples_are_on_the_device_than_were_asked_for(monkeypatch, batch_size):
    started, arrived, most = 0, 0, 0

    class Counted(Transfer):
        def __init__(self, sample, device):
            nonlocal started
            started += 1
            super().__init__(sample, device)

    monkeypatch.setattr(activations_module, "Transfer", Counted)
    samples = [torch.full((2,), float(s)) for s in range(7)]
    for expected, result in zip(samples, Activations(samples, batch_size), strict=True):
        most = max(most, started - arrived)  # on the device or on their way, while this one is worked on
        arrived += 1
        assert torch.equal(expected, result)
    assert most == min(batch_size or 7, 7)


def test_a_run_whose_samples_do_not_fit_goes_on_with_fewer(monkeypatch, caplog):
    masks, weights, reports = pruned()
    device = Device(monkeypatch, room=2)
    with caplog.at_level(logging.WARNING):
        again, others, retold = pruned()
    assert device.failures == 2  # from 8 to 4 to 2, and never again
    assert [r.getMessage() for r in caplog.records if "out of memory" in r.getMessage()] == [
        "model.layers.0.attention: out of memory with 8 of the samples there; now 4",
        "model.layers.0.attention: out of memory with 4 of the samples there; now 2",
    ]
    assert all(torch.equal(masks[name], again[name]) for name in masks)
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert [r.error_after for r in reports] == [r.error_after for r in retold]


def test_memory_that_runs_out_later_changes_no_mask_either(monkeypatch):
    masks, weights, reports = pruned()
    device = Device(monkeypatch, room=99)
    told = []

    def smaller(report):
        told.append(report.block)
        device.room = 3  # the second block finds less

    model = tiny_model()
    result = BarberSparsifier(model).sparsify(CONFIG, tiny_windows(8), callbacks=[smaller], quiet=True)
    assert device.failures == 2
    assert told == [report.block for report in reports]
    assert all(torch.equal(masks[name], result.masks[name].unpack()) for name in masks)
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())


def test_one_sample_that_is_too_many_ends_the_run_with_one_line(monkeypatch):
    Device(monkeypatch, room=0)
    with pytest.raises(UnfinishedError, match=r"layers.0.attention: out of memory with 1 of the .* 2\.00 GiB\.$"):
        pruned()


def test_what_is_done_stays_when_the_device_has_no_room_for_one_sample(monkeypatch, tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    config = BarberConfig(sparsity=0.5, rebuild="swaps", batch_size=2)

    def run(name, **options):
        made = BarberSparsifier(None, None, resolve_model(str(tmp_path / "model")), stream="always")
        return made.sparsify(config, tiny_windows(8), save_dir=tmp_path / name, quiet=True, **options)

    expected = run("undisturbed")
    with monkeypatch.context() as patched, pytest.raises(UnfinishedError, match="layers.1.mlp: out of memory"):
        device = Device(patched, room=99)

        def fill(report):
            device.room = 0 if report.block.endswith("1.attention") else 99

        run("out", callbacks=[fill])
    result = run("out", resume=True)
    assert all(torch.equal(expected.masks[name].unpack(), result.masks[name].unpack()) for name in expected.masks)


def test_a_rank_does_not_go_back_while_others_wait():
    def work():
        raise torch.OutOfMemoryError("none left")

    held = Activations([torch.zeros(1)] * 4)
    with pytest.raises(UnfinishedError, match="block: out of memory with 4 of .* give a smaller --batch-size"):
        retry_with_fewer_samples("block", work, [held], alone=False)
    assert held.together == 4


def test_the_batch_is_as_large_as_the_device_has_room_for():
    on = replace(NEEDS, device=True)
    sample = on.device_memory - on.layer_work  # of all windows
    assert with_batch_size(on, None) is on
    assert with_batch_size(on, on.device_memory) is on
    result = with_batch_size(on, on.device_memory - 1)
    assert result.batch_size == on.windows_per_rank - 1
    assert result.device_memory <= on.device_memory - 1
    assert result.memory > on.memory
    assert with_batch_size(on, on.layer_work + sample // on.windows_per_rank).batch_size == 1
    assert with_batch_size(on, on.layer_work).batch_size is None  # refused where everything is checked
    assert with_batch_size(replace(on, batch_size=2), 0).batch_size == 2
