"""Compare two sets of masks on tasks item by item, from the samples that lm-eval logs.

    python -m benchmarks.paired --before LOG [LOG ...] --after LOG [LOG ...] [--metrics acc,acc_norm]

A LOG is an `--output_path` of `lm-eval run --log_samples`. Prints a line of a Markdown table for each task and one for
their mean, in percent: the score before and after, averaged over the masks of each side, and the gain with its
standard error. Both sides answer the same items. So the error is that of the differences, which is smaller than the
errors of the two scores.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from statistics import mean, stdev

from optimum_barber.base.errors import BarberError

from .table import emit

Items = dict[int, float]  # score by item


@dataclass(frozen=True)
class Gain:
    """Mean scores of the same items before and after, and the standard error of their difference."""

    before: float
    after: float
    error: float


def items_of(log: Path, metric: str) -> dict[str, Items]:
    """The score of every item, by task.

    Raises:
        BarberError: no samples lie there, or those of several evaluations of one task, or without the metric.
    """
    result: dict[str, Items] = {}
    for path in sorted(log.rglob("samples_*.jsonl")):
        task = path.stem.removeprefix("samples_").rpartition("_")[0]
        if task in result:
            raise BarberError(f"log {log} holds samples of several evaluations of {task}: name one of them")
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if not all(metric in row for row in rows):
            raise BarberError(f"metric {metric!r} is not in {path.name}: {', '.join(rows[0]['metrics'])}")
        result[task] = {row["doc_id"]: float(row[metric]) for row in rows}
    if not result:
        raise BarberError(f"log {log} holds no samples: run lm-eval with --log_samples --output_path {log}")
    return result


def check_same(logs: Sequence[dict[str, Items]]) -> None:
    """Refuse logs of different tasks, or of different items of one.

    Raises:
        BarberError: they are different.
    """
    for task in {task: None for log in logs for task in log}:
        if len({frozenset(log.get(task, {})) for log in logs}) > 1:
            raise BarberError(f"logs hold different items of {task}")


def averaged(logs: Sequence[dict[str, Items]], task: str) -> Items:
    """The mean score of every item of a task."""
    return {item: mean(log[task][item] for log in logs) for item in logs[0][task]}


def gain(before: Items, after: Items) -> Gain:
    """Of one task: the error is the differences' standard deviation over the root of their number."""
    differences = [after[item] - before[item] for item in before]
    return Gain(mean(before.values()), mean(after.values()), stdev(differences) / sqrt(len(differences)))


def together(gains: Sequence[Gain]) -> Gain:
    """The mean of several tasks, whose items are independent."""
    error = sqrt(sum(g.error**2 for g in gains)) / len(gains)
    return Gain(mean(g.before for g in gains), mean(g.after for g in gains), error)


def gains(before: Sequence[Path], after: Sequence[Path], metric: str) -> dict[str, Gain]:
    """By task, and of all tasks' mean."""
    one, other = ([items_of(log, metric) for log in side] for side in (before, after))
    check_same([*one, *other])
    result = {task: gain(averaged(one, task), averaged(other, task)) for task in one[0]}
    return {**result, "mean": together(list(result.values()))}


def line(name: str, result: Gain) -> str:
    """A line of the table."""
    before, after, change = 100 * result.before, 100 * result.after, 100 * (result.after - result.before)
    return f"| {name} | {before:.2f} | {after:.2f} | {change:+.2f} ± {100 * result.error:.2f} |"


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, nargs="+", required=True)
    parser.add_argument("--after", type=Path, nargs="+", required=True)
    parser.add_argument("--metrics", default="acc,acc_norm")
    args = parser.parse_args()
    try:
        rows = [
            line(f"{task}, {metric}", result)
            for metric in args.metrics.split(",")
            for task, result in gains(args.before, args.after, metric).items()
        ]
    except BarberError as error:
        parser.error(str(error))
    emit("\n".join(["| task, metric | before | after | gain |", "| --- " * 4 + "|", *rows]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
