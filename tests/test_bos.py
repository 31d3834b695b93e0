"""Which windows begin with BOS, and tokens that a model has no embeddings for."""

import copy
import json

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from optimum_barber import BarberConfig, BarberError, BarberSparsifier, CalibrationConfig, OwnTextConfig, own_documents
from optimum_barber.base.calibration import BOS
from optimum_barber.cli import main
from optimum_barber.runs.evaluate import evaluation_windows
from optimum_barber.text.sources import TEXTS
from optimum_barber.text.tokens import Encoder
from optimum_barber.text.training import training_windows
from optimum_barber.text.windows import calibration_windows, windows_for

from .conftest import tiny_model

LENGTH = 12
TEXT = "some words of a text that is long enough for several windows, and then a few more. " * 12


@pytest.fixture(scope="module")
def adding(tokenizer):
    """The tokenizer, which puts BOS in front of a text as LLaMA's and Gemma's do."""
    other = copy.deepcopy(tokenizer)
    other._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert other("a")["input_ids"][0] == 1
    return other


@pytest.fixture(scope="module")
def adding_dir(tmp_path_factory, adding):
    directory = tmp_path_factory.mktemp("adding")
    tiny_model().save_pretrained(directory)
    adding.save_pretrained(directory)
    return directory


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return str(tmp_path / "text.txt")


def consecutive(tokenizer, bos, begins, count=3):
    """Consecutive windows of the text by a loop over single tokens."""
    ids = list(tokenizer(TEXT, add_special_tokens=False)["input_ids"])
    if bos == "once" and begins:
        ids = [1, *ids]
    windows, place = [], 0
    while place < len(ids):
        window = [1] if bos == "always" or (bos == "auto" and begins) else []
        while len(window) < LENGTH and place < len(ids):
            window.append(ids[place])
            place += 1
        windows.append(window)
    whole = [window for window in windows if len(window) == LENGTH]
    return whole[:: len(whole) // count][:count]


@pytest.mark.parametrize("bos", BOS)
@pytest.mark.parametrize("begins", [True, False])
def test_evaluation_begins_where_it_should(bos, begins, tokenizer, adding, text):
    settings = CalibrationConfig(sequence_length=LENGTH, bos=bos)
    windows = evaluation_windows(text, adding if begins else tokenizer, tiny_model(), settings, 3)
    assert windows.tokens.tolist() == consecutive(tokenizer, bos, begins)
    assert windows.bos == (bos == "always" or (bos == "auto" and begins))
    assert windows.as_dict().get("bos", False) == windows.bos


@pytest.mark.parametrize("bos", BOS)
def test_a_tokenizer_that_adds_none_gives_what_it_gave(bos, tokenizer, text):
    windows = calibration_windows([text], Encoder(tokenizer, bos=bos), samples=4, length=LENGTH, seed=3)
    if bos == "always":
        assert (windows.tokens[:, 0] == 1).all() and "bos" in windows.as_dict()
    else:
        plain = calibration_windows([text], Encoder(tokenizer), samples=4, length=LENGTH, seed=3)
        assert windows.fingerprint == plain.fingerprint and set(windows.as_dict()) == {
            "source", "samples", "sequence_length", "fingerprint"
        }  # fmt: skip


@pytest.mark.parametrize("bos", BOS)
def test_calibration_of_all_kinds_of_text_begins_alike(bos, adding, text):
    """Behind BOS a window is a piece of the text, of `LENGTH` tokens with it."""
    documents = [f"{number}: {TEXT}" for number in range(9)]
    encoder = Encoder(adding, bos=bos)
    with TEXTS.temporarily({"c4": lambda split: documents}):
        both = calibration_windows(["c4", text], encoder, samples=8, length=LENGTH, seed=0).tokens
        train, held_out = training_windows(["c4", text], encoder, samples=8, length=LENGTH, seed=0, held_out=0.3)
    settings = CalibrationConfig(samples=5, sequence_length=LENGTH, bos=bos)
    listed = windows_for(tiny_model(), adding, settings, 0, [TEXT]).tokens
    for tokens in (both, train.tokens, held_out.tokens, listed):
        assert tokens.shape[1] == LENGTH
        for window in tokens.tolist():
            if bos in ("auto", "always"):
                assert window.pop(0) == 1
            assert bos == "once" or 1 not in window
            assert any(adding.decode(window, skip_special_tokens=True) in document for document in documents)


def test_bos_of_the_text_itself_is_not_doubled(adding):
    tokens = adding("<s><s>word")["input_ids"]
    assert tokens[:3] == [1, 1, 1]
    for bos, expected in (("auto", 0), ("always", 0), ("never", 0), ("once", 3)):
        assert Encoder(adding, bos=bos).tokens(["<s><s>word"]).tolist().count(1) == expected


def test_a_window_needs_room_behind_bos(adding, tokenizer):
    with pytest.raises(BarberError, match="sequence length 1 is not legal: at least 2, the first is the BOS token"):
        Encoder(adding).room(1)
    assert Encoder(tokenizer).room(1) == 1
    without = copy.deepcopy(tokenizer)
    without.bos_token = None
    assert Encoder(without).room(8) == 8
    with pytest.raises(BarberError, match="bos 'always' is not legal: the tokenizer has no BOS token"):
        Encoder(without, bos="always").room(8)


def test_the_commands_take_it_and_the_record_tells(adding_dir, model_dir, text, tmp_path, capsys):
    flags = ["--sparsity", "0.5", "--calibration", text, "--samples", "3", "--sequence-length", str(LENGTH), "--quiet"]
    records = {}
    for bos in BOS:
        out = tmp_path / bos
        assert main(["prune", str(adding_dir), *flags, "--rebuild", "none", "--bos", bos, "-o", str(out)]) == 0
        records[bos] = json.loads((out / "sparsity_config.json").read_text())["calibration"]
    assert [records[bos].get("bos") for bos in BOS] == [True, True, None, None]
    assert records["auto"]["fingerprint"] == records["always"]["fingerprint"] != records["never"]["fingerprint"]
    assert main(["prune", str(model_dir), *flags, "--rebuild", "none", "-o", str(tmp_path / "plain")]) == 0
    assert "bos" not in json.loads((tmp_path / "plain" / "sparsity_config.json").read_text())["calibration"]
    capsys.readouterr()
    evaluate = ["eval", "--perplexity", text, "--sequence-length", str(LENGTH), "--json", str(tmp_path / "a.json")]
    assert main([*evaluate, str(adding_dir)]) == 0
    assert f"windows of {LENGTH} tokens" in (told := capsys.readouterr().out) and "each begins with BOS" in told
    assert json.loads((tmp_path / "a.json").read_text())[0]["bos"] is True
    assert main([*evaluate, str(adding_dir), "--bos", "once"]) == 0
    assert "begins with BOS" not in capsys.readouterr().out
    assert "bos" not in json.loads((tmp_path / "a.json").read_text())[0]
    assert main([*evaluate, str(adding_dir), "--bos", "offen"]) == 2
    assert "unknown bos 'offen'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def larger(tokenizer):
    """The tokenizer with a token more than the model has embeddings for."""
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["<extra>"])
    return other


