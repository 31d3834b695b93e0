"""Onto the Hub and back: what a checkpoint holds, all of it and nothing else, after a check of every zero."""

import shutil

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

import optimum_barber
from optimum_barber import BarberConfig, BarberError, BarberSparsifier, PrunedModel
from optimum_barber.checkpoints.pruned import open_masks
from optimum_barber.cli import main

from .conftest import tiny_windows
from .fake_hub import running_hub

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of huggingface_hub's HTTP client


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with running_hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path / "cache"), raising=False)
        monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
        yield server


@pytest.fixture(scope="module")
def out(tmp_path_factory, model_dir):
    directory = tmp_path_factory.mktemp("push") / "out"
    BarberSparsifier.from_pretrained(model_dir).sparsify(
        BarberConfig(sparsity=0.5), tiny_windows(), save_dir=directory, quiet=True
    )
    return directory


@pytest.fixture
def own_copy(out, tmp_path):
    return shutil.copytree(out, tmp_path / "copy")


def test_all_files_arrive_and_the_model_loads_by_its_name(hub, own_copy, capsys):
    (own_copy / ".lock").touch()
    (own_copy / "config.json.partial").touch()
    (own_copy / "additional_chat_templates").mkdir()
    (own_copy / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    assert main(["push", str(own_copy), "me/sparse", "--private", "--message", "first"]) == 0
    assert "commit" in capsys.readouterr().out
    files = hub.repositories["me/sparse"]["main"]
    expected = {path.name for path in own_copy.iterdir() if path.is_file()} - {".lock", "config.json.partial"}
    assert set(files) == expected | {"additional_chat_templates/tools.jinja"}
    assert all(content == (own_copy / name).read_bytes() for name, content in files.items())
    assert hub.private["me/sparse"] is True and hub.messages == ["first"]
    assert set(hub.validated) == {(own_copy / "README.md").read_text()}
    opened = PrunedModel.load("me/sparse")
    assert opened.record == open_masks(own_copy)[0]
    for name, mask in opened.masks.items():
        assert torch.equal(opened.model.get_submodule(name).weight != 0, mask.unpack())
    assert (opened.reference.directory / "README.md").is_file()


def test_results_push_themselves(hub, model_dir, tmp_path):
    sparsifier = BarberSparsifier.from_pretrained(model_dir)
    config = BarberConfig(sparsity=0.5, rebuild="none")
    result = sparsifier.sparsify(config, tiny_windows(), save_dir=tmp_path / "out", quiet=True)
    commit = result.push_to_hub("me/result", revision="trial", commit_message="from Python")
    assert commit.commit_url.startswith(hub.url)
    assert "sparsity_masks.safetensors" in hub.repositories["me/result"]["trial"]
    in_memory = BarberSparsifier.from_pretrained(model_dir, stream="never").sparsify(config, tiny_windows(), quiet=True)
    with pytest.raises(BarberError, match="push_to_hub needs a written checkpoint: give save_dir"):
        in_memory.push_to_hub("me/result")


def test_a_dry_run_lists_and_uploads_nothing(hub, out, capsys):
    assert main(["push", str(out), "me/sparse", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert all(path.name in printed for path in out.iterdir())
    assert "would go to me/sparse; nothing was uploaded" in printed
    assert hub.repositories == {}


def test_a_checkpoint_whose_zeros_are_lost_is_not_uploaded(hub, own_copy, capsys):
    tensors = load_file(own_copy / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] += 1
    save_file(tensors, own_copy / "model.safetensors", {"format": "pt"})
    assert main(["push", str(own_copy), "me/sparse"]) == 1
    assert "layers.0.mlp.up_proj" in capsys.readouterr().err
    with pytest.raises(BarberError, match=r"layers\.0\.mlp\.up_proj.*nothing was uploaded"):
        optimum_barber.push_to_hub(own_copy, "me/sparse")
    assert hub.repositories == {}


@pytest.mark.parametrize(
    ("directory", "repository", "message"),
    [
        ("out", "me/a b", "repository 'me/a b' is not legal: owner/name"),
        ("out", "a/b/c", "repository 'a/b/c' is not legal"),
        ("empty", "me/sparse", "is no checkpoint: it has no config.json"),
        ("missing", "me/sparse", "is no checkpoint"),
    ],
)
def test_bad_input_is_one_line(hub, own_copy, tmp_path, capsys, directory, repository, message):
    (tmp_path / "empty").mkdir()
    place = own_copy if directory == "out" else tmp_path / directory
    assert main(["push", str(place), repository]) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1
    assert hub.repositories == {}


def test_a_refusal_of_the_hub_is_one_line(hub, out, capsys):
    hub.refuses = True
    assert main(["push", str(out), "me/sparse"]) == 2
    printed = capsys.readouterr().err
    assert "repository 'me/sparse' cannot be written" in printed and printed.count("\n") == 1


def test_without_a_network_it_is_one_line(out, capsys, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert main(["push", str(out), "me/sparse"]) == 2
    printed = capsys.readouterr().err
    assert "repository 'me/sparse' cannot be written" in printed and printed.count("\n") == 1


def test_a_link_out_of_the_folder_is_not_published(out, own_copy, tmp_path):
    from optimum_barber.checkpoints.push import files_of

    (tmp_path / "secret.txt").write_text("secret")
    (own_copy / "notes.txt").symlink_to(tmp_path / "secret.txt")
    assert [path.name for path in files_of(own_copy)] == [path.name for path in files_of(out)]
