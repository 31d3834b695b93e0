"""The command line as a user meets it: one line and status 2 for bad input, nothing written."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from optimum_barber.base.calibration import CalibrationConfig
from optimum_barber.base.errors import FailedCheckError
from optimum_barber.cli import COMMANDS, main
from optimum_barber.prune.rebuild_settings import RebuildConfig
from optimum_barber.prune.settings import BarberConfig, ReconstructConfig

from .conftest import tiny_model

QUICK = ["--calibration", "pydoc", "--samples", "8", "--sequence-length", "16", "--quiet"]


def prune(model, output, *flags):
    return main(["prune", str(model), "-o", str(output), *QUICK, *map(str, flags)])


def altered(model_dir, tmp_path, change):
    """A copy of the tiny checkpoint with changed tensors."""
    copy = tmp_path / "altered"
    shutil.copytree(model_dir, copy)
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    return copy


def test_prune_eval_verify(model_dir, tmp_path, capsys):
    output = tmp_path / "out"
    assert main(["prune", str(model_dir), *QUICK[:-1], "--sparsity", "0.5", "-o", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "sparsity            0.5000" in printed
    assert main(["verify", str(output)]) == 0
    assert "all as recorded" in capsys.readouterr().out
    results = tmp_path / "results.json"
    command = ["eval", str(output), "--perplexity", "pydoc", "--sequence-length", "32", "--windows", "3", "--quiet"]
    assert main([*command, "--json", str(results)]) == 0
    printed = capsys.readouterr().out
    assert "windows of 32 tokens, 3 of" in printed
    assert f"{model_dir} (dense)" in printed
    rows = json.loads(results.read_text())
    assert [row["dense_baseline"] for row in rows] == [True, False]
    assert {row["sequence_length"] for row in rows} == {32}


def test_eval_measures_on_every_text_that_is_named(model_dir, text_file, tmp_path, capsys):
    results, texts = tmp_path / "results.json", ["pydoc", str(text_file)]
    flags = ["--sequence-length", "32", "--windows", "2", "--quiet", "--json", str(results)]
    alone = []
    for text in texts:
        assert main(["eval", str(model_dir), "--perplexity", text, *flags]) == 0
        alone += json.loads(results.read_text())
    capsys.readouterr()
    assert main(["eval", str(model_dir), "--perplexity", texts[0], "--perplexity", texts[1], *flags]) == 0
    assert json.loads(results.read_text()) == alone
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in printed[::2]] == texts and len(printed) == 4


def test_eval_loads_each_model_once_and_tells_a_row_that_is_not_finite_by_its_text(
    model_dir, text_file, tmp_path, monkeypatch, capsys
):
    from optimum_barber.runs import evaluate

    loaded, load, measure = [], evaluate.load_model, evaluate.perplexity

    def counted(reference, *args, **kwargs):
        loaded.append(reference.name)
        return load(reference, *args, **kwargs)

    def failing(model, windows, quiet):
        if windows.source == "pydoc":
            raise FailedCheckError("perplexity on pydoc is not finite")
        return measure(model, windows, quiet)

    monkeypatch.setattr(evaluate, "load_model", counted)
    monkeypatch.setattr(evaluate, "perplexity", failing)
    results = tmp_path / "results.json"
    texts = ["--perplexity", "pydoc", "--perplexity", str(text_file), "--perplexity", "pydoc"]
    flags = ["--sequence-length", "32", "--windows", "2", "--quiet", "--json", str(results)]
    assert main(["eval", str(model_dir), *texts, *flags]) == 1
    rows = json.loads(results.read_text())
    assert [row["text"] for row in rows] == ["pydoc", str(text_file)] and loaded == [str(model_dir)]
    assert rows[0]["perplexity"] is None and rows[0]["error"].startswith("perplexity on pydoc")
    said = capsys.readouterr()
    assert f"perplexity on {text_file}" in said.out and "pydoc" not in said.out
    assert said.err.count("perplexity on pydoc is not finite") == 1


def test_eval_keeps_what_it_measured_before_a_fault(model_dir, text_file, tmp_path, monkeypatch, capsys):
    from optimum_barber.runs import evaluate

    measure, results = evaluate.perplexity, tmp_path / "results.json"

    def interrupted(model, windows, quiet):
        if windows.source == "pydoc":
            raise KeyboardInterrupt
        return measure(model, windows, quiet)

    monkeypatch.setattr(evaluate, "perplexity", interrupted)
    flags = ["--sequence-length", "32", "--windows", "2", "--quiet", "--json", str(results)]
    assert main(["eval", str(model_dir), "--perplexity", str(text_file), "--perplexity", "pydoc", *flags]) == 130
    assert [row["text"] for row in json.loads(results.read_text())] == [str(text_file)]
    assert f"perplexity on {text_file}" in capsys.readouterr().out


def test_eval_tells_the_fault_of_a_later_text_before_it_measures(model_dir, text_file, tmp_path, monkeypatch, capsys):
    from optimum_barber.runs import evaluate

    monkeypatch.setattr(evaluate, "perplexity", None)  # would fail if it were called
    flags = ["--sequence-length", "32", "--quiet", "--perplexity", str(text_file), "--perplexity"]
    short = tmp_path / "short.txt"
    short.write_text("few words")
    assert main(["eval", str(model_dir), *flags, str(short)]) == 2
    assert "short.txt" in capsys.readouterr().err
    assert main(["eval", "/no/such/model", *flags, "nowhere.txt"]) == 2
    assert "text 'nowhere.txt' is neither a file nor one of" in capsys.readouterr().err


def test_eval_writes_its_json_through_a_link(model_dir, tmp_path):
    link, target = tmp_path / "link.json", tmp_path / "target.json"
    target.write_text("old")
    link.symlink_to(target)
    flags = ["--sequence-length", "32", "--windows", "2", "--quiet", "--json", str(link)]
    assert main(["eval", str(model_dir), "--perplexity", "pydoc", *flags]) == 0
    assert link.is_symlink() and json.loads(target.read_text())[0]["windows"] == 2


def test_a_chain_of_tools(model_dir, tmp_path, capsys):
    """SparseGPT's own result, read back by its zeros and by its mask file, rebuilt under its pattern."""
    first = tmp_path / "first"
    assert prune(model_dir, first, "--producer", "sparsegpt", "--pattern", "2:4", "--rebuild", "none") == 0
    by_zeros, by_file = tmp_path / "zeros", tmp_path / "file"
    assert prune(model_dir, by_zeros, "--producer", "existing", "--sparse-model", first) == 0
    assert prune(model_dir, by_file, "--producer", "masks", "--masks", first / "sparsity_masks.safetensors") == 0
    records = [json.loads((path / "sparsity_config.json").read_text()) for path in (first, by_zeros, by_file)]
    assert [record["pattern"] for record in records] == ["2:4"] * 3
    assert records[1]["modules"] == records[2]["modules"] != records[0]["modules"]
    assert [main(["verify", str(path)]) for path in (by_zeros, by_file)] == [0, 0]
    flags = ["--producer", "masks", "--masks", first / "sparsity_masks.safetensors", "--sparsity", "0.5"]
    assert prune(model_dir, tmp_path / "stated", *flags) == 0
    assert json.loads((tmp_path / "stated" / "sparsity_config.json").read_text())["pattern"] == "2:4"
    capsys.readouterr()
    flags = ["--producer", "existing", "--sparse-model", first, "--overwrite"]
    assert prune(model_dir, first, *flags) == 2
    assert "is the input" in capsys.readouterr().err
    assert prune(model_dir, tmp_path / "x", "--producer", "existing", "--sparse-model", first, "--sparsity", 0.7) == 2
    assert "sparsity 0.7 contradicts the masks of 'existing': 0.5" in capsys.readouterr().err


