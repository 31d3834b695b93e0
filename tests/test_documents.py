"""Texts as people have them: encodings, JSON of all kinds, chats, nulls, and files that are none."""

import codecs
import json
import os

import pytest

from optimum_barber.base.errors import BarberError
from optimum_barber.cli import main
from optimum_barber.text.documents import clean, plain_text
from optimum_barber.text.sources import TEXTS, read_texts
from optimum_barber.text.tokens import Encoder

DEEP = b"[" * 100_000 + b"]" * 100_000
HUGE = b'{"text": "one", "count": ' + b"9" * 5000 + b"}\n"
CHAT = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
TEMPLATE = "{{ bos_token }}{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def chatty(tokenizer):
    """The tokenizer, with a chat template."""
    import copy

    other = copy.deepcopy(tokenizer)
    other.chat_template = TEMPLATE
    return other


READ = {
    "byte order mark": ("a.txt", codecs.BOM_UTF8 + b"one", ["one"]),
    "line ends": ("a.txt", b"one\r\ntwo\rthree\n", ["one\ntwo\nthree\n"]),
    "a NUL": ("a.txt", b"one\0two", ["one\0two"]),
    "a lone surrogate in WTF-8": ("a.txt", b"one \xed\xa0\xbd two", ["one \ufffd two"]),
    "a pair of surrogates in CESU-8": ("a.txt", b"\xed\xa0\xbd\xed\xb8\x8c", ["\U0001f60c"]),
    "any suffix is text": ("a.md", b'{"text": 1}', ['{"text": 1}']),
    "mark in front of JSON lines": ("a.jsonl", codecs.BOM_UTF8 + b'{"text": "one"}\n', ["one"]),
    "two files with marks": ("a.jsonl", (codecs.BOM_UTF8 + b'{"text": "one"}\n') * 2, ["one", "one"]),
    "JSON lines with CRLF": ("a.jsonl", b'{"text": "one"}\r\n\r\n{"text": "two"}\r\n', ["one", "two"]),
    "upper case": ("A.JSONL", b'{"text": "one"}\n', ["one"]),
    "ndjson": ("a.NDJson", b'{"text": "one"}\n', ["one"]),
    "strings a line": ("a.jsonl", b'"one"\n"two"\n', ["one", "two"]),
    "nulls and empty ones": ("a.jsonl", b'{"text": null}\n{"text": ""}\nnull\n{"text": "one"}\n', ["", "one"]),
    "a lone surrogate": ("a.jsonl", b'{"text": "hello \\ud83d world"}\n', ["hello \ufffd world"]),
    "a pair of surrogates": ("a.jsonl", b'{"text": "\\ud83d\\ude0c"}\n', ["\U0001f60c"]),
    "a number of 5,000 digits": ("a.jsonl", HUGE, ["one"]),
    "a long line": ("a.jsonl", b'{"text": "' + b"x" * 3_000_000 + b'"}', ["x" * 3_000_000]),
    "array of strings": ("a.json", b'\n["one", null, "two"]\n', ["one", "two"]),
    "array of objects": ("a.JSON", b'[{"text": "one"},\n {"text": "two"}]', ["one", "two"]),
    "lines in .json": ("a.json", b'{"text": "one"}\n{"text": "two"}\n', ["one", "two"]),
}


@pytest.mark.parametrize("case", READ)
def test_a_text_is_read_as_what_it_is(case, tmp_path, tokenizer):
    name, content, documents = READ[case]
    (tmp_path / name).write_bytes(content)
    result = read_texts(str(tmp_path / name), "calibration")
    assert result == documents
    if len(content) < 1_000_000:
        assert len(Encoder(tokenizer).tokens(result))


