"""GGUF files: tensors one by one as transformers has them all at once, and pruned from the disk to the same bytes."""

import json

import pytest
import torch

from optimum_barber import BarberSparsifier
from optimum_barber.base.errors import BarberError
from optimum_barber.checkpoints.gguf import GgufWeights
from optimum_barber.cli import main
from optimum_barber.models.loading import load_model, resolve_model
from optimum_barber.prune.streaming.disk import DiskCheckpoint, DiskSource, model_without_weights
from optimum_barber.prune.streaming.fit import estimate

from .conftest import tiny_model, tiny_windows
from .gguf_files import write_gguf
from .test_streaming import QUICK, Stop, files, stopped, stream

KINDS = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1"]
FAMILIES = [("llama", {}), ("llama", {"tie_word_embeddings": True}), ("qwen2", {}), ("gemma2", {})]
WIDE = {"intermediate_size": 64, "head_dim": 8}  # rows of whole blocks of 32


def stored(tmp_path, family="llama", kind="Q8_0", **changes):
    """A tiny GGUF file by reference, and the model that it was made of."""
    model = tiny_model(family, **WIDE, **changes)
    (tmp_path / "model").mkdir()
    return resolve_model(str(write_gguf(tmp_path / "model" / "tiny.gguf", model, kind))), model


def opened(reference, dtype="float32"):
    weights = GgufWeights.open(reference)
    return weights, model_without_weights(reference, weights, dtype)


@pytest.mark.parametrize(("family", "changes"), FAMILIES, ids=str)
def test_float32_gives_back_the_very_weights(tmp_path, family, changes):
    reference, model = stored(tmp_path, family, "F32", **changes)
    weights, bare = opened(reference)
    state = model.state_dict()
    assert {*state} - {*weights.entries} == ({"lm_head.weight"} if model.config.tie_word_embeddings else set())
    for name in weights.entries:
        result = weights.tensor(name)
        assert result.dtype == torch.float32 and result.shape == weights.entries[name].shape
        if not name.endswith("norm.weight"):  # which go through plus one and minus one
            assert torch.equal(result, state[name]), name
        torch.testing.assert_close(result, state[name])
    assert bare.state_dict().keys() == state.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_block_is_what_transformers_makes_of_it(tmp_path, kind):
    reference, _ = stored(tmp_path, kind=kind)
    weights, _ = opened(reference)
    whole = load_model(reference, "float32").state_dict()
    for name in weights.entries:
        assert torch.equal(weights.tensor(name), whole[name]), name


