"""Files of strangers: read as transformers reads them, or refused in one line; no code of theirs ever runs."""

import io
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from benchmarks.fuzz import READERS, fuzz
from optimum_barber import BarberConfig, BarberSparsifier
from optimum_barber.base.errors import LONGEST, BarberError
from optimum_barber.base.files import DEEPEST_JSON, LARGEST_JSON, parse_json, read_json
from optimum_barber.checkpoints.record import MaskFile, read_record
from optimum_barber.checkpoints.safetensors import SafetensorsWeights
from optimum_barber.checkpoints.shards import write_tensors
from optimum_barber.checkpoints.verify import verify_checkpoint
from optimum_barber.cli import main
from optimum_barber.models.bounds import check_numbers
from optimum_barber.models.loading import load_config, load_model, load_tokenizer, resolve_model
from optimum_barber.runs.report.write import page_of

from .conftest import tiny_model, tiny_windows

INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"
PLAIN = ["--sparsity", "0.5", "--rebuild", "none", "--calibration", "pydoc", "--samples", "2", "--quiet"]


def edit(path, **changes):
    """Change keys of a JSON file; ... removes one."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def copied(model_dir, tmp_path, **config):
    """A copy of the tiny checkpoint, with changes of its config.json."""
    shutil.copytree(model_dir, tmp_path / "model")
    edit(tmp_path / "model" / "config.json", **config)
    return tmp_path / "model"


def sharded(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model", max_shard_size="20KB")
    return tmp_path / "model"


def refused(capsys, *arguments):
    """The one line that a command refuses with."""
    assert main([str(argument) for argument in arguments]) == 2
    line = capsys.readouterr().err.strip()
    assert "\n" not in line and "Traceback" not in line
    return line


def streamed(model, output, **settings):
    config = BarberConfig(sparsity=0.5, rebuild="none", producer="magnitude", **settings)
    BarberSparsifier(None, None, resolve_model(model), config.dtype, "always").sparsify(
        config, tiny_windows(), output, quiet=True
    )


# one reading of a checkpoint


def test_all_that_the_named_files_hold_counts_as_in_transformers(tmp_path):
    model = sharded(tmp_path)
    index = json.loads((model / INDEX).read_text())
    unnamed, stale = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"
    del index["weight_map"][unnamed]
    index["weight_map"][stale] = next(
        file for file in index["weight_map"].values() if file != index["weight_map"][stale]
    )
    (model / INDEX).write_text(json.dumps({**index, "metadata": None}))
    weights, expected = SafetensorsWeights.open(model), tiny_model().state_dict()
    assert weights.entries.keys() == index["weight_map"].keys() | {unnamed}
    assert all(torch.equal(weights.tensor(name), expected[name]) for name in weights.entries)
    streamed(model, tmp_path / "out")
    written = json.loads((tmp_path / "out" / INDEX).read_text())
    assert set(written["weight_map"]) == set(weights.entries) and written["metadata"]["total_size"] > 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert torch.equal(loaded[stale], expected[stale]) and (loaded[unnamed] == 0).sum() >= loaded[unnamed].numel() // 2


def test_of_a_tensor_in_two_files_the_last_counts_as_in_transformers(tmp_path):
    model = sharded(tmp_path)
    index = json.loads((model / INDEX).read_text())["weight_map"]
    first, last = min(index.values()), max(index.values())
    name = next(key for key, file in index.items() if file == first)
    held = load_file(model / last)
    save_file({**held, name: load_file(model / first)[name] + 1}, model / last, {"format": "pt"})
    loaded = AutoModelForCausalLM.from_pretrained(model).state_dict()
    assert torch.equal(SafetensorsWeights.open(model).tensor(name), loaded[name])
    assert not torch.equal(loaded[name], tiny_model().state_dict()[name])


@pytest.mark.parametrize("stream", ["always", "never"])
def test_what_would_have_transformers_take_other_weights_is_refused(tmp_path, model_dir, stream):
    model = copied(model_dir, tmp_path, transformers_weights="other.safetensors")
    with pytest.raises(BarberError, match="names its weights by transformers_weights"):
        load_config(resolve_model(model))
    edit(model / "config.json", transformers_weights=...)
    (model / "adapter_config.json").write_text("{}")
    with pytest.raises(BarberError, match="holds an adapter beside its weights"):
        BarberSparsifier.from_pretrained(model, stream=stream).sparsify(
            BarberConfig(sparsity=0.5), tiny_windows(), tmp_path / "out", quiet=True
        )


@pytest.mark.parametrize("architecture", ["LLaMAForCausalLM", "llamaforcausallm", "YiForCausalLM"])
def test_an_old_name_of_a_causal_lm_is_one(tmp_path, model_dir, architecture):
    model = copied(model_dir, tmp_path, architectures=[architecture])
    streamed(model, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [architecture]


def test_another_head_is_still_no_causal_lm(tmp_path, model_dir):
    model = copied(model_dir, tmp_path, architectures=["LlamaForSequenceClassification"])
    with pytest.raises(BarberError, match="is not a causal LM but LlamaForSequenceClassification"):
        load_config(resolve_model(model))


def test_a_quantized_model_is_called_so(tmp_path, model_dir):
    model = copied(model_dir, tmp_path, quantization={"group_size": 64, "bits": 4})
    name, held = "model.layers.0.mlp.up_proj.weight", load_file(model / WEIGHTS)
    packed = {**held, name: torch.zeros(48, 4, dtype=torch.uint32)}
    save_file(packed, model / WEIGHTS, {"format": "mlx"})
    with pytest.raises(BarberError, match="is quantized and cannot be pruned"):
        streamed(model, tmp_path / "out")
    edit(model / "config.json", quantization=...)
    with pytest.raises(BarberError, match=f"is quantized: {name} is stored as torch.uint32"):
        streamed(model, tmp_path / "out")


def test_float8_weights_are_read_as_what_they_hold(tmp_path, model_dir):
    model, masks = copied(model_dir, tmp_path), {}
    held = load_file(model / WEIGHTS)
    for name, weight in held.items():
        held[name] = weight.to(torch.float8_e4m3fn) if weight.ndim > 1 else weight
    save_file(held, model / WEIGHTS, {"format": "pt"})
    for stream in ("always", "never"):
        sparsifier = BarberSparsifier.from_pretrained(model, stream=stream)
        config = BarberConfig(sparsity=0.5, rebuild="none")
        masks[stream] = sparsifier.sparsify(config, tiny_windows(), tmp_path / stream, quiet=True).masks
    assert {n: m.sha256 for n, m in masks["always"].items()} == {n: m.sha256 for n, m in masks["never"].items()}


@pytest.mark.parametrize("stream", ["always", "never"])
def test_a_weight_beyond_the_dtype_is_named_before_any_work(tmp_path, model_dir, capsys, stream):
    model = copied(model_dir, tmp_path)
    held = load_file(model / WEIGHTS)
    held["model.layers.1.mlp.up_proj.weight"][3, 4] = -70000
    save_file(held, model / WEIGHTS, {"format": "pt"})
    flags = [*PLAIN, "--sequence-length", 16, "--stream", stream, "-o", tmp_path / "out"]
    line = refused(capsys, "prune", model, "--dtype", "float16", *flags)
    assert "weight model.layers.1.mlp.up_proj.weight holds -70000, beyond float16, which ends at 65504" in line
    assert not list(tmp_path.glob("out*"))
    assert main([str(part) for part in ("prune", model, "--dtype", "bfloat16", *flags)]) == 0


def test_a_model_in_memory_is_not_cast_beyond_the_dtype():
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e5
    with pytest.raises(BarberError, match="mlp.up_proj.weight holds 100000, beyond float16"):
        BarberSparsifier(model).sparsify(BarberConfig(sparsity=0.5, dtype="float16"), tiny_windows(), quiet=True)
    assert model.dtype == torch.float32


def test_a_system_that_reserves_no_space_still_writes(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")  # as on macOS
    write_tensors(tmp_path / "x", {"a": torch.arange(3)}, {})
    assert load_file(tmp_path / "x")["a"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is NaN in config.json"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000 in config.json, at most 65536 is legal"),
        ({"num_hidden_layers": 500}, "its configuration says 500 layers, its files hold"),
        ({"head_dim": 10**12}, "head_dim is 1000000000000 in config.json"),
    ],
)
def test_numbers_that_no_model_has_are_refused(tmp_path, model_dir, changes, message):
    with pytest.raises(BarberError, match=message):
        streamed(copied(model_dir, tmp_path, **changes), tmp_path / "out")


def test_sizes_that_models_have_are_no_obstacle(tmp_path, model_dir):
    sizes = {"max_position_embeddings": 131072, "vocab_size_per_layer_input": 262144, "queries": {"1225": 2**17}}
    config = load_config(resolve_model(copied(model_dir, tmp_path, **sizes)))
    assert config.max_position_embeddings == 131072
    check_numbers("model", {"queries": {1225: 128}})


def test_a_large_configuration_is_no_obstacle(tmp_path, model_dir):
    numbers = {"audio_token_index": 258_883, "log_scaling_n_floor": 128_000}
    streamed(copied(model_dir, tmp_path, notes="x" * 10_000_000, **numbers), tmp_path / "out")
    (tmp_path / "model" / "config.json").write_text("[1]")
    with pytest.raises(BarberError, match="is no configuration: a JSON object is needed, not list"):
        load_config(resolve_model(tmp_path / "model"))


# no code


@pytest.mark.parametrize("answer", ["y\n", "yes\n"])
def test_no_code_of_a_model_runs_and_no_prompt_is_shown(tmp_path, model_dir, capsys, monkeypatch, answer):
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w').close()\nfrom transformers import LlamaConfig as Own, LlamaTokenizer as OwnT\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(answer))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a prompt"))
    model = copied(model_dir, tmp_path, model_type="own", auto_map={"AutoConfig": "own.Own"})
    (model / "own.py").write_text(code)
    (model / "custom_generate").mkdir()
    (model / "custom_generate" / "generate.py").write_text(code)
    message = "it needs code of its own, 'own.Own' of config.json, which is never run"
    assert message in refused(capsys, "prune", model, *PLAIN, "-o", tmp_path / "out")
    assert message in refused(capsys, "inspect", model)
    edit(model / "config.json", model_type="llama")
    load_model(resolve_model(model))  # transformers has a class of its own
    edit(model / "tokenizer_config.json", tokenizer_class="OwnT", auto_map={"AutoTokenizer": ["own.OwnT", None]})
    with pytest.raises(BarberError, match=r"needs code of its own, \['own.OwnT', None\] of tokenizer_config.json"):
        load_tokenizer(resolve_model(model))
    assert not ran.exists()


# records


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A pruned checkpoint without a tokenizer."""
    directory = tmp_path_factory.mktemp("pruned") / "out"
    config = BarberConfig(sparsity=0.5, rebuild="none", producer="magnitude")
    BarberSparsifier(tiny_model()).sparsify(config, tiny_windows(), directory, quiet=True)
    return directory


