"""What a run leaves: loads anywhere, holds its own record, is never half-written."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_barber.base import output as output_module
from optimum_barber.base.errors import BarberError
from optimum_barber.base.output import check_output, discard, staged
from optimum_barber.checkpoints.record import MaskFile, write_masks
from optimum_barber.checkpoints.verify import verify_checkpoint
from optimum_barber.prune.settings import BarberConfig
from optimum_barber.prune.sparsifier import BarberSparsifier
from optimum_barber.tensors.masks import PackedMask

from .conftest import FAMILIES, tiny_model, tiny_windows


@pytest.fixture
def pruned(tmp_path, model_dir):
    """A pruned tiny checkpoint: its directory, the model in memory and the result."""
    sparsifier = BarberSparsifier.from_pretrained(model_dir)
    config = BarberConfig(pattern="2:4", rebuild={"rounds": 1})
    result = sparsifier.sparsify(config, calibration=tiny_windows(), save_dir=tmp_path / "out", quiet=True)
    return tmp_path / "out", sparsifier.model, result


def test_the_directory_holds_everything(pruned):
    directory, _, result = pruned
    names = {path.name for path in directory.iterdir()}
    assert names >= {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "sparsity_masks.safetensors",
        "sparsity_config.json", "report.json", "barber_config.json",
    }  # fmt: skip
    assert not list(directory.parent.glob("*.partial"))
    short = json.loads((directory / "config.json").read_text())["sparsity_config"]
    assert (short["pattern"], short["sparsity"], short["masks_file"]) == ("2:4", 0.5, "sparsity_masks.safetensors")
    record = json.loads((directory / "sparsity_config.json").read_text())
    assert record["modules"].keys() == result.masks.keys()
    report = json.loads((directory / "report.json").read_text())
    assert [block["block"] for block in report["blocks"]][:2] == ["model.layers.0.attention", "model.layers.0.mlp"]
    assert report["swaps"] == sum(block["swaps"] for block in report["blocks"]) > 0


def test_the_mask_file_is_plain_safetensors(pruned):
    directory, _, result = pruned
    bits = load_file(directory / "sparsity_masks.safetensors")
    assert all(torch.equal(bits[name], mask.bits) for name, mask in result.masks.items())
    opened = MaskFile(directory / "sparsity_masks.safetensors")
    assert {name: opened[name].sha256 for name in opened} == {n: m.sha256 for n, m in result.masks.items()}
    assert opened.pattern == "2:4"


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_alone_gives_the_same_logits(tmp_path, family):
    model = tiny_model(family)
    config = BarberConfig(sparsity=0.5, rebuild={"rounds": 1})
    BarberSparsifier(model).sparsify(config, tiny_windows(), tmp_path / "out", quiet=True)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation=model.config._attn_implementation
    )
    with torch.no_grad():
        assert torch.equal(loaded(tiny_windows()).logits, model(tiny_windows()).logits)


def test_a_process_without_this_package_gives_the_same_logits(pruned, tmp_path):
    directory, model, _ = pruned
    script = (
        "import sys, torch\n"
        "sys.modules['optimum_barber'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        "torch.set_num_threads(1)\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "torch.save(model(torch.arange(3, 19)[None]).logits, sys.argv[2])\n"
    )
    subprocess.run([sys.executable, "-c", script, directory, tmp_path / "logits.pt"], check=True, capture_output=True)
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits.pt"), model(torch.arange(3, 19)[None]).logits)


def test_the_tokenizer_comes_along(pruned, tokenizer):
    assert AutoTokenizer.from_pretrained(pruned[0])("some text").input_ids == tokenizer("some text").input_ids


def test_shards_and_dtype_are_the_originals(tmp_path, tokenizer):
    source = tmp_path / "sharded"
    tiny_model().to(torch.bfloat16).save_pretrained(source, max_shard_size="20KB")
    tokenizer.save_pretrained(source)
    sparsifier = BarberSparsifier.from_pretrained(source)
    sparsifier.sparsify(BarberConfig(sparsity=0.5, rebuild="none"), tiny_windows(), tmp_path / "out", quiet=True)
    before, after = (sorted(path.glob("*.safetensors")) for path in (source, tmp_path / "out"))
    assert len(before) > 2
    assert abs(len(after) - 1 - len(before)) <= 1
    assert {t.dtype for path in after if "masks" not in path.name for t in load_file(path).values()} == {torch.bfloat16}
    assert verify_checkpoint(tmp_path / "out").faults == []


def damage(directory, change):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def test_verify_finds_a_lost_zero(pruned):
    directory, _, result = pruned
    assert verify_checkpoint(directory).faults == []
    name = "model.layers.1.mlp.up_proj"
    place = (~result.masks[name].unpack()).nonzero()[0]

    def fill(tensors):
        tensors[f"{name}.weight"][tuple(place)] = 1

    damage(directory, fill)
    outcome = verify_checkpoint(directory)
    assert len(outcome.faults) == 1
    assert outcome.faults[0].startswith(f"{name}: 1 of ")
    assert outcome.pruned - outcome.zeros == 1


def test_verify_finds_an_altered_mask_and_a_missing_module(pruned):
    directory, _, result = pruned
    masks = dict(result.masks)
    first, second = list(masks)[:2]
    masks[first] = PackedMask(masks[first].bits ^ 1, masks[first].shape)
    del masks[second]
    write_masks(directory / "sparsity_masks.safetensors", masks, "2:4")
    faults = verify_checkpoint(directory).faults
    assert f"{first}: the mask's hash differs" in faults[0]
    assert f"no module {second}" in faults[1]


def test_a_broken_hash_is_refused(tmp_path, monkeypatch):
    mask = PackedMask.pack(torch.ones(2, 8, dtype=torch.bool))
    monkeypatch.setattr(PackedMask, "sha256", "0" * 64)
    write_masks(tmp_path / "m.safetensors", {"up": mask}, "unstructured")
    monkeypatch.undo()
    with pytest.raises(BarberError, match="the hash of up does not match"):
        MaskFile(tmp_path / "m.safetensors")["up"]


def test_files_that_are_no_mask_files_are_refused(tmp_path):
    (tmp_path / "a").write_text("no")
    save_file({"x": torch.ones(1)}, tmp_path / "b")
    for name, message in [("a", "no safetensors file"), ("b", "is not of the format"), ("c", "does not exist")]:
        with pytest.raises(BarberError, match=message):
            MaskFile(tmp_path / name)


def test_staging_replaces_at_the_end_and_cleans_up(tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "old").write_text("old")
    with pytest.raises(RuntimeError), staged(output) as partial:
        (partial / "new").write_text("half")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in output.iterdir()] == ["old"]
    with staged(output) as partial:
        (partial / "new").write_text("whole")
        assert [path.name for path in output.iterdir()] == ["old"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in output.iterdir()] == ["new"]


def test_staging_works_without_an_atomic_exchange(tmp_path, monkeypatch):
    monkeypatch.setattr(output_module, "_exchange", lambda *_: False)
    test_staging_replaces_at_the_end_and_cleans_up(tmp_path)


def test_a_strangers_partial_directory_is_left_alone(tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "precious").touch()
    with pytest.raises(BarberError, match="not ours"), staged(tmp_path / "out"):
        pass
    assert (tmp_path / "out.partial" / "precious").exists()


def test_what_a_kill_leaves_at_once_is_taken_over(tmp_path):
    (tmp_path / "out.partial").mkdir()  # killed before the mark
    with staged(tmp_path / "out") as partial:
        (partial / "new").touch()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"]


def test_an_interrupt_before_the_mark_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(path):
        raise KeyboardInterrupt

    monkeypatch.setattr("pathlib.Path.touch", interrupted)
    with pytest.raises(KeyboardInterrupt), staged(tmp_path / "new" / "out"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_run_that_was_faster_keeps_its_partial_directory(tmp_path, monkeypatch):
    def meanwhile(partial):
        partial.mkdir()
        (partial / output_module.PARTIAL_MARK).touch()

    monkeypatch.setattr(output_module, "discard", meanwhile)
    with pytest.raises(BarberError, match="cannot be written: File exists"), staged(tmp_path / "out"):
        pass
    monkeypatch.undo()
    assert (tmp_path / "out.partial" / output_module.PARTIAL_MARK).exists()


def test_a_partial_directory_goes_with_its_mark_last(tmp_path, monkeypatch):
    with staged(tmp_path / "out") as partial:
        (partial / "file").touch()
        (partial / "folder").mkdir()
        removed = output_module.shutil.rmtree

        def watched(path, **kwargs):
            actual = sorted(inside.name for inside in partial.iterdir())
            assert actual == [output_module.PARTIAL_MARK] if path == partial else output_module.PARTIAL_MARK in actual
            removed(path, **kwargs)

        monkeypatch.setattr(output_module.shutil, "rmtree", watched)
        discard(partial)
        assert not partial.exists()
        monkeypatch.undo()
        partial.mkdir()
        (partial / output_module.PARTIAL_MARK).touch()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_leaves_what_was_there(tmp_path, model_dir, how):
    output = tmp_path / "out"
    output.mkdir()
    (output / "old").write_text("old")
    command = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "  # ignored in a background job
        f"from optimum_barber.cli import main; main(['prune', {str(model_dir)!r}, '--sparsity', '0.5', "
        f"'--calibration', 'pydoc', '--samples', '2000', '--sequence-length', '64', '--overwrite', '--quiet', "
        f"'-o', {str(output)!r}])"
    )
    process = subprocess.Popen([sys.executable, "-c", command], stderr=subprocess.DEVNULL)
    partial = tmp_path / "out.partial"
    deadline = time.monotonic() + 120
    while not partial.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert partial.exists()
    time.sleep(3)  # a finaliser of a library that is still being imported would swallow the interrupt
    os.kill(process.pid, how)
    process.wait()
    assert [path.name for path in output.iterdir()] == ["old"]
    if how is signal.SIGINT:
        assert not partial.exists()
    with staged(output) as again:
        (again / "new").touch()
    assert [path.name for path in output.iterdir()] == ["new"]


def test_a_link_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with staged(check_output(tmp_path / "link", False, [])) as partial:
        (partial / "new").touch()
    assert (tmp_path / "link").is_symlink()
    assert [path.name for path in (tmp_path / "real").iterdir()] == ["new"]


def test_a_result_that_cannot_be_put_in_place_is_kept(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(output_module, "_swap_in", refuse)
    with pytest.raises(BarberError, match=r"busy\); all is in .*out.partial"), staged(tmp_path / "out") as partial:
        (partial / "new").touch()
    assert (tmp_path / "out.partial" / "new").exists()


def test_folders_made_on_the_way_go_again(tmp_path):
    with pytest.raises(RuntimeError), staged(tmp_path / "a" / "b" / "out"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_gguf_files_neighbours_are_free(tmp_path):
    (tmp_path / "x.gguf").touch()
    assert check_output(tmp_path / "out", False, [tmp_path / "x.gguf"]) == tmp_path / "out"


def test_outputs_that_must_not_be_are_refused(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").touch()
    full = tmp_path / "full"
    full.mkdir()
    (full / "x").touch()
    for output, message in [
        (model, "is the input"),
        (model / "sub", "lies within it"),
        (tmp_path, "holds the input"),
        (full, "is not empty"),
        (full / "x", "is a file"),
        (full / "x" / "y", "cannot be written"),
        ("/proc", "is a mount point"),
    ]:
        with pytest.raises(BarberError, match=message):
            check_output(output, False, [model])
    assert check_output(full, True, [model]) == full
    assert check_output(tmp_path / "a" / "b", False, [model]) == tmp_path / "a" / "b"
