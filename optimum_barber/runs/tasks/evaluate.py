"""Evaluating a model on tasks of lm-eval: its own, and those of local files."""

import importlib.util
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ...base.bars import hidden_bars
from ...base.errors import BarberError, MissingExtraError
from ...models.device import choose_device, working_dtype
from .offline import offline_tasks


def check_installed() -> None:
    """Refuse to go on without lm-eval and datasets."""
    for name in ("lm_eval", "datasets"):
        if importlib.util.find_spec(name) is None:
            raise MissingExtraError("evaluation through lm-eval", "eval")


def evaluate_tasks(
    model: Any,
    tasks: Sequence[str],
    *,
    tokenizer: Any = None,
    limit: int | None = None,
    batch_size: int = 1,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    quiet: bool = False,
) -> dict[str, Any]:
    """Evaluate a model on lm-eval tasks.

    Args:
        model: hub id, directory, GGUF file, `installed:PACKAGE`, or the directory of a peft adapter of ours; or a
            causal LM in memory, which is evaluated where it is, as it is.
        tasks: names that lm-eval knows, `choice:FILE.jsonl` and `rolling:FILE`.
        tokenizer: of a model in memory.
        limit: rows a task; None for all.
        batch_size: requests at once.
        device: auto, cpu, cuda, ...
        dtype: of the computation; `auto` is float32 on a CPU, else the model's own.
        seed: of few-shot samples and whatever else is random.
        quiet: no progress bars, no warnings of lm-eval.

    Returns:
        `results`: of each task its metrics, `METRIC_stderr` beside them where lm-eval has one, and `rows`;
        `sparsity`: pattern, sparsity, producer, rebuild, mask fingerprint and base model, None for a dense model;
        `structure`: scorer, share removed, heads, channels and base model, None where none were cut.

    Raises:
        MissingExtraError: lm-eval is not installed.
        BarberError: an unknown task, a bad task file, no such model.
    """
    check_installed()
    from lm_eval import evaluate
    from transformers import set_seed

    set_seed(seed)
    with TemporaryDirectory() as folder, _hushed() if quiet else nullcontext():
        configurations = offline_tasks(tasks, Path(folder))
        loaded: Any = _manager(configurations).load(configurations)
        for task in loaded["tasks"].values():
            task.set_fewshot_seed(seed)
        lm = _language_model(model, tokenizer, batch_size, device, dtype)
        raw: Any = evaluate(lm, loaded, limit=limit, log_samples=False)
    results = {}
    for name, metrics in raw["results"].items():
        rows = raw["n-samples"].get(name, {}).get("effective")
        results[name] = {**_plain_names(metrics), "rows": rows}
    return {"results": results, "sparsity": getattr(lm, "sparsity", None), "structure": getattr(lm, "structure", None)}


def _language_model(model: Any, tokenizer: Any, batch_size: int, device: str, dtype: str) -> Any:
    from lm_eval.models.huggingface import HFLM

    from .lm import SparseLM

    chosen = choose_device(device)
    if isinstance(model, str | Path):
        return SparseLM(model, device=str(chosen), dtype=working_dtype(dtype, chosen), batch_size=batch_size)
    return HFLM(model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)


def check_tasks(tasks: Sequence[str]) -> None:
    """Refuse tasks that `evaluate_tasks` would refuse, without loading a model."""
    check_installed()
    with TemporaryDirectory() as folder:
        _manager(offline_tasks(tasks, Path(folder)))


def _plain_names(metrics: dict[str, Any]) -> dict[str, float]:
    """Shorten lm-eval's `acc,none` and `acc_stderr,none` to `acc` and `acc_stderr`; a filter's name stays."""
    return {key.removesuffix(",none"): value for key, value in metrics.items() if "," in key and value != "N/A"}


def _manager(tasks: Sequence[str | dict[str, Any]]) -> Any:
    """Return an index of lm-eval's tasks, which takes seconds to build and is left empty for local files alone."""
    from lm_eval.tasks import TaskManager

    names = [task for task in tasks if isinstance(task, str)]
    manager = TaskManager(include_defaults=bool(names))
    for name in names:
        if name not in manager.all_tasks:
            raise BarberError(f"task {name!r} is unknown to lm-eval, and neither choice:FILE nor rolling:FILE")
    return manager


@contextmanager
def _hushed() -> Iterator[None]:
    """Hide progress bars and warnings of lm-eval, which has no switch for them."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with hidden_bars(quiet=True):
            yield
    finally:
        logger.setLevel(level)
