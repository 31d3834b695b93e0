"""Safetensors files as the disk sees them: the bytes of safetensors' own writer, and every damage named."""

import json
import os
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from optimum_barber.base.errors import BarberError
from optimum_barber.checkpoints.safetensors import SafetensorsWeights
from optimum_barber.checkpoints.shards import DTYPES, Entry, TensorFile, read_header, write_tensors
from optimum_barber.models.activations import Activations

from .conftest import tiny_model

SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
ENTRIES = st.dictionaries(st.text('aé."\\0', min_size=1), st.tuples(st.sampled_from(list(DTYPES.values())), SHAPES))


@given(ENTRIES.filter(bool), st.randoms(use_true_random=False))
def test_the_bytes_are_those_of_safetensors_whatever_the_order(tmp_path_factory, entries, shuffler):
    folder = tmp_path_factory.mktemp("files")
    tensors = {n: (torch.rand(shape) * 9).to(dtype) for n, (dtype, shape) in entries.items()}
    save_file(tensors, folder / "theirs", {"format": "pt"})
    file = TensorFile(
        folder / "ours", {n: Entry(t.dtype, tuple(t.shape)) for n, t in tensors.items()}, {"format": "pt"}
    )
    names = list(tensors)
    shuffler.shuffle(names)
    for name in names:
        file.write(name, tensors[name])
    file.close()
    assert (folder / "ours").read_bytes() == (folder / "theirs").read_bytes()
    header = read_header(folder / "ours")
    assert {n: (e.dtype, e.shape) for n, e in header.entries.items()} == entries
    assert header.metadata == {"format": "pt"}


def test_a_tensor_is_converted_and_written_anew(tmp_path, monkeypatch):
    monkeypatch.setattr("optimum_barber.checkpoints.shards.CHUNK", 7)
    weight, entries = torch.randn(5, 9), {"a": Entry(torch.bfloat16, (5, 9)), "b": Entry(torch.float32, (2,))}
    for value in (weight + 1, weight):
        file = TensorFile(tmp_path / "x", entries)
        file.write("a", value)
        file.close()
    assert torch.equal(load_file(tmp_path / "x")["a"], weight.bfloat16())
    assert torch.equal(load_file(tmp_path / "x")["b"], torch.zeros(2))


def test_a_system_without_reservation_still_writes(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    write_tensors(tmp_path / "x", {"a": torch.arange(3)}, {})
    assert load_file(tmp_path / "x")["a"].tolist() == [0, 1, 2]


def edited(change):
    """A damage: a change of the header's JSON."""

    def damage(path):
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        text = json.dumps(change(json.loads(raw[8 : 8 + length]))).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])

    return damage


NORM = "model.norm.weight"
DAMAGES = [
    (lambda path: path.write_bytes(path.read_bytes()[:-1]), "is truncated or damaged"),
    (lambda path: path.write_bytes(path.read_bytes()[:100]), "is truncated or no safetensors file: 100 bytes"),
    (lambda path: path.write_bytes(b""), "is truncated or no safetensors file: 0 bytes"),
    (lambda path: path.write_bytes(path.read_bytes() + b"x"), "is truncated or damaged"),
    (lambda path: path.write_bytes(path.read_bytes()[:8] + b"?" + path.read_bytes()[9:]), "has a broken header"),
    (lambda path: path.unlink(), "is missing"),
    (edited(lambda h: {**h, NORM: {**h[NORM], "dtype": "X9"}}), "in the dtype 'X9': known are U64"),
    (edited(lambda h: {**h, NORM: {**h[NORM], "shape": [31]}}), "broken header: model.norm.weight does not lie where"),
    (
        edited(lambda h: {k: v for k, v in h.items() if k != NORM}),
        "does not lie where|truncated or damaged|lacks model",
    ),
    (edited(lambda h: []), "has a broken header"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=[str(i) for i in range(len(DAMAGES))])
def test_a_damaged_shard_is_named_before_any_weight_is_read(tmp_path, damage, message):
    tiny_model().save_pretrained(tmp_path / "m", max_shard_size="20KB")
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    shard = tmp_path / "m" / index["weight_map"][NORM]
    damage(shard)
    with pytest.raises(BarberError, match=message) as error:
        SafetensorsWeights.open(tmp_path / "m")
    assert shard.name in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda index: index["weight_map"].update({"extra": index["weight_map"][NORM]}),
            "lacks extra, which the index",
        ),
        (lambda index: index["weight_map"].update({"extra": "../x.safetensors"}), "names files outside"),
        (lambda index: index.pop("weight_map"), "is no index: weight_map"),
    ],
)
def test_a_wrong_index_is_named(tmp_path, change, message):
    tiny_model().save_pretrained(tmp_path / "m", max_shard_size="20KB")
    path = tmp_path / "m" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    with pytest.raises(BarberError, match=message):
        SafetensorsWeights.open(tmp_path / "m")


def test_a_single_file_counts_before_an_index_as_in_transformers(tmp_path):
    tiny_model(seed=1).save_pretrained(tmp_path / "m", max_shard_size="20KB")
    tiny_model(seed=2).save_pretrained(tmp_path / "one")
    shutil.copy(tmp_path / "one" / "model.safetensors", tmp_path / "m")
    assert (tmp_path / "m" / "model.safetensors.index.json").is_file()
    weights = SafetensorsWeights.open(tmp_path / "m")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert weights.layout.index is None
    for name, tensor in tiny_model(seed=2).named_parameters():
        assert torch.equal(weights.tensor(name), tensor)
        assert torch.equal(loaded.get_parameter(name), tensor)


def test_a_folder_without_safetensors_files_is_named(tmp_path):
    tiny_model().config.save_pretrained(tmp_path)
    with pytest.raises(BarberError, match="has no safetensors files in"):
        SafetensorsWeights.open(tmp_path)


@pytest.mark.parametrize("batch_size", [None, 2])
def test_activations_on_the_disk_are_those_in_memory(tmp_path, batch_size):
    samples = [torch.randn(1, 5, 3) for _ in range(7)]
    held = Activations(iter(samples), batch_size, tmp_path)
    assert all(sample.data_ptr() % 64 == 0 for sample in held)
    assert list(tmp_path.iterdir()) == []
    for kept in (held, held.like(held)):
        assert all(torch.equal(one, other) for one, other in zip(kept, samples, strict=True))
    assert [x.tolist() for x in held.every(3)] == [x.tolist() for x in samples[::3]]
    assert list(Activations((), batch_size, tmp_path)) == []