def test_verify_fails_with_the_offending_module(model_dir, tmp_path, capsys):
    output = tmp_path / "out"
    assert prune(model_dir, output, "--pattern", "2:4", "--rebuild", "none") == 0
    tensors = load_file(output / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"].fill_(1)
    save_file(tensors, output / "model.safetensors", {"format": "pt"})
    assert main(["verify", str(output)]) == 1
    assert "model.layers.0.mlp.up_proj: 768 of 768 zeros are lost" in capsys.readouterr().out
    assert main(["verify", str(model_dir)]) == 2


BAD = [
    (["--sparsity", "0"], "sparsity 0.0 is outside"),
    (["--sparsity", "1"], "sparsity 1.0 is outside"),
    (["--sparsity", "half"], "sparsity 'half'"),
    ([], "sparsity is missing"),
    (["--pattern", "4:2"], "pattern '4:2' is not legal"),
    (["--pattern", "2:0"], "pattern '2:0' is not legal"),
    (["--pattern", "x"], "pattern 'x' is not legal"),
    (["--pattern", "2:4", "--sparsity", "0.6"], "sparsity 0.6 contradicts pattern 2:4"),
    (["--pattern", "3:5"], "pattern 3:5 does not fit model.layers.0.self_attn.q_proj: its width 32"),
    (["--pattern", "2:4", "--granularity", "input"], "granularity 'input' makes no sense"),
    (["--sparsity", ".5", "--rebuild-ratio", "2"], "rebuild ratio '2' is not legal"),
    (["--sparsity", ".5", "--producer", "wandda"], "unknown producer 'wandda': did you mean 'wanda'"),
    (["--sparsity", ".5", "--producer", "existing"], "producer 'existing' needs --sparse-model"),
    (["--sparsity", ".5", "--masks", "x"], "--masks goes with --producer masks"),
    (["--producer", "masks", "--masks", "/none"], "mask file /none does not exist"),
    (["--sparsity", ".5", "--producer-arg", "x"], "producer-arg 'x' is not legal"),
    (["--sparsity", ".5", "--producer-arg", "x=1"], "producer 'wanda' takes no argument 'x'"),
    (["--sparsity", ".5", "--rebuild", "barbr"], "unknown rebuilder 'barbr': did you mean 'barber'"),
    (["--sparsity", ".5", "--granularity", "blok"], "unknown granularity 'blok': did you mean 'block'"),
    (["--sparsity", ".5", "--samples", "0"], "samples 0 is not legal"),
    (["--sparsity", ".5", "--samples", "few"], "samples 'few' is not legal"),
    (["--sparsity", ".5", "--sequence-length", "0"], "sequence_length 0 is not legal"),
    (["--sparsity", ".5", "--sequence-length", "65"], "sequence length 65 is more than the model's 64 positions"),
    (["--sparsity", ".5", "--calibration", "/none.txt"], "text '/none.txt' is neither a file nor one of"),
    (["--sparsity", ".5", "--ignore", "lm_head"], "ignore 'lm_head' matches no Linear"),
    (["--sparsity", ".5", "--device", "tpu9"], "device 'tpu9' is not at hand"),
    (["--sparsity", ".5", "--dtype", "int8"], "unknown dtype 'int8'"),
    (["--sparsity", ".01"], "sparsity 0.01 prunes nothing"),
    (["--sparsity", ".5", "--seed", "99999999999999999999"], "seed 99999999999999999999 is not legal"),
    (["--sparsity", ".5", "--producer", "sparsegpt", "--producer-arg", "block_size=0"], "block_size 0 of producer"),
    (["--sparsity", ".5", "--producer", "sparsegpt", "--producer-arg", "damping=nan"], "damping nan of producer"),
    (["--sparsity", ".5", "--calibration", "x" * 300], "is neither a file nor one of"),
]


@pytest.mark.parametrize(("flags", "message"), BAD, ids=lambda value: str(value)[:60])
def test_bad_input_is_one_line_and_nothing_is_written(model_dir, tmp_path, capsys, flags, message):
    assert prune(model_dir, tmp_path / "out", *flags) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
    assert list(tmp_path.iterdir()) == []


def test_bad_models_are_one_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.bin").touch()
    config = transformers.T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8, vocab_size=50)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    bert = transformers.BertConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    transformers.BertForMaskedLM(bert).save_pretrained(tmp_path / "bert")
    for name, message in [
        (tmp_path / "empty", "holds neither config.json nor one GGUF file"),
        (tmp_path / "file.bin", "is a file but no GGUF file"),
        ("installed:nobody_has_this", "no package 'nobody_has_this' is installed"),
        ("no-such-org/no-such-model", "cannot be had from the hub"),
        (tmp_path / "t5", "is not a causal LM but T5ForConditionalGeneration"),
        (tmp_path / "bert", "is not a causal LM but BertForMaskedLM"),
    ]:
        assert prune(name, tmp_path / "out", "--sparsity", "0.5") == 2
        error = capsys.readouterr().err.strip()
        assert message in error
        assert "\n" not in error
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 5}, "cannot be"),
        ({"hidden_act": "no_such"}, "cannot be loaded"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "cannot be"),
        ({"intermediate_size": 64}, "mlp.down_proj.weight has shape (32, 48), its config says (32, 64)"),
    ],
)
def test_sick_configurations_are_one_line(model_dir, tmp_path, capsys, change, message):
    copy = tmp_path / "altered"
    shutil.copytree(model_dir, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **change}))
    assert prune(copy, tmp_path / "out", "--sparsity", "0.5") == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error