NINES = "9" * 5000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"masks": "../other/sparsity_masks.safetensors"}, "names the file '../other/.*its own directory"),
        ({"masks": "/etc/passwd"}, "names the file '/etc/passwd'"),
        ({"masks": ".."}, "names the file '..'"),
        ({"masks": "x" * 5000}, r"names the file 'x+\.\.\.: legal"),
        ({"masks": "linked.safetensors"}, "names the file 'linked.safetensors'"),
        ({"pattern": f"{NINES}:4"}, r"pattern '9+\.\.\. is not legal"),
        ({"pattern": "4:2"}, "pattern '4:2' is not legal"),
        ({"pattern": ["2:4"]}, "pattern .'2:4'. is not legal"),
        ({"modules": []}, "is no sparsity config: modules"),
        ({"format_version": 10**30}, "has format version 10+; known is 1"),
        ({"sparsity": float("nan")}, "sparsity nan is not legal"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_record_of_a_stranger_is_refused(tmp_path, checkpoint, capsys, changes, message):
    shutil.copytree(checkpoint, tmp_path / "out")
    (tmp_path / "other").mkdir()
    shutil.copy(checkpoint / "sparsity_masks.safetensors", tmp_path / "other")
    (tmp_path / "out" / "linked.safetensors").symlink_to(tmp_path / "other" / "sparsity_masks.safetensors")
    edit(tmp_path / "out" / "sparsity_config.json", **changes)
    with pytest.raises(BarberError, match=message) as error:
        read_record(tmp_path / "out")
    assert len(str(error.value)) < LONGEST
    for command in ("verify", "report"):
        refused(capsys, command, tmp_path / "out")


def test_a_record_with_a_number_of_5000_digits_is_refused(tmp_path, checkpoint):
    shutil.copytree(checkpoint, tmp_path / "out")
    path = tmp_path / "out" / "sparsity_config.json"
    path.write_text(path.read_text().replace('"format_version": 1', f'"format_version": {NINES}'))
    with pytest.raises(BarberError, match="has 5,000 digits, at most 40 are read"):
        read_record(tmp_path / "out")


def test_a_record_in_the_hubs_cache_is_legal(tmp_path, checkpoint):
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "abc", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(checkpoint.iterdir()):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert verify_checkpoint(snapshot).faults == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "has version 2; known is 1"),
        ({"pattern": None}, "broken metadata: pattern"),
        ({"shapes": {"a": [-1, 8]}}, "broken metadata: shapes.a"),
        ({"shapes": [1]}, "broken metadata: shapes"),
        ({"sha256": {"a": 1}}, "broken metadata: sha256.a"),
    ],
)
def test_a_mask_file_of_a_stranger_is_refused(tmp_path, changes, message):
    good = {"version": 1, "pattern": "2:4", "shapes": {"a": [1, 8]}, "sha256": {"a": "x"}}
    metadata = {"optimum_barber.masks": json.dumps({**good, **changes})}
    write_tensors(tmp_path / "masks", {"a": torch.zeros(1, dtype=torch.uint8)}, metadata)
    with pytest.raises(BarberError, match=message):
        MaskFile(tmp_path / "masks")


