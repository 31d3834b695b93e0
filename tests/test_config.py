"""The configuration: checked at once, saved and read as every Hugging Face config."""

import json
from pathlib import Path

import pytest
from jsonschema import validate
from pydantic import ValidationError

import optimum_barber
from optimum_barber.base.calibration import CalibrationConfig
from optimum_barber.base.fields import one_line
from optimum_barber.checkpoints.record import SparsityConfig
from optimum_barber.cli import build_parser
from optimum_barber.cli.prune import config_from
from optimum_barber.prune.rebuild_settings import RebuildConfig
from optimum_barber.prune.rebuilders import REBUILDERS
from optimum_barber.prune.refine.settings import RefineConfig
from optimum_barber.prune.settings import BarberConfig
from optimum_barber.runs.sweep.settings import SweepConfig
from optimum_barber.shrink.settings import ShrinkConfig

SCHEMA = Path(optimum_barber.__file__).parent / "checkpoints" / "sparsity_config.schema.json"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 1.0}, "sparsity 1.0 is outside"),
        ({"pattern": "4:2"}, "pattern '4:2' is not legal"),
        ({"pattern": "2:4", "sparsity": 0.6}, "contradicts pattern 2:4"),
        ({"pattern": "2:4", "rebuild": {"granularity": "input"}}, "granularity 'input' makes no sense"),
        ({"rebuild": {"granularity": "blok"}}, "unknown granularity 'blok': did you mean 'block'"),
        ({"rebuild": {"rebuild_ratio": 1.5}}, "rebuild ratio 1.5 is not legal"),
        ({"rebuild": {"rebuild_ratio": "much"}}, "rebuild ratio 'much' is not legal"),
        ({"rebuild": {"rounds": 0}}, "rounds 0 is not legal"),
        ({"rebuild": {"accept": "never"}}, "unknown acceptance 'never'"),
        ({"rebuild": "barber++"}, "rebuild 'barber.*is not legal"),
        ({"calibration": {"samples": 0}}, "samples 0 is not legal"),
        ({"calibration": {"sequence_length": -1}}, "sequence_length -1 is not legal"),
        ({"sparsty": 0.5}, "sparsty 0.5 is not legal"),
        ({"rebuild": {"preset": "publishd"}}, "unknown preset 'publishd': did you mean 'published-code'"),
    ],
)
def test_faults_are_named_with_value_and_remedy(settings, message):
    with pytest.raises(ValidationError) as caught:
        BarberConfig(**settings)
    assert __import__("re").search(message, str(one_line(caught.value)))


def test_all_faults_come_together():
    with pytest.raises(ValidationError) as caught:
        BarberConfig(calibration={"samples": 0}, seed=-1, rebuild={"metric": "taylor"})
    line = str(one_line(caught.value))
    assert all(part in line for part in ("samples 0", "seed -1", "unknown metric 'taylor'"))
    assert "\n" not in line


def test_save_and_load(tmp_path):
    config = BarberConfig(producer="wanda", pattern="2:4", rebuild={"rounds": 2, "preset": "published-code"})
    config.save_pretrained(tmp_path)
    assert BarberConfig.from_pretrained(tmp_path) == config


OLD = """{
  "producer": "wanda", "producer_args": {}, "sparsity": 0.5, "pattern": null, "allocation": "uniform",
  "allocation_args": {},
  "rebuild": {
    "method": "barber+swaps", "preset": "default", "granularity": "auto", "rebuild_ratio": "auto", "rounds": 1,
    "swaps": 60, "newton_rounds": 2, "shrinkage": 0.3, "metric": "weight_gradient", "expansion": "sparse",
    "reduction": "rms", "pairing": "group", "error": "relative", "accept": "if-better"
  },
  "reconstruct": {
    "method": "none", "iterations": 15, "shrinkage": 0.2, "passes": 4, "learning_rate": 0.0001
  },
  "calibration": ["pydoc", "mine.jsonl"], "text_field": "body", "samples": 16, "sequence_length": 512, "seed": 3,
  "device": "auto", "dtype": "auto", "precision": "highest", "batch_size": null, "ignore": ["*.k_proj"]
}"""


def test_what_version_0_1_0_wrote_is_read(tmp_path):
    (tmp_path / "barber_config.json").write_text(OLD)
    calibration = {"texts": ["pydoc", "mine.jsonl"], "text_field": "body", "samples": 16, "sequence_length": 512}
    assert BarberConfig.from_pretrained(tmp_path) == BarberConfig(
        sparsity=0.5,
        rebuild={"method": "barber+swaps"},
        calibration=calibration,
        seed=3,
        precision="highest",
        ignore=["*.k_proj"],
    )


def test_a_list_of_texts_is_a_calibration():
    texts = BarberConfig(calibration=["c4"])
    assert (
        texts
        == BarberConfig(calibration=CalibrationConfig(texts=["c4"]))
        == BarberConfig(calibration={"texts": ["c4"]})
    )
    with pytest.raises(ValidationError, match="calibration 'c4' is one string: give a list of texts"):
        BarberConfig(calibration="c4")