def test_truncated_weights_are_one_line(model_dir, tmp_path, capsys):
    copy = tmp_path / "altered"
    shutil.copytree(model_dir, copy)
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-500])
    for flags, message in (([], "model.safetensors is truncated"), (["--stream", "never"], "cannot be loaded")):
        assert prune(copy, tmp_path / "out", "--sparsity", "0.5", *flags) == 2
        error = capsys.readouterr().err.strip()
        assert message in error
        assert "\n" not in error


def test_sick_weights_are_named(model_dir, tmp_path, capsys):
    def nan(tensors):
        tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = torch.nan

    assert prune(altered(model_dir, tmp_path, nan), tmp_path / "out", "--sparsity", "0.5") == 2
    assert "NaN or Inf in model.layers.1.mlp.down_proj.weight" in capsys.readouterr().err


def test_a_linear_without_weights_is_named(model_dir, tmp_path, capsys):
    def zero(tensors):
        tensors["model.layers.1.mlp.down_proj.weight"].zero_()

    assert prune(altered(model_dir, tmp_path, zero), tmp_path / "out", "--sparsity", "0.5") == 2
    assert "nothing to prune in model.layers.1.mlp.down_proj" in capsys.readouterr().err


def test_missing_weights_are_refused_not_invented(model_dir, tmp_path, capsys):
    def lose(tensors):
        del tensors["model.layers.1.mlp.down_proj.weight"]

    assert prune(altered(model_dir, tmp_path, lose), tmp_path / "out", "--sparsity", "0.5") == 2
    assert "lacks weights, which would be random: model.layers.1.mlp.down_proj.weight" in capsys.readouterr().err


