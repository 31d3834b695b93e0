"""Gains over the same items: from logged samples to the paired standard error."""

import json
import random
from math import sqrt
from pathlib import Path

import pytest

from benchmarks.paired import Gain, gain, gains, items_of, main, together
from optimum_barber.base.errors import BarberError

TASKS = {"easy-test": 40, "open": 15}


def write_log(log: Path, seed: int, tasks: dict[str, int] | None = None) -> Path:
    """What lm-eval leaves of one evaluation, with scores by chance."""
    draw = random.Random(seed)
    (log / "model").mkdir(parents=True)
    for task, items in (tasks or TASKS).items():
        rows = [{"doc_id": i, "metrics": ["acc"], "acc": float(draw.random() < 0.4)} for i in range(items)]
        path = log / "model" / f"samples_{task}_2020-01-01T00-00-00.000000.jsonl"
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return log


def test_samples_are_found_by_task_and_item(tmp_path: Path) -> None:
    result = items_of(write_log(tmp_path / "log", seed=0), "acc")
    assert {task: len(items) for task, items in result.items()} == TASKS
    assert set(result["open"].values()) == {0.0, 1.0}


def test_the_gain_agrees_with_loops_over_masks_and_items(tmp_path: Path) -> None:
    before, after = ([write_log(tmp_path / f"{side}{s}", seed=s + side) for s in range(3)] for side in (10, 20))
    result = gains(before, after, "acc")
    for task, count in TASKS.items():
        one, other = ([items_of(log, "acc")[task] for log in side] for side in (before, after))
        differences = [sum(log[i] for log in other) / 3 - sum(log[i] for log in one) / 3 for i in range(count)]
        average = sum(differences) / count
        spread = sum((d - average) ** 2 for d in differences) / (count - 1)
        assert result[task].after - result[task].before == pytest.approx(average)
        assert result[task].error == pytest.approx(sqrt(spread / count))
    assert result["mean"] == together([result[task] for task in TASKS])


def test_the_same_answers_have_no_error_and_a_shift_has_none_either() -> None:
    items = {0: 0.0, 1: 1.0, 2: 0.5}
    assert gain(items, items) == Gain(0.5, 0.5, 0.0)
    assert gain(items, {item: score + 1 for item, score in items.items()}) == Gain(0.5, 1.5, 0.0)


def test_errors_of_independent_tasks_add_up_as_squares() -> None:
    assert together([Gain(0.2, 0.4, 0.03), Gain(0.4, 0.4, 0.04)]) == Gain(
        pytest.approx(0.3), pytest.approx(0.4), pytest.approx(0.025)
    )


def test_logs_that_cannot_be_paired_are_refused(tmp_path: Path) -> None:
    whole, short = write_log(tmp_path / "a", seed=0), write_log(tmp_path / "b", seed=1, tasks={"easy-test": 39})
    with pytest.raises(BarberError, match="different items of easy-test"):
        gains([whole], [short], "acc")
    with pytest.raises(BarberError, match=r"metric 'f1' is not in samples_easy-test.*: acc"):
        gains([whole], [whole], "f1")
    with pytest.raises(BarberError, match="--log_samples"):
        items_of(tmp_path / "nowhere", "acc")
    (whole / "model" / "samples_open_2020-01-02.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(BarberError, match="several evaluations of open"):
        items_of(whole, "acc")


def test_a_newcomer_reads_a_table_or_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = (str(write_log(tmp_path / name, seed)) for seed, name in enumerate("ab"))
    monkeypatch.setattr("sys.argv", ["paired", "--before", one, "--after", other, "--metrics", "acc"])
    assert main() == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("| mean, acc |")
    monkeypatch.setattr("sys.argv", ["paired", "--before", one, "--after", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "holds no samples" in capsys.readouterr().err
