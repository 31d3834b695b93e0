"""What a run takes is known before it starts, and a machine that has too little says so with what would fit."""

from dataclasses import replace

import pytest

from optimum_barber.base.errors import BarberError
from optimum_barber.cli import main
from optimum_barber.models.source import ModelSource
from optimum_barber.prune.cost.needs import (
    GIB,
    INTERPRETER,
    Needs,
    check_fit,
    needs_of,
    spelled,
    with_place,
)
from optimum_barber.tensors.input_statistics import InputRecorder
from optimum_barber.tensors.masks import PackedMask

from .conftest import tiny_model, tiny_windows

NEEDS = Needs(layer=2 * GIB, gram=0, window=GIB, window_outputs=0, windows=4, checkpoint=10 * GIB)


def test_the_sizes_of_a_run_are_those_of_its_tensors():
    source = ModelSource(tiny_model())
    windows = tiny_windows(samples=8, length=16)
    needs = needs_of(source, 32, 8, 16, 1000, grams=1)
    hidden = list(source.begin(windows))
    outputs, grams, closing, bits = [], [], [], 0
    for layer in source.layers():
        assert needs.layer == sum(p.numel() * p.element_size() for p in layer.module.parameters())
        streams = []
        for block in layer.blocks:
            block_input = layer.input_of(block, hidden[0], streams)
            seen = []
            for linear in block.linears.values():
                linear.register_forward_hook(lambda _, args, output, seen=seen: seen.append((args[0], output)))
            with InputRecorder(block.linears, frozenset(["gram"])) as recorder:
                streams.append(block(block_input))
            outputs.append(sum(output.nbytes for _, output in seen))
            closing.append(seen[-1][0].nbytes)  # the Linear that runs last closes its block
            distinct = {id(statistics.gram): statistics.gram for statistics in recorder.result().values()}
            grams.append(sum(gram.nbytes for gram in distinct.values()))
            bits += sum(PackedMask.pack(linear.weight > 0).bits.nbytes for linear in block.linears.values())
    assert needs.window == hidden[0].nbytes and needs.windows == 8
    assert needs.window_outputs == max(outputs)
    assert needs.window_closing_inputs == max(closing)
    assert needs.gram == max(grams)
    assert needs.checkpoint == 1000 + 2 * bits
    assert needs_of(source, 32, 8, 16, 1000, grams=2).gram == 2 * needs.gram


def test_on_a_device_the_activations_of_a_batch_lie_there():
    on = replace(NEEDS, device=True)
    assert NEEDS.device_memory == 0
    assert on.device_memory == (4 * 2 + 5 * 4) * GIB
    assert replace(on, batch_size=1).device_memory == (4 * 2 + 5) * GIB
    assert on.memory == INTERPRETER + 2 * GIB
    assert replace(on, batch_size=1).memory == INTERPRETER + (2 + 5 * 4) * GIB


def test_what_lies_around_the_layers_counts_where_it_is_larger_than_their_work():
    assert replace(NEEDS, largest_outer_tensor=8 * GIB).memory == NEEDS.memory
    assert replace(NEEDS, largest_outer_tensor=9 * GIB).memory == NEEDS.memory + GIB
    assert replace(NEEDS, largest_outer_tensor=9 * GIB, device=True).memory == INTERPRETER + 9 * GIB


@pytest.mark.parametrize(
    ("memory", "disk", "message"),
    [
        (28, 99, "memory: the run takes 28.34 GiB, 28.00 GiB are left; --activations disk would fit"),
        (28, 20, "--samples 2 would fit"),
        (5, 99, "memory: .* no setting would fit"),
        (None, 17, "disk: the run takes 18.00 GiB, 17.00 GiB are left; --samples 2 would fit"),
        (99, 1, "disk: .* no setting would fit"),
    ],
)
def test_too_little_is_told_with_what_would_fit(memory, disk, message):
    with pytest.raises(BarberError, match=message):
        check_fit(NEEDS, memory and memory * GIB, None, disk * GIB)


def test_too_little_device_memory():
    on = replace(NEEDS, device=True)
    with pytest.raises(BarberError, match="device memory: .* --batch-size 1 would fit"):
        check_fit(on, 99 * GIB, 20 * GIB, 99 * GIB)
    check_fit(on, 99 * GIB, 28 * GIB, 99 * GIB)


def test_activations_go_to_the_disk_where_memory_is_short():
    assert with_place(NEEDS, "auto", 20 * GIB).place == "disk"
    assert with_place(NEEDS, "auto", 30 * GIB).place == with_place(NEEDS, "auto", None).place == "memory"
    assert with_place(NEEDS, "memory", 20 * GIB).place == "memory"
    with pytest.raises(BarberError, match="activations 'tape' is not legal: auto, memory, disk"):
        with_place(NEEDS, "tape", None)


QUICK = ["--sparsity", "0.5", "--calibration", "pydoc", "--samples", "4", "--sequence-length", "16", "--quiet"]


def test_a_dry_run_says_what_it_takes_and_writes_nothing(model_dir, tmp_path, capsys):
    command = ["prune", str(model_dir), "-o", str(tmp_path / "out"), *QUICK, "--dry-run"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "4 windows of 16 tokens of pydoc" in said and "it fits" in said and "activations in memory" in said
    assert "\ntime          a few seconds" in said
    assert main([*command, "--activations", "disk"]) == 0
    assert "activations in disk" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_cannot_fit_does_not_start(model_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("optimum_barber.prune.streaming.fit.free_disk", lambda _: 1000)
    assert main(["prune", str(model_dir), "-o", str(tmp_path / "out"), *QUICK]) == 2
    assert "disk: the run takes" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flags", [["--resume"], ["--dry-run"], ["--activations", "disk"]])
def test_what_needs_streaming_is_refused_without_it(model_dir, tmp_path, capsys, flags):
    assert main(["prune", str(model_dir), "-o", str(tmp_path / "out"), *QUICK, "--stream", "never", *flags]) == 2
    assert f"{' '.join(flags)} needs streaming, which is not to be had for" in capsys.readouterr().err


def test_inspect_predicts_streaming(model_dir, capsys):
    assert main(["inspect", str(model_dir), "--samples", "1"]) == 0
    said = capsys.readouterr().out
    assert "streaming     0.34 GiB of memory in all" in said and "\ndisk          " in said


def test_small_sizes_are_told_apart():
    spelled_out = [spelled(size) for size in (0, 11 * 2**20, 13 * 2**20, GIB // 4, 5 * GIB // 2)]
    assert spelled_out == ["0.0 MiB", "11.0 MiB", "13.0 MiB", "0.25 GiB", "2.50 GiB"]
