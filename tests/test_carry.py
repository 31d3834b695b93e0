"""An output loads wherever its source did: keys of config.json as they were, small files byte for byte."""

import json
import logging
import os
import shutil
import subprocess

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from optimum_barber import BarberConfig, BarberSparsifier
from optimum_barber.base.errors import BarberError
from optimum_barber.cli import main

from .conftest import tiny_model, tiny_windows

CONFIG_OF_VERSION_4 = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 32, "initializer_range": 0.02, "intermediate_size": 48,
    "max_position_embeddings": 64, "mlp_bias": False, "model_type": "llama", "num_attention_heads": 4,
    "num_hidden_layers": 2, "num_key_value_heads": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-06,
    "rope_scaling": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 32, "rope_type": "llama3"},
    "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "float32", "transformers_version": "4.45.0",
    "use_cache": True, "vocab_size": 300, "_name_or_path": "someone/something", "a_key_of_theirs": {"x": [1, None]},
}  # fmt: skip
SMALL = {
    "generation_config.json": '{"do_sample": false, "temperature": 0.3,  "bos_token_id": 1}',  # invalid, as published
    "special_tokens_map.json": '{"eos_token": "</s>"}',
    "added_tokens.json": "{}",
    "tokenizer.model": "\0\1 not a model",
    "vocab.json": '{"a": 1}',
    "merges.txt": "#version: 0.2\n",
    "chat_template.jinja": "{{ messages[0].content }}",
    "additional_chat_templates/tools.jinja": "{{ tools }}",
    "preprocessor_config.json": "{ }",
    "processor_config.json": "{}\n",
    "LICENSE": "theirs",
    "LICENSE.txt": "theirs too",
    "NOTICE.md": "notice",
}
LEFT = {"README.md": "card", "modeling_theirs.py": "raise SystemExit", "report.json": "[]", "notes.html": "x"}


@pytest.fixture(scope="module")
def old_model(tmp_path_factory, tokenizer):
    """A checkpoint as transformers 4 writes it, with all files that may lie beside it."""
    directory = tmp_path_factory.mktemp("old")
    tokenizer.save_pretrained(directory)
    tiny_model(tie_word_embeddings=False).save_pretrained(directory)
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    settings = {**settings, "tokenizer_class": "PreTrainedTokenizerFast"}
    settings.pop("backend", None)
    texts = {**SMALL, **LEFT, "config.json": json.dumps(CONFIG_OF_VERSION_4)}
    texts["tokenizer_config.json"] = json.dumps(settings)
    for name, text in texts.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(text)
    return directory


def small_files(directory):
    actual = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in actual.items() if name.startswith("tokenizer") or name in SMALL}


def pruned(model, output, stream="auto", **settings):
    config = BarberConfig(sparsity=0.5, rebuild="none", **settings)
    sparsifier = BarberSparsifier.from_pretrained(model, config.dtype, stream)
    sparsifier.sparsify(config, tiny_windows(), output, quiet=True)
    return json.loads((output / "config.json").read_text())


@pytest.mark.parametrize("stream", ["always", "never"])
def test_keys_and_small_files_are_the_sources(tmp_path, old_model, stream):
    content = pruned(old_model, tmp_path / "out", stream)
    ours = content.pop("sparsity_config")
    assert ours["masks_file"] == "sparsity_masks.safetensors"
    assert content == CONFIG_OF_VERSION_4
    assert small_files(tmp_path / "out") == small_files(old_model)
    written = {"report.json", "README.md"}  # by this program, not taken over
    assert not [name for name in set(LEFT) - written if (tmp_path / "out" / name).exists()]
    assert "How it was made" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "out" / "report.json").read_text())["blocks"]


@pytest.mark.parametrize("stream", ["always", "never"])
def test_another_dtype_is_said_under_the_key_that_was_there(tmp_path, old_model, stream):
    content = pruned(old_model, tmp_path / "out", stream, dtype="bfloat16")
    del content["sparsity_config"]
    assert content == {**CONFIG_OF_VERSION_4, "torch_dtype": "bfloat16"}


def test_settings_for_sampling_in_the_configuration_stay_there(tmp_path, old_model):
    model = tmp_path / "legacy"
    shutil.copytree(old_model, model)
    (model / "generation_config.json").unlink()
    (model / "config.json").write_text(json.dumps({**CONFIG_OF_VERSION_4, "temperature": 0.3, "top_p": 0.8}))
    for stream in ("always", "never"):
        content = pruned(model, tmp_path / stream, stream)
        assert (content["temperature"], content["top_p"]) == (0.3, 0.8)
        assert not (tmp_path / stream / "generation_config.json").exists()
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / stream).generation_config
        assert (loaded.temperature, loaded.top_p) == (0.3, 0.8)


def test_a_changed_model_and_tokenizer_are_written_as_they_are_held(tmp_path, old_model):
    sparsifier = BarberSparsifier.from_pretrained(old_model, stream="never")
    sparsifier.model.config.rms_norm_eps = 1e-4
    sparsifier.model.generation_config.max_new_tokens = 7
    sparsifier.tokenizer.add_tokens(["<new>"])
    sparsifier.sparsify(BarberConfig(sparsity=0.5, rebuild="none"), tiny_windows(), tmp_path / "out", quiet=True)
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    del content["sparsity_config"]
    assert content == {**CONFIG_OF_VERSION_4, "rms_norm_eps": 1e-4}
    assert GenerationConfig.from_pretrained(tmp_path / "out").max_new_tokens == 7
    assert "<new>" in AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    assert not (tmp_path / "out" / "special_tokens_map.json").exists()  # of the tokenizer as it was