BAD = {
    "UTF-16": ("a.txt", "some text".encode("utf-16"), "is not UTF-8 (byte 0): save it as UTF-8"),
    "UTF-16 without a mark": ("a.txt", "some text".encode("utf-16-le"), "mostly NUL characters, as UTF-16 is"),
    "UTF-32": ("a.jsonl", '{"text": "one"}'.encode("utf-32"), "is not UTF-8"),
    "compressed": ("a.jsonl", b"\x1f\x8b\x08\0", "is not UTF-8 (byte 1)"),
    "a mark alone": ("a.txt", codecs.BOM_UTF8, "is empty"),
    "nulls alone": ("a.jsonl", b'{"text": null}\n{"text": " "}\n', "is empty"),
    "an empty array": ("a.json", b"[]", "is empty"),
    "deep": ("a.jsonl", DEEP, "line 1 is no legal JSON: it is nested too deeply"),
    "a deep array": ("a.json", DEEP, "is no legal JSON: it is nested too deeply"),
    "broken": ("a.json", b'["one"', "a.json is no JSON"),
    "a number for a text": ("a.jsonl", b'{"text": 5}\n', "line 1 has no text field 'text': legal are a text, messages"),
    "no such field": ("a.jsonl", b'"one"\n{"body": "x", "id": 1}\n', "not an object of body, id"),
    "no object": ("a.json", b"[1]", "item 1 has no text field 'text'"),
    "lists without roles": ("a.jsonl", b'{"text": [{"from": "human", "value": "x"}]}\n', "messages of {role, content}"),
    "messages without a template": ("a.jsonl", json.dumps({"text": CHAT}).encode(), "has no chat template for them"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_text_is_one_line_and_nothing_is_written(case, tmp_path, model_dir, capsys):
    name, content, message = BAD[case]
    (tmp_path / name).write_bytes(content)
    flags = ["--sparsity", "0.5", "--producer", "magnitude", "--rebuild", "none", "--calibration", str(tmp_path / name)]
    assert main(["prune", str(model_dir), *flags, "-o", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_what_is_no_file_is_no_text_and_is_not_waited_for(tmp_path, model_dir, capsys):
    os.mkfifo(tmp_path / "pipe")
    sweep = ["sweep", str(model_dir), "--remove", "0.5", "--evaluation"]
    for path in (tmp_path, tmp_path / "pipe", "/dev/zero"):
        prune = ["prune", str(model_dir), "--sparsity", "0.5", "--calibration", str(path)]
        for command in (prune, [*sweep, str(path)]):
            assert main([*command, "-o", str(tmp_path / "out")]) == 2
            error = capsys.readouterr().err
            assert f"text '{path}' is neither a file nor one of" in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_a_text_that_may_not_be_read_is_one_line(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.txt").write_text("one")
    monkeypatch.setattr("pathlib.Path.read_text", refuse)
    with pytest.raises(BarberError, match=r"a\.txt cannot be read: Permission denied"):
        read_texts(str(tmp_path / "a.txt"), "calibration")


def test_chat_messages_go_through_the_template(tmp_path, chatty):
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n" + json.dumps({"messages": None}) + "\n")
    result = read_texts(str(tmp_path / "a.jsonl"), "calibration", "messages", chatty)
    assert result == ["[user] Why?\n[assistant] So.\n"]  # BOS is for the windows to decide
    assert plain_text(CHAT, "text", chatty, "it") == result[0]


def test_a_template_that_refuses_is_one_line(chatty, monkeypatch):
    monkeypatch.setattr(chatty, "chat_template", "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(BarberError, match="it does not fit the tokenizer's chat template: .*roles must alternate"):
        plain_text(CHAT, "text", chatty, "it")


def test_documents_of_a_source_are_read_alike(tokenizer):
    with TEXTS.temporarily({"mine": lambda split: [None, "one \ud83d", {"text": "two"}, ""]}):
        tokens = Encoder(tokenizer).tokens(read_texts("mine", "calibration"), "text mine")
    assert tokenizer.decode(tokens) == "one \ufffd\n\ntwo\n\n"
    with TEXTS.temporarily({"mine": lambda split: ["one", b"two"]}), pytest.raises(BarberError) as caught:
        Encoder(tokenizer).tokens(read_texts("mine", "calibration"), "text mine")
    assert str(caught.value).startswith("text mine, item 2 has no text field 'text'")


def test_only_surrogates_change():
    text = "a\U0001f60c\ufeff\0\r\n\x85\u2028"
    assert clean(text) is text
    assert clean("\udc00\ud83d\ude0c\ud83d") == "\ufffd\U0001f60c\ufffd"


def test_tasks_out_of_files_are_read_alike(tmp_path):
    pytest.importorskip("lm_eval")
    from optimum_barber.runs.tasks.offline import KINDS

    row = {"question": "q", "choices": ["a", "b"], "gold": 1}
    (tmp_path / "a.jsonl").write_bytes(codecs.BOM_UTF8 + json.dumps(row).encode() + b"\r\n")
    assert KINDS["choice"](str(tmp_path / "a.jsonl")) == [row]
    (tmp_path / "a.json").write_text('["one", null]')
    assert KINDS["rolling"](str(tmp_path / "a.json")) == [{"text": "one"}]
    (tmp_path / "a.jsonl").write_bytes(b"ab\xff")
    with pytest.raises(BarberError, match=r"task file .* is not UTF-8 \(byte 2\)"):
        KINDS["choice"](str(tmp_path / "a.jsonl"))