def test_mask_files_of_another_model_are_refused(model_dir, tmp_path, capsys, tokenizer):
    other = tmp_path / "other"
    tiny_model(num_hidden_layers=1, intermediate_size=64).save_pretrained(other)
    tokenizer.save_pretrained(other)
    assert prune(other, tmp_path / "masks", "--pattern", "2:4", "--rebuild", "none") == 0
    file = tmp_path / "masks" / "sparsity_masks.safetensors"
    assert prune(model_dir, tmp_path / "out", "--producer", "masks", "--masks", file) == 2
    assert "has no module model.layers.1.self_attn.q_proj" in capsys.readouterr().err
    flags = ["--ignore", "model.layers.1.*"]
    assert prune(model_dir, tmp_path / "out", "--producer", "masks", "--masks", file, *flags) == 2
    assert "mlp.gate_proj has shape (64, 32), the model's is (48, 32)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_eval_refuses_what_prune_refuses(model_dir, capsys):
    for flags, message in [
        (["--windows", "0"], "windows 0 is not legal"),
        (["--windows", "10000"], "windows 10000 is not legal"),
        (["--sequence-length", "1"], "sequence length 1 is not legal"),
        (["--dtype", "half"], "unknown dtype 'half'"),
        (["--sequence-length", "x"], "sequence length x is not legal"),
        (["--json", "/no/such/folder/x.json"], "cannot be written"),
        (["--json", "/tmp"], "json /tmp cannot be written: it is a folder"),
    ]:
        command = ["eval", str(model_dir), "--perplexity", "pydoc", "--quiet", "--sequence-length", "32"]
        assert main([*command, *flags]) == 2
        assert message in capsys.readouterr().err