@pytest.mark.parametrize("pieces", [1, 33, 1000])
def test_pieces_do_not_matter(tmp_path, monkeypatch, pieces):
    reference, _ = stored(tmp_path)
    weights, _ = opened(reference)
    expected = {name: weights.tensor(name) for name in weights.entries}
    monkeypatch.setattr("optimum_barber.checkpoints.gguf.AT_ONCE", pieces)
    assert all(torch.equal(weights.tensor(name), tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(("family", "changes"), FAMILIES, ids=str)
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_the_same_bytes_as_in_memory(tmp_path, family, changes, dtype):
    reference, _ = stored(tmp_path, family, **changes)
    config = QUICK.model_copy(update={"dtype": dtype})
    in_memory = BarberSparsifier(load_model(reference, dtype), None, reference)
    in_memory.sparsify(config, tiny_windows(6), save_dir=tmp_path / "memory", quiet=True)
    stream(BarberSparsifier(None, None, reference, dtype, "always"), tmp_path / "disk", config)
    assert files(tmp_path / "disk") == files(tmp_path / "memory")
    written = load_model(resolve_model(str(tmp_path / "disk")))
    assert written.dtype == (torch.float16 if dtype == "auto" else torch.bfloat16)


def test_a_stopped_run_goes_on_to_the_same_files(tmp_path):
    reference, _ = stored(tmp_path)
    stream(BarberSparsifier(None, None, reference, stream="always"), tmp_path / "whole")
    stopped(BarberSparsifier(None, None, reference, stream="always"), tmp_path / "out", 3, error=Stop)
    stream(BarberSparsifier(None, None, reference, stream="always"), tmp_path / "out", resume=True)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_only_one_layer_ever_has_weights(tmp_path):
    reference, _ = stored(tmp_path)
    checkpoint = DiskCheckpoint.open(reference)
    bare, source = checkpoint.model, DiskSource(checkpoint, torch.device("cpu"))
    list(source.begin(tiny_windows(2)))
    for layer in source.layers():
        held = [name for name, parameter in bare.named_parameters() if not parameter.is_meta]
        assert held and all(name.startswith(layer.name + ".") for name in held)
    assert all(parameter.is_meta for parameter in bare.parameters())


def test_prune_streams_it_and_says_what_it_will_take(tmp_path, tokenizer, capsys, monkeypatch):
    reference, _ = stored(tmp_path)
    monkeypatch.setattr("optimum_barber.prune.sparsifier.load_tokenizer", lambda _: tokenizer)
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and looked at the dog " * 80, encoding="utf-8")
    command = ["prune", str(reference.path), "--sparsity", "0.5", "--calibration", str(text)]
    command += ["--samples", "4", "--sequence-length", "16"]
    assert main([*command, "--dry-run", "-o", str(tmp_path / "out")]) == 0
    page = capsys.readouterr().out
    assert "it fits" in page and "activations in memory" in page
    assert main([*command, "--stream", "always", "-o", str(tmp_path / "out"), "--quiet"]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert report["sparsity"] == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize(("dtype", "each"), [("float32", 4), ("auto", 4 + 2)])
def test_the_embedding_is_counted_since_it_is_made_in_memory(tmp_path, dtype, each):
    reference, _ = stored(tmp_path)
    assert estimate(DiskCheckpoint.open(reference, dtype), 4, 16).largest_outer_tensor == each * 300 * 32


def test_a_truncated_or_foreign_file_is_named(tmp_path, capsys):
    reference, _ = stored(tmp_path)
    content = reference.path.read_bytes()
    for damaged in (content[:-100], content[:2000], b"GG", b"PK" + content[2:], b""):
        reference.path.write_bytes(damaged)
        assert main(["prune", str(reference.path), "-o", str(tmp_path / "out")]) == 2
        told = capsys.readouterr().err
        assert "tiny.gguf is truncated, damaged or no GGUF file" in told and told.count("\n") == 1
        assert not (tmp_path / "out").exists()


def test_a_shape_that_is_not_the_configurations_is_refused(tmp_path):
    reference, _ = stored(tmp_path)
    model = tiny_model("llama", **WIDE)
    model.config.intermediate_size = 96
    write_gguf(reference.path, model)
    with pytest.raises(BarberError, match=r"down_proj.weight has shape \(32, 64\), its config says \(32, 96\)"):
        BarberSparsifier(None, None, reference, stream="always")


@pytest.mark.parametrize("architecture", ["qwen2moe", "gpt2", "lfm2"])
def test_tensors_that_are_not_made_one_of_one_need_the_whole_model(tmp_path, monkeypatch, architecture):
    reference, _ = stored(tmp_path)
    from transformers import modeling_gguf_pytorch_utils as theirs

    monkeypatch.setitem(theirs.TENSOR_PROCESSORS, "llama", theirs.TENSOR_PROCESSORS[architecture])
    assert "in a way of its own" in DiskCheckpoint.open(reference).obstacle
    with pytest.raises(
        BarberError, match="--stream always needs streaming, which is not to be had for .*: transformers"
    ):
        BarberSparsifier(None, None, reference, stream="always")
    with pytest.raises(BarberError, match="--resume needs streaming, which is not to be had for .*: transf"):
        BarberSparsifier(None, None, reference).sparsify(QUICK, tiny_windows(), tmp_path / "out", resume=True)
