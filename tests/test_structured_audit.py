"""`verify` of a shrunk checkpoint: what is as recorded passes, every tampering is named with its module."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from optimum_barber import BarberConfig, BarberShrinker, BarberSparsifier, ShrinkConfig
from optimum_barber.base.errors import BarberError
from optimum_barber.cli import main
from optimum_barber.shrink.audit import audit_cut

from .conftest import tiny_model, tiny_windows

EIGHT = {"num_attention_heads": 8, "num_key_value_heads": 8}


def shrink(folder, model, tokenizer, **settings):
    """Save a model and what is cut out of it."""
    model.save_pretrained(folder / "dense")
    tokenizer.save_pretrained(folder / "dense")
    config = ShrinkConfig(**{"remove": 0.3, **settings})
    shrinker = BarberShrinker.from_pretrained(folder / "dense")
    shrinker.shrink(config, tiny_windows(), save_dir=folder / "small", latency=False, quiet=True)
    return folder / "small"


@pytest.fixture(scope="module")
def made(tmp_path_factory, tokenizer):
    """A dense tiny LLaMA with a tokenizer, and what was cut out of it."""
    folder = tmp_path_factory.mktemp("audit")
    shrink(folder, tiny_model(), tokenizer)
    return folder


@pytest.fixture
def folder(made, tmp_path):
    """The same in a place of its own, to be spoilt; the recorded base still lies at the first place."""
    shutil.copytree(made / "small", tmp_path / "small")
    return tmp_path


def edit(directory, change):
    """Change the tensors of a checkpoint."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("family", "changes", "settings"),
    [
        ("llama", EIGHT, {"remove_heads": 0.375}),
        ("llama-bias-untied", {}, {}),
        ("qwen2", {}, {"head_unit": "query"}),
        ("qwen3", {"tie_word_embeddings": True}, {"dtype": "bfloat16"}),
        ("gemma2", {}, {"scorer": "magnitude"}),
        ("phi3", {}, {"head_unit": "query"}),
        ("opt", {}, {"remove_heads": 0}),
    ],
)
def test_every_family_is_audited_bit_for_bit(tmp_path, tokenizer, family, changes, settings):
    directory = shrink(tmp_path, tiny_model(family, **changes), tokenizer, **settings)
    audit = audit_cut(directory)
    assert audit.faults == []
    assert audit.base == str(tmp_path / "dense")
    assert audit.modules == {"phi3": 8, "opt": 12}.get(family, 14)


def test_the_command_says_what_it_compared(made, capsys):
    assert main(["verify", str(made / "small")]) == 0
    said = capsys.readouterr().out
    assert said == (
        "14 modules cut to 1 of 2 key-value groups, 40 of 48 FFN channels: as recorded; every kept weight is that of "
        f"{made / 'dense'}\n"
    )


def test_one_changed_bit_is_named(folder, capsys):
    def change(tensors):
        tensors["model.layers.1.mlp.down_proj.weight"].view(torch.int32)[3, 5] ^= 1
        tensors["model.norm.weight"][0] = 2

    edit(folder / "small", change)
    assert main(["verify", str(folder / "small")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.partition(":")[0] for line in lines[:-1]) == ["model.layers.1.mlp.down_proj", "model.norm"]
    assert "weight is not what the record makes of the dense model's" in lines[0]
    assert lines[-1].endswith(": FAILED")


def test_another_choice_than_the_recorded_one_is_named(folder):
    def other(content):
        kept = content["layers"]["model.layers.0"]["channels"]["kept"]
        kept[0] = next(index for index in range(48) if index not in kept)
        kept.sort()

    edit_json(folder / "small" / "pruned_structure.json", other)
    named = {fault.partition(":")[0] for fault in audit_cut(folder / "small").faults}
    assert named == {f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")}


def test_wrong_shapes_are_named_without_the_base(folder, made):
    def change(tensors):
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(39, 32)
        del tensors["model.layers.1.self_attn.o_proj.weight"]

    edit(folder / "small", change)
    audit = audit_cut(folder / "small", weights=False)
    assert audit.base is None
    assert audit.faults == [
        "model.layers.0.mlp.up_proj: weight of shape (39, 32), recorded are 40 channels, so (40, 32)",
        f"model.layers.1.self_attn.o_proj: model '{folder / 'small'}' has no weight "
        "model.layers.1.self_attn.o_proj.weight",
    ]
    assert audit_cut(folder / "small").faults == audit.faults


def test_a_record_of_other_counts_is_named(folder):
    def fewer(content):
        content["layers"]["model.layers.1"]["channels"]["kept"].pop()

    edit_json(folder / "small" / "pruned_structure.json", fewer)
    faults = audit_cut(folder / "small").faults
    assert "config.json: 40 channels a layer, recorded are 39 and 40" in faults
    assert "model.layers.1.mlp.down_proj: weight of shape (32, 40), recorded are 39 channels, so (32, 39)" in faults
    assert not any(fault.startswith("model.layers.0") for fault in faults)


def test_a_base_that_is_gone_or_another_is_told_apart(folder, made, tmp_path, capsys):
    edit_json(folder / "small" / "pruned_structure.json", lambda c: c["base_model"].update(name="/none/there"))
    assert main(["verify", str(folder / "small")]) == 0
    assert "only shapes were checked: base model /none/there is not at hand" in capsys.readouterr().out
    assert main(["verify", str(folder / "small"), "--base", str(made / "dense")]) == 0
    assert f"every kept weight is that of {made / 'dense'}" in capsys.readouterr().out
    tiny_model(seed=1).save_pretrained(tmp_path / "other")
    assert main(["verify", str(folder / "small"), "--base", str(tmp_path / "other")]) == 1
    assert capsys.readouterr().out.count("is not what the record makes") == 16
    tiny_model(num_hidden_layers=3).save_pretrained(tmp_path / "deeper")
    assert main(["verify", str(folder / "small"), "--base", str(tmp_path / "deeper")]) == 1
    assert "2 decoder layers, the model 3" in capsys.readouterr().out


def test_after_later_steps_only_shapes_are_checked(made, tmp_path, capsys):
    sparsifier = BarberSparsifier.from_pretrained(made / "small")
    config = BarberConfig(producer="magnitude", pattern="2:4", rebuild="none")
    sparsifier.sparsify(config, tiny_windows(), save_dir=tmp_path / "pruned", quiet=True)
    assert main(["verify", str(tmp_path / "pruned")]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("only shapes were checked: weights have changed since, by prune")
    assert second.startswith("14 modules, pattern 2:4, ")
    with pytest.raises(BarberError, match="weights have changed since, by prune"):
        audit_cut(tmp_path / "pruned", str(made / "dense"))
    edit(tmp_path / "pruned", lambda tensors: tensors["model.layers.0.mlp.up_proj.weight"].fill_(1))
    assert main(["verify", str(tmp_path / "pruned")]) == 1
    assert "model.layers.0.mlp.up_proj: 640 of 640 zeros are lost" in capsys.readouterr().out


def test_a_base_for_what_is_not_shrunk_is_refused(made, capsys):
    assert main(["verify", str(made / "dense"), "--base", str(made / "dense")]) == 2
    assert "base goes with a shrunk or permuted checkpoint" in capsys.readouterr().err