def test_a_token_without_an_embedding_is_named_before_any_work(larger, tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path / "model")
    larger.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT + "<extra> " + TEXT)
    text, model = str(tmp_path / "text.txt"), str(tmp_path / "model")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {model}\ncalibration: {{texts: ['{text}'], samples: 2, sequence_length: 8}}\n"
        f"stages:\n  - lora: {{steps: 1, rank: 1}}\noutput: {tmp_path / 'run'}\n"
    )
    for command in (
        ["prune", model, "--sparsity", "0.5", "--calibration", text, "-o", str(tmp_path / "out")],
        ["shrink", model, "--remove", "0.2", "--calibration", text, "-o", str(tmp_path / "out")],
        ["eval", model, "--perplexity", text],
        ["run", str(recipe)],
    ):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1, error
        assert f"text {text} has token 300 ('<extra>'): legal are 0 to 299" in error
        assert "resize the embedding" in error
    assert not (tmp_path / "out").exists()


def test_a_token_is_legal_once_the_model_has_an_embedding(larger, tokenizer):
    documents, config = [f"<extra> {TEXT}"], BarberConfig(sparsity=0.5, rebuild="none")
    settings = {"calibration": CalibrationConfig(samples=2, sequence_length=8)}
    with pytest.raises(BarberError, match="calibration has token 300"):
        BarberSparsifier(tiny_model(), larger).sparsify(config.model_copy(update=settings), documents)
    model = tiny_model()
    model.resize_token_embeddings(301)
    BarberSparsifier(model, larger).sparsify(config.model_copy(update=settings), documents, quiet=True)
    with pytest.raises(BarberError, match="start has token 300"):
        own_documents(tiny_model(), larger, OwnTextConfig(tokens=4, start="<extra>"), quiet=True)
    assert torch.is_tensor(Encoder(tokenizer, 300).tokens(documents))


def test_all_settings_hold_it(tmp_path):
    pytest.importorskip("lm_eval")
    from optimum_barber.integrations.lm_eval.arguments import barber_config, shrink_config
    from optimum_barber.runs.recipe.validation import read_recipe

    assert barber_config({"sparsity": 0.5, "bos": "once"}).calibration.bos == "once"
    assert shrink_config({"remove": 0.5, "bos": "never"}).calibration.bos == "never"
    with pytest.raises(BarberError, match="unknown bos 'on'"):
        barber_config({"sparsity": 0.5, "bos": "on"})
    (tmp_path / "recipe.yaml").write_text(
        "model: m\ncalibration: {texts: [pydoc], bos: always}\nstages: [{prune: {sparsity: 0.5}}]\noutput: o\n"
    )
    assert read_recipe(tmp_path / "recipe.yaml").barber_config().calibration.bos == "always"
    with pytest.raises(ValueError, match="bos is now calibration.bos: BarberConfig.*once"):
        BarberConfig(sparsity=0.5, bos="once")