def test_invalid_generation_settings_end_no_finished_run(tmp_path, caplog):
    model = tiny_model()
    model.generation_config.temperature = 0.3
    with caplog.at_level(logging.WARNING):
        BarberSparsifier(model).sparsify(BarberConfig(sparsity=0.5), tiny_windows(), tmp_path / "out", quiet=True)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["temperature"] == 0.3
    assert sum("written as they are, though invalid" in record.message for record in caplog.records) == 1
    assert model.generation_config.temperature == 0.3


def test_a_configuration_that_is_not_written_is_refused_before_work(tmp_path, monkeypatch):
    model = tiny_model()
    model.config.temperature = 0.3
    monkeypatch.setattr("optimum_barber.prune.sparsifier.prune", None)
    with pytest.raises(BarberError, match=r"transformers does not write this model: .*'temperature': 0\.3"):
        BarberSparsifier(model).sparsify(BarberConfig(sparsity=0.5), tiny_windows(), tmp_path / "out", quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_links_to_other_files_of_the_machine_are_not_followed(tmp_path, old_model):
    model, secret = tmp_path / "model", tmp_path / "id_rsa"
    model.mkdir()
    secret.write_text("secret")
    for path in old_model.iterdir():
        (model / path.name).symlink_to(path)
    (model / "notes.txt").symlink_to(secret)
    pruned(model, tmp_path / "out")
    assert small_files(tmp_path / "out") == small_files(old_model)
    assert not (tmp_path / "out" / "notes.txt").exists()


def test_a_snapshot_of_the_hubs_cache_is_read_through_its_links(tmp_path, old_model):
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "abc", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(path for path in old_model.iterdir() if path.is_file()):
        shutil.copy(path, blobs / f"{number:040x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:040x}")
    for path in snapshot.iterdir():
        path.chmod(0o444)
    snapshot.chmod(0o555)
    pruned(snapshot, tmp_path / "out")
    expected = {name: data for name, data in small_files(old_model).items() if "/" not in name}
    assert small_files(tmp_path / "out") == expected
    assert os.access(tmp_path / "out" / "config.json", os.W_OK)


def test_a_cut_model_keeps_what_the_cut_does_not_change(tmp_path, old_model, text_file):
    flags = ["--scorer", "magnitude", "--remove", "0.2", "--head-unit", "group", "--no-latency", "--quiet"]
    assert main(["shrink", str(old_model), *flags, "-o", str(tmp_path / "out")]) == 0
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    kept = {key: value for key, value in CONFIG_OF_VERSION_4.items() if key in content}
    changed = {key for key, value in kept.items() if content[key] != value}
    assert changed <= {"architectures", "intermediate_size", "model_type", "num_attention_heads", "num_key_value_heads"}
    assert kept["rope_theta"] == 500000.0 and kept["rope_scaling"] == CONFIG_OF_VERSION_4["rope_scaling"]
    assert small_files(tmp_path / "out") == small_files(old_model)


READ_BY_AN_OLD_ONE = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, __version__
torch.set_num_threads(1)
model, tokenizer = AutoModelForCausalLM.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1])
with torch.no_grad():
    torch.save(model(torch.arange(3, 19)[None]).logits, sys.argv[2])
config = model.config
print(json.dumps([__version__, config.rope_theta, config.rope_scaling, type(tokenizer).__name__,
                  tokenizer("some text").input_ids, GenerationConfig.from_pretrained(sys.argv[1]).temperature]))
"""


def test_the_transformers_that_wrote_the_source_reads_the_output(tmp_path, old_model, tokenizer):
    python = os.environ.get("OPTIMUM_BARBER_OLD_PYTHON")
    if not python:
        pytest.skip("OPTIMUM_BARBER_OLD_PYTHON names no interpreter with transformers 4.57")
    pruned(old_model, tmp_path / "out")
    command = [python, "-c", READ_BY_AN_OLD_ONE, str(tmp_path / "out"), str(tmp_path / "logits.pt")]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env={"PATH": ""})
    version, theta, scaling, kind, ids, temperature = json.loads(result.stdout.splitlines()[-1])
    assert version.startswith("4.")
    assert (theta, scaling) == (500000.0, CONFIG_OF_VERSION_4["rope_scaling"])
    assert (kind, temperature) == ("PreTrainedTokenizerFast", 0.3)
    assert ids == tokenizer("some text").input_ids
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(torch.arange(3, 19)[None]).logits
    assert torch.equal(ours, torch.load(tmp_path / "logits.pt"))


def test_weights_are_the_same_bits_from_disk_and_from_memory(tmp_path, old_model):
    for stream in ("always", "never"):
        pruned(old_model, tmp_path / stream, stream)
    one, other = (load_file(tmp_path / stream / "model.safetensors") for stream in ("always", "never"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
