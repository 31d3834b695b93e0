"""The Python interface, as in the README."""

import pytest
import torch

import optimum_barber
from optimum_barber import BarberConfig, BarberError, BarberSparsifier
from optimum_barber.cli import main

from .conftest import tiny_model, tiny_windows


def test_every_public_name_exists_and_no_other():
    assert {"BarberSparsifier", "BarberConfig", "perplexity", "verify_checkpoint"} <= set(optimum_barber.__all__)
    assert all(getattr(optimum_barber, name) is not None for name in optimum_barber.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = optimum_barber.no_such_name


def test_command_line_and_api_give_the_same_masks(model_dir, text_file, tmp_path):
    flags = [
        "--sparsity",
        "0.5",
        "--rounds",
        "2",
        "--samples",
        "8",
        "--sequence-length",
        "16",
        "--seed",
        "7",
        "--quiet",
    ]
    assert main(["prune", str(model_dir), *flags, "--calibration", str(text_file), "-o", str(tmp_path / "cli")]) == 0
    config = BarberConfig(
        sparsity=0.5, rebuild={"rounds": 2}, calibration={"samples": 8, "sequence_length": 16}, seed=7
    )
    sparsifier = BarberSparsifier.from_pretrained(model_dir)
    result = sparsifier.sparsify(config, calibration=[text_file.read_text()], quiet=True)
    written = optimum_barber.MaskFile(tmp_path / "cli" / "sparsity_masks.safetensors")
    assert {name: written[name].sha256 for name in written} == {n: m.sha256 for n, m in result.masks.items()}


def test_callbacks_see_every_block(model_dir):
    seen = []
    config = BarberConfig(pattern="2:4", rebuild={"rounds": 1})
    sparsifier = BarberSparsifier.from_pretrained(model_dir)
    result = sparsifier.sparsify(config, calibration=tiny_windows(), callbacks=[seen.append], quiet=True)
    assert [report.block for report in seen] == [
        f"model.layers.{layer}.{block}" for layer in range(2) for block in ("attention", "mlp")
    ]
    assert seen == result.reports
    assert all(report.seconds > 0 and report.peak_memory > 0 for report in seen)


def test_updated_weights_stay_where_kept_and_grown_ones_are_dense(model_dir):
    dense = BarberSparsifier.from_pretrained(model_dir).model
    windows = tiny_windows(8)
    first = BarberSparsifier.from_pretrained(model_dir)
    before = first.sparsify(BarberConfig(producer="sparsegpt", sparsity=0.5, rebuild="none"), windows, quiet=True)
    second = BarberSparsifier.from_pretrained(model_dir)
    rebuild = {"granularity": "layer", "rebuild_ratio": 0.5, "rounds": 1, "accept": "always"}
    config = BarberConfig(producer="sparsegpt", sparsity=0.5, rebuild=rebuild)
    after = second.sparsify(config, windows, quiet=True)
    name = "model.layers.0.self_attn.q_proj"
    was, now = before.masks[name].unpack(), after.masks[name].unpack()
    weights = [model.get_submodule(name).weight for model in (dense, first.model, second.model)]
    assert (now & ~was).any()
    assert torch.equal(weights[2][now & ~was], weights[0][now & ~was])
    assert torch.equal(weights[2][now & was], weights[1][now & was])
    assert not torch.equal(weights[1][was], weights[0][was])


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (torch.zeros(3, dtype=torch.long), "is not legal"),
        (torch.zeros(3, 4), "is not legal"),
        (torch.zeros(0, 4, dtype=torch.long), "is not legal"),
        (torch.zeros(2, 65, dtype=torch.long), "sequence length 65 is more than"),
        (["text"], "needs a tokenizer"),
        ("text", "is one string"),
        (torch.full((2, 8), 300), "has token 300: legal are 0 to 299"),
    ],
)
def test_bad_calibration_is_refused(calibration, message):
    model = tiny_model()
    before = model.state_dict()["model.layers.0.mlp.up_proj.weight"].clone()
    with pytest.raises(BarberError, match=message):
        BarberSparsifier(model).sparsify(BarberConfig(sparsity=0.5), calibration=calibration, quiet=True)
    assert torch.equal(model.state_dict()["model.layers.0.mlp.up_proj.weight"], before)


def test_a_missing_extra_is_answered_by_the_line_that_installs_it(monkeypatch, tmp_path):
    import sys

    from optimum_barber.runs.report import picture

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BarberError, match=r"pip install 'optimum-barber\[report\]'"):
        picture(tmp_path / "x.png", {}, 1.0, [], "")


def test_the_picture_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    from optimum_barber.runs.report import picture

    blocks = [
        {"block": f"model.layers.0.{kind}", "error_before": 2.0, "error_after": 1.0} for kind in ("attention", "mlp")
    ]
    picture(tmp_path / "x.png", {"wanda": {"without": 70.0, "with": 60.0}}, 30.0, blocks, "title")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_the_result_has_the_configured_dtype(model_dir, tmp_path):
    config = BarberConfig(sparsity=0.5, rebuild="none", dtype="float16")
    sparsifier = BarberSparsifier.from_pretrained(model_dir)
    result = sparsifier.sparsify(config, tiny_windows(), tmp_path / "out", quiet=True)
    assert result.sparsity_config.base_model["dtype"] == "float16"
    assert {p.dtype for p in sparsifier.model.parameters()} == {torch.float16}


def test_spellings_of_the_first_version_are_answered_by_the_new_ones(model_dir):
    with pytest.raises(BarberError, match=r"is from_pretrained\(MODEL, stream='always'\)"):
        BarberSparsifier.stream(model_dir)
    config = optimum_barber.ShrinkConfig(remove=0.3)
    with pytest.raises(BarberError, match=r"picture is optimum_barber.runs.report.write_report"):
        optimum_barber.BarberShrinker(tiny_model()).shrink(config, picture=True)
