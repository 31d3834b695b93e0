"""The table of runtimes: whole, equal to its page, and found for every kind of checkpoint."""

import json
import re
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from optimum_barber.base.errors import BarberError
from optimum_barber.checkpoints.runtimes import CHECKED, KINDS, RUNTIMES, kind_of, markdown, report
from optimum_barber.cli import main

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "runtimes.md").read_text(encoding="utf-8")


def quantized(**changes):
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights | changes.pop("weights", {})}}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups, **changes}


def checkpoint(directory, pattern=None, quantization=None):
    """As much of a checkpoint as its kind can be told from."""
    config = {"model_type": "llama"} | ({"quantization_config": quantization} if quantization else {})
    (directory / "config.json").write_text(json.dumps(config))
    if pattern:
        record = {"pattern": pattern, "target_sparsity": 0.5, "sparsity": 0.5, "modules": {}, "ignored": []}
        record |= {key: {} for key in ("producer", "calibration", "base_model", "software")} | {"rebuild": None}
        (directory / "sparsity_config.json").write_text(json.dumps(record))
    return directory


def test_every_runtime_has_a_verdict_of_known_words_on_every_kind():
    for verdicts in RUNTIMES.values():
        assert list(verdicts) == list(KINDS)
        for kind, verdict in verdicts.items():
            assert verdict.loads in ("yes", "converted", "no")
            assert verdict.faster in ("yes", "no", "maybe", "-")
            assert (verdict.faster == "-") == (kind == "dense" or verdict.loads == "no")
            assert verdict.why and "\n" not in verdict.why and "|" not in verdict.why


def test_the_page_is_the_table_of_its_date():
    assert markdown() in PAGE
    assert f"As of {CHECKED}." in PAGE
    assert len(re.findall(r"^\| [a-zA-Z]", PAGE, re.M)) == len(KINDS) * (len(RUNTIMES) + 1)


@pytest.mark.parametrize(
    ("pattern", "quantization", "kind"),
    [
        (None, None, "dense"),
        ("unstructured", None, "unstructured"),
        ("2:4", None, "2:4"),
        ("4:8", None, "N:M"),
        ("2:4", quantized(), "quantized"),
        (None, quantized(weights={"num_bits": 8}), "quantized"),
        ("2:4", quantized(weights={"num_bits": 2}), "quantized"),
    ],
)
def test_the_kind_is_read_from_the_files(tmp_path, pattern, quantization, kind):
    directory = checkpoint(tmp_path, pattern, quantization)
    assert kind_of(directory) == kind
    lines = report(directory).splitlines()
    assert lines[0] == f"{KINDS[kind]}, as of {CHECKED}"
    assert [line.split("  ")[0] for line in lines[2:]] == list(RUNTIMES)
    columns = {
        line.index(verdict.why)
        for line, verdicts in zip(lines[2:], RUNTIMES.values(), strict=True)
        if (verdict := verdicts[kind])
    }
    assert columns == {lines[1].index("why")}


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "gptq", "bits": 4},
        quantized(quant_method="awq"),
        quantized(weights={"type": "float", "num_bits": 8}),
        quantized(weights={"num_bits": 3}),
        quantized(config_groups={}),
    ],
)
def test_an_unknown_quantization_is_refused(tmp_path, quantization):
    with pytest.raises(
        BarberError, match=f"quantized by {quantization['quant_method']} .*: known is compressed-tensors"
    ):
        kind_of(checkpoint(tmp_path, None, quantization))


def test_a_directory_without_config_is_refused(tmp_path):
    with pytest.raises(BarberError, match="config.json cannot be read: No such file"):
        kind_of(tmp_path)


def test_the_command_tells_of_what_we_prune_and_transformers_loads_it_as_it_says(
    tmp_path, model_dir, text_file, capsys
):
    out = str(tmp_path / "out")
    flags = [
        "--calibration",
        str(text_file),
        "--samples",
        "1",
        "--sequence-length",
        "16",
        "--rebuild",
        "none",
        "--quiet",
    ]
    assert main(["prune", str(model_dir), "--pattern", "2:4", *flags, "-o", out]) == 0
    for model, kind in ((out, "2:4"), (str(model_dir), "dense")):
        assert main(["inspect", model, "--targets"]) == 0
        assert capsys.readouterr().out == f"{model}: {report(model)}"
        assert KINDS[kind] in report(model)
    AutoModelForCausalLM.from_pretrained(out)
    (tmp_path / "model.gguf").touch()
    assert main(["inspect", str(tmp_path / "model.gguf"), "--targets"]) == 2
    assert "is a GGUF file: targets are known for safetensors" in capsys.readouterr().err
