"""Reading a recipe strictly: values, lines, overrides, variables."""

import pytest

from optimum_barber.base.errors import BarberError
from optimum_barber.runs.recipe.document import parse_document, parse_value, read_document
from optimum_barber.runs.recipe.variables import apply_settings, substitute


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2:4", "2:4"),
        ("1:30", "1:30"),
        ("0.5", 0.5),
        (".5", 0.5),
        ("1e-4", 1e-4),
        ("16", 16),
        ("-3", -3),
        ("true", True),
        ("no", "no"),
        ("on", "on"),
        ("", None),
        ("~", None),
        ("2026-01-01", "2026-01-01"),
        ("0x10", "0x10"),
        ("'5'", "5"),
        ("[a, 1]", ["a", 1]),
        ("{a: 2:4}", {"a": "2:4"}),
    ],
)
def test_plain_values_mean_what_they_look_like(text, value):
    assert parse_value(text) == value
    assert type(parse_value(text)) is type(value)


def test_every_value_has_its_line():
    document = parse_document("model: x\nstages:\n  - prune:\n      sparsity: 0.5\n  - merge\n", "r.yaml")
    assert document.content == {"model": "x", "stages": [{"prune": {"sparsity": 0.5}}, "merge"]}
    assert document.line(("stages", 0, "prune", "sparsity")) == 4
    assert document.line(("stages", 1)) == 5
    assert document.line(("stages", 0, "prune", "pattern")) == 3
    assert document.line(("output",)) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &x [1]\nb: *x\n", "r.yaml:1: aliases are not allowed"),
        ("a: !!python/object:os.system {}\n", "r.yaml:1: tag 'tag:yaml.org,2002:python/object:os.system'"),
        ("a: !mine 5\n", "r.yaml:1: tag '!mine'"),
        ("a: 1\nb: 2\na: 3\n", "r.yaml:3: 'a' is given twice"),
        ("a: [1\nb: 2\n", "r.yaml:2: no YAML"),
        ("a: 1\n--- \nb: 2\n", "r.yaml:2: no YAML"),
        ("? [a, b]\n: 1\n", "r.yaml:1: a key must be a plain word"),
        ("[" * 3000, "r.yaml: nested too deeply"),
        ("a: \x01\n", "r.yaml: no YAML"),
    ],
)
def test_what_is_refused_names_its_line(text, message):
    with pytest.raises(BarberError) as raised:
        parse_document(text, "r.yaml")
    assert str(raised.value).startswith(message)


def test_a_bomb_of_aliases_is_refused_at_once():
    bomb = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
    with pytest.raises(BarberError, match="aliases"):
        parse_document(bomb, "r.yaml")


def test_unreadable_files_are_named(tmp_path):
    binary, large = tmp_path / "b.yaml", tmp_path / "l.yaml"
    binary.write_bytes(b"\xff\xfe")
    large.write_bytes(b"#" * (2**20 + 1))
    for path, message in ((tmp_path / "none.yaml", "cannot be read"), (binary, "not UTF-8"), (large, "bytes large")):
        with pytest.raises(BarberError, match=message):
            read_document(path)


def recipe():
    return {"model": "m", "stages": [{"prune": {"sparsity": 0.5}}, {"evaluate": None}, {"evaluate": {"limit": 3}}]}


def test_settings_lie_over_the_file():
    content = recipe()
    apply_settings(
        content,
        ["prune.sparsity=0.6", "prune.rebuild.rounds=2", "evaluate[1].limit=5", "calibration.texts=[a, b]", "model=n"],
    )
    assert content == {
        "model": "n",
        "calibration": {"texts": ["a", "b"]},
        "stages": [
            {"prune": {"sparsity": 0.6, "rebuild": {"rounds": 2}}},
            {"evaluate": {"limit": 5}},
            {"evaluate": {"limit": 3}},
        ],
    }


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("prune.sparsity", "path=value"),
        ("prnue.sparsity=1", "did you mean 'prune'"),
        ("evaluate.limit=1", "evaluate[1] to evaluate[2]"),
        ("evaluate[3].limit=1", "there are 2 evaluate stages"),
        ("prune=1", "unknown place"),
        ("prune.sparsity.x=1", "holds no settings"),
        ("model=[", "no YAML"),
    ],
)
def test_a_setting_without_a_place_is_refused(setting, message):
    with pytest.raises(BarberError) as raised:
        apply_settings(recipe(), [setting])
    assert message in str(raised.value)


def test_variables_keep_their_type_where_they_stand_alone():
    value, faults = substitute({"a": "${n}", "b": ["x-${n}.txt", 3]}, {"n": 5})
    assert value == {"a": 5, "b": ["x-5.txt", 3]}
    assert faults == []
    _, faults = substitute({"a": ["${textt}"]}, {"text": "t"})
    assert faults[0][0] == ("a", 0)
    assert "did you mean 'text'" in faults[0][1]
