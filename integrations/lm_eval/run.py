"""Running lm-eval: from its own command line, and from Python on a checkpoint directory."""

import argparse
import importlib.util
import logging
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from optimum_barber.base.errors import BarberError, MissingExtraError
from optimum_barber.integrations.lm_eval.offline import offline_tasks, written_tasks


def check_installed() -> None:
    """Refuse to go on without lm-eval and datasets."""
    if any(importlib.util.find_spec(name) is None for name in ("lm_eval", "datasets")):
        raise MissingExtraError("evaluation through lm-eval", "eval")


def run_harness(arguments: Sequence[str]) -> None:
    """Hand a command line to lm-eval, with model `barber` registered and local task files put in its terms.

    Args:
        arguments: lm-eval's subcommand and flags.

    Raises:
        BarberError: bad model arguments or task files.
        SystemExit: lm-eval's parser ended the run, as for --help.
    """
    check_installed()
    from lm_eval.__main__ import cli_evaluate

    from optimum_barber.integrations.lm_eval import model as lm_eval_model  # noqa: F401 - registers `barber`

    before = sys.argv
    with TemporaryDirectory() as folder:
        sys.argv = ["lm-eval", *_with_local_tasks(arguments, Path(folder))]
        try:
            cli_evaluate()
        except Exception as error:
            if isinstance(error, BarberError) or not _refused(error):
                raise
            raise BarberError(f"lm-eval: {error}") from None
        finally:
            sys.argv = before


def _with_local_tasks(arguments: Sequence[str], folder: Path) -> list[str]:
    """The command line with YAML files in the place of local task files, where it is one of `run`."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--tasks", "-t", nargs="+", action="extend", default=[])
    known, rest = parser.parse_known_args(arguments)
    names = [name for value in known.tasks for name in value.split(",") if name]
    if arguments[0] != "run" or not names:
        return list(arguments)
    return [*rest, "--tasks", *written_tasks(names, folder)]


def _refused(error: Exception) -> bool:
    """Whether lm-eval raised this while it looked at its own settings, unknown tasks among them."""
    return Path(traceback.extract_tb(error.__traceback__)[-1].filename).stem == "evaluate_config"


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
        loaded = _load_tasks(offline_tasks(tasks, Path(folder)), seed)
        lm = _language_model(model, tokenizer, batch_size, device, dtype)
        found: Any = evaluate(lm, loaded, limit=limit, log_samples=False)
    rows = {name: counted["effective"] for name, counted in found["n-samples"].items()}
    results = {name: {**_metrics(metrics), "rows": rows.get(name)} for name, metrics in found["results"].items()}
    return {"results": results, "sparsity": getattr(lm, "sparsity", None), "structure": getattr(lm, "structure", None)}


def _language_model(model: Any, tokenizer: Any, batch_size: int, device: str, dtype: str) -> Any:
    """lm-eval's view of a model in memory, or of one that is loaded by its name."""
    from lm_eval.models.huggingface import HFLM

    from optimum_barber.integrations.lm_eval.model import SparseLM
    from optimum_barber.models.device import choose_device, working_dtype

    chosen = choose_device(device)
    dtype = working_dtype(dtype, chosen)
    if isinstance(model, str | Path):
        return SparseLM(model, device=str(chosen), dtype=dtype, batch_size=batch_size)
    return HFLM(model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)


def check_tasks(tasks: Sequence[str]) -> None:
    """Refuse tasks that `evaluate_tasks` would refuse, without loading a model.

    Raises:
        MissingExtraError: lm-eval is not installed.
        BarberError: an unknown task, a bad task file.
    """
    check_installed()
    with TemporaryDirectory() as folder:
        _manager(offline_tasks(tasks, Path(folder)))


def _load_tasks(tasks: Sequence[str | dict[str, Any]], seed: int) -> Any:
    """lm-eval's tasks. Its index takes seconds to build and is left empty where only local files are asked for."""
    loaded = _manager(tasks).load(list(tasks))
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed)
    return loaded


def _metrics(found: dict[str, Any]) -> dict[str, float]:
    """lm-eval's `acc,none` and `acc_stderr,none` as `acc` and `acc_stderr`; a filter's name stays."""
    return {key.removesuffix(",none"): value for key, value in found.items() if "," in key and value != "N/A"}


def _manager(tasks: Sequence[str | dict[str, Any]]) -> Any:
    """lm-eval's index of tasks, which knows all of these.

    Raises:
        BarberError: it does not.
    """
    from lm_eval.tasks import TaskManager

    names = [task for task in tasks if isinstance(task, str)]
    manager = TaskManager(include_defaults=bool(names))
    for name in names:
        if name not in manager.all_tasks:
            raise BarberError(f"task {name!r} is unknown to lm-eval, and neither choice:FILE nor rolling:FILE")
    return manager


@contextmanager
def _hushed() -> Iterator[None]:
    """No progress bars and no warnings of lm-eval, which has no switch for them."""
    import datasets
    from lm_eval.api import model, task
    from lm_eval.models import huggingface
    from tqdm import tqdm

    modules: tuple[Any, ...] = (model, task, huggingface)
    logger = logging.getLogger("lm_eval")
    before, level = [module.tqdm for module in modules], logger.level
    disabled = datasets.are_progress_bars_disabled()
    for module in modules:
        module.tqdm = lambda *values, **options: tqdm(*values, **{**options, "disable": True})
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        for module, bar in zip(modules, before, strict=True):
            module.tqdm = bar
        logger.setLevel(level)
        if not disabled:
            datasets.enable_progress_bars()