@pytest.mark.parametrize(
    ("made", "settings", "message"),
    [
        (BarberConfig, {"samples": 16},
         'samples is now calibration.samples: BarberConfig(calibration={"samples": 16})'),
        (ShrinkConfig, {"calibration": ["c4"], "sequence_length": 64},
         'sequence_length is now calibration.sequence_length: '
         'ShrinkConfig(calibration={"texts": ["c4"], "sequence_length": 64})'),
        (RefineConfig, {"samples": 4, "text_field": "body"},
         'text_field is now calibration.text_field, samples is now calibration.samples: '
         'RefineConfig(calibration={"text_field": "body", "samples": 4})'),
        (RefineConfig, {"calibration": {"samples": 1}}, "samples 1 is not legal: at least 2"),
        (ShrinkConfig, {"remove": 0.5, "calibration": {"sequence_length": 1}},
         "sequence_length 1 is not legal: at least 2"),
        (SweepConfig, {"remove": [0.5], "evaluation": "pydoc", "calibration": {"samples": 4}},
         "calibration.samples is an axis of a sweep: SweepConfig(samples=[16, 128])"),
    ],
)  # fmt: skip
def test_calibration_settings_in_the_wrong_place(made, settings, message):
    with pytest.raises(ValidationError) as caught:
        made(**settings)
    assert str(one_line(caught.value)) == message


def test_push_to_hub_uploads_the_file(monkeypatch):
    import huggingface_hub

    sent = {}

    class Api:
        def __init__(self, token=None):
            sent["token"] = token

        def create_repo(self, repo_id, private=None, exist_ok=False):
            return type("Url", (), {"repo_id": f"me/{repo_id}"})

        def upload_file(self, **kwargs):
            sent.update(kwargs)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    BarberConfig(sparsity=0.5).push_to_hub("mine", token="t")
    assert sent["repo_id"] == "me/mine"
    assert json.loads(sent["path_or_fileobj"])["sparsity"] == 0.5


def test_the_command_line_builds_the_same_config():
    args = build_parser().parse_args(
        "prune M --producer sparsegpt --producer-arg damping=0.05 --sparsity 0.6 --rebuild barber+barber --rounds 2 "
        "--granularity layer --rebuild-ratio 0.1 --calibration pydoc --samples 16 --sequence-length 512 -o OUT".split()
    )
    assert config_from(args) == BarberConfig(
        producer="sparsegpt",
        producer_args={"damping": "0.05"},
        sparsity=0.6,
        rebuild={"method": "barber+barber", "rounds": 2, "granularity": "layer", "rebuild_ratio": 0.1},
        calibration={"texts": ["pydoc"], "samples": 16, "sequence_length": 512},
    )


def test_the_default_granularity_depends_on_the_pattern():
    config = BarberConfig(pattern="2:4")
    assert config.rebuild.granularity_for(config.sparsity_pattern()) == "output"
    config = BarberConfig(sparsity=0.5)
    assert config.rebuild.granularity_for(config.sparsity_pattern()) == "block"
    config = BarberConfig(pattern="2:4", rebuild={"granularity": "layer"})
    assert config.rebuild.granularity_for(config.sparsity_pattern()) == "layer"


@pytest.mark.parametrize(
    ("rebuild", "free", "grouped"),
    [
        ({}, "barber+swaps", "swaps+gauss-newton"),
        ({"method": "auto"}, "barber+swaps", "swaps+gauss-newton"),
        ({"swaps": 30}, "barber+swaps", "swaps+gauss-newton"),
        ({"preset": "default", "rebuild_ratio": "auto", "rounds": 1}, "barber+swaps", "swaps+gauss-newton"),
        ({"rebuild_ratio": 0.1}, "barber+swaps", "barber+swaps"),
        ({"method": "auto", "rebuild_ratio": 0.1}, "barber+swaps", "barber+swaps"),
        ({"method": "auto", "preset": "published-code"}, "barber", "barber"),
        ({"preset": "published-code"}, "barber", "barber"),
        ("swaps", "swaps", "swaps"),
        ("none", "none", "none"),
    ],
)
def test_the_default_rebuild_depends_on_the_pattern(rebuild, free, grouped):
    for pattern, method in (("unstructured", free), ("2:4", grouped)):
        config = BarberConfig(sparsity=0.5, pattern=pattern, rebuild=rebuild)
        settled = config.under(config.sparsity_pattern())
        assert settled.rebuild.method == method
        assert settled.rebuild.error == ("absolute" if method in ("barber", "none") else "relative")
        assert BarberConfig.model_validate(json.loads(config.model_dump_json())) == config
        assert BarberConfig.model_validate(json.loads(settled.model_dump_json())) == settled
    assert set(RebuildConfig().chain) == {"barber", "swaps", "gauss-newton"}


def test_a_preset_holds_wherever_it_is_named():
    for rebuild in (RebuildConfig(preset="published-code"), {"preset": "published-code"}):
        result = BarberConfig(sparsity=0.5, rebuild=rebuild).rebuild
        assert (result.expansion, result.accept, result.rebuild_ratio, result.rounds) == ("dense", "always", 0.1, 1)


def test_a_preset_yields_to_what_is_said():
    config = BarberConfig(rebuild={"preset": "published-code", "rebuild_ratio": 0.01, "granularity": "output"})
    rebuild = config.rebuild
    assert (rebuild.expansion, rebuild.accept, rebuild.pairing, rebuild.rounds) == ("dense", "always", "row", 1)
    assert (rebuild.rebuild_ratio, rebuild.granularity) == (0.01, "output")


def test_the_published_schema_is_the_models():
    assert json.loads(SCHEMA.read_text()) == SparsityConfig.model_json_schema()


def test_a_written_config_fits_the_schema(tmp_path):
    from optimum_barber.prune.sparsifier import BarberSparsifier

    from .conftest import tiny_model, tiny_windows

    config = BarberConfig(pattern="2:4", rebuild="none")
    BarberSparsifier(tiny_model()).sparsify(config, tiny_windows(), tmp_path / "out", quiet=True)
    validate(json.loads((tmp_path / "out" / "sparsity_config.json").read_text()), json.loads(SCHEMA.read_text()))


def test_every_rebuilder_of_a_default_chain_exists():
    assert all(name in REBUILDERS for name in BarberConfig(sparsity=0.5).rebuild.chain)
