"""Keys and values that layers share: from disk, resumed and by several ranks, the bits of a run in memory."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from optimum_barber import BarberConfig, BarberSparsifier
from optimum_barber.models.loading import resolve_model

from . import ranks
from .conftest import tiny_windows
from .test_architectures import UNUSUAL
from .test_streaming import files, in_memory, opened, stopped, stream, tensors

KINDS = [kind for kind in UNUSUAL if kind.startswith("shared")]


def stored(tmp_path, kind):
    UNUSUAL[kind]().to(torch.bfloat16).save_pretrained(tmp_path / "model")
    return opened(tmp_path / "model")


@pytest.mark.parametrize("place", ["memory", "disk"])
@pytest.mark.parametrize("kind", KINDS)
def test_from_disk_and_resumed_as_in_memory(tmp_path, kind, place):
    streaming = stored(tmp_path, kind)
    in_memory(tmp_path)
    blocks = len(stream(streaming, tmp_path / "whole", activations=place).reports)
    assert files(tmp_path / "whole") == files(tmp_path / "memory")
    stopped(streaming, tmp_path / "out", blocks * 3 // 4 + 1, activations=place)  # in the last layer, which reads
    stream(streaming, tmp_path / "out", resume=True, activations=place)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_of_all_windows_the_same(tmp_path):
    stored(tmp_path, KINDS[0])
    windows = tiny_windows(1).expand(3, -1)
    masks = []
    for samples in (windows, windows[:1]):
        sparsifier = BarberSparsifier(None, None, resolve_model(str(tmp_path / "model")), stream="never")
        masks.append(sparsifier.sparsify(BarberConfig(sparsity=0.5), samples, quiet=True).masks)
    assert all(torch.equal(mask.unpack(), masks[1][name].unpack()) for name, mask in masks[0].items())


def test_several_ranks_send_what_layers_share(tmp_path):
    stored(tmp_path, KINDS[0])
    settings, windows = {"sparsity": 0.5, "rebuild": {"rounds": 1}}, tiny_windows(5)
    run = (ranks.stream, tmp_path, tmp_path / "model", settings, windows)
    assert ranks.start(2, *run, "whole") == [0, 0]
    assert ranks.notes(tmp_path)[0] == ranks.notes(tmp_path)[1]
    assert ranks.start(2, *run, "out", (1, 13)) == [1, -9]
    ranks.stream(0, *run[1:], "out", resume=True)
    ours, theirs = tensors(tmp_path / "out"), tensors(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_output_loads_as_it_was_pruned(tmp_path):
    stream(stored(tmp_path, KINDS[1]), tmp_path / "out", BarberConfig(pattern="2:4", producer="sparsegpt"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    for name, tensor in tensors(tmp_path / "out").items():
        assert name.endswith("lm_head.weight") or torch.equal(loaded.state_dict()[name], tensor)