def test_inspect_tells_what_was_found(model_dir, capsys):
    assert main(["inspect", str(model_dir)]) == 0
    printed = capsys.readouterr().out
    assert "llama (table)" in printed
    assert "2 x LlamaDecoderLayer in model.layers" in printed
    assert "self_attn.k_proj 16x32" in printed


def test_plugins_tells_who_registered_what(capsys):
    assert main(["plugins"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"wanda +built-in +\S+ +ok +needs input_norm", printed)
    assert "takes damping=0.01, block_size=128, update=True" in printed


@pytest.mark.parametrize(
    ("flag", "texts"),
    [
        ("--help", ("--producer", "--pattern", "--effort", "--calibration", "--help-all", "(default: wanda)")),
        (
            "--help-all",
            ("--producer", "--rebuild-ratio", "--rounds", "--calibration", "(default: sparse)"),
        ),
    ],
)
def test_help_is_light(flag, texts):
    """Neither the package nor its help may import torch or transformers."""
    script = (
        "import sys, optimum_barber, optimum_barber.cli\n"
        f"try: optimum_barber.cli.main(['prune', {flag!r}])\n"
        "except SystemExit: pass\n"
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0
    for text in texts:
        assert text in done.stdout


def help_of(command, flag, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, flag])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_the_short_help_has_the_flags_of_daily_use(capsys):
    short = help_of("prune", "--help", capsys)
    flags = set(re.findall(r"^  (?:-\w \w+, )?(--[\w-]+)", short, re.MULTILINE))
    assert 10 <= len(flags) <= 15
    everything = help_of("prune", "--help-all", capsys)
    assert flags < set(re.findall(r"--[\w-]+", everything))
    assert help_of("prune", "--help", capsys) == short


def test_every_setting_has_a_flag_with_a_metavar_of_its_own(capsys):
    from optimum_barber.base.flag_names import FLAGS
    from optimum_barber.cli.prune import MASKS

    everything = help_of("prune", "--help-all", capsys)
    nested = {"rebuild", "reconstruct", "calibration"}
    names = [*(set(BarberConfig.model_fields) - nested), *RebuildConfig.model_fields, *CalibrationConfig.model_fields]
    assert set(MASKS) < set(names)
    for name in names:
        flag = FLAGS.get(name, ["--" + name.removesuffix("s" if name.endswith("_args") else "").replace("_", "-")])[0]
        assert re.search(rf"^  {flag}\s", everything, re.MULTILINE), flag
    for name in ReconstructConfig.model_fields:
        assert ("--reconstruct-" + name.replace("_", "-") in everything) == (name != "method")
    for command in COMMANDS:
        text = help_of(command, "--help", capsys)
        assert " X" not in text
        assert "Undefined" not in text


def test_skip_layers_is_gone(model_dir, tmp_path, capsys):
    assert main(["shrink", str(model_dir), "--remove", "0.3", "--skip-layers", "1", "-o", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error == "optimum-barber: --skip-layers was removed in 0.2.0: all layers are cut to the same width\n"