def test_the_bits_of_a_mask_are_those_of_its_shape(tmp_path):
    metadata = {"version": 1, "pattern": "2:4", "shapes": {"a": [2**40, 2**40]}, "sha256": {"a": "x"}}
    write_tensors(tmp_path / "masks", {"a": torch.zeros(4)}, {"optimum_barber.masks": json.dumps(metadata)})
    with pytest.raises(BarberError, match="bytes for a mask of shape"):
        MaskFile(tmp_path / "masks")["a"]


@pytest.mark.parametrize(
    ("file", "content"), [("run.json", {"stages": {"../x": {}}}), ("compare.json", {"cells": ["../x"]})]
)
def test_the_record_of_a_run_names_its_own_folders_only(tmp_path, file, content):
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(BarberError, match=r"names the file '../x"):
        page_of(tmp_path)


# one reader of JSON


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested too deeply"),
        ("[" * (DEEPEST_JSON + 1) + "]" * (DEEPEST_JSON + 1), "nested too deeply"),
        (f'{{"a": {NINES}}}', "5,000 digits"),
        ('"\\ud83d"', "surrogates not allowed"),
        ('{"\\ud83d": 1}', "surrogates not allowed"),
        (b"\xff", "invalid start byte"),
        ("\ufeff{}", "BOM"),
        ("", "Expecting value"),
        (" " * (LARGEST_JSON + 1), "bytes large, at most"),
    ],
)
def test_json_that_is_none_or_too_much_is_refused(text, message):
    with pytest.raises(BarberError, match=f"^x is no JSON file: .*{message}"):
        parse_json(text, "x")


def test_json_of_other_programs_is_read(tmp_path):
    (tmp_path / "x").write_text('{"model_max_length": 1000000000000000019884624838656, "a": [NaN, -Infinity, 1e999]}')
    content = read_json(tmp_path / "x")
    assert content["model_max_length"] == int(1e30) and content["a"][1] == -float("inf")
    deep = "[" * DEEPEST_JSON + "]" * DEEPEST_JSON
    assert json.dumps(parse_json(deep, "x")) == deep


def test_every_reader_answers_mutated_inputs():
    assert fuzz(READERS, 40, seed=1) == 0
