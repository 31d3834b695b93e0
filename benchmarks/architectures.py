"""Every causal LM of the installed transformers, tiny, pruned from disk and from memory: what holds.

    python -m benchmarks.architectures [--only TYPE ...] [--output TABLE.md]

For each: the replay of the first and the last window gives the model's bits (every run checks that); from disk and from
memory the same files; exact counts; no block's error rises; the output loads with equal logits; `verify` passes; masks
of Wanda do not depend on the order of the windows.
"""

import argparse
import contextlib
import io
import logging
import re
import shutil
import signal
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from optimum_barber import BarberConfig, BarberSparsifier
from optimum_barber.base.errors import BarberError
from optimum_barber.checkpoints.verify import verify_checkpoint
from optimum_barber.models.loading import auto_class

from .tiny_models import tiny_config, tiny_model, tiny_wrapper_config

VERDICTS = ("ok", "refused", "fails", "not built")
SECONDS = 300  # a model may take
WRAPPERS = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.keys()  # models of images and text
SAMPLES, LENGTH = 4, 32
ENCODERS = (  # and decoders that attend to an encoder
    "bart bert bert-generation big_bird bigbird_pegasus blenderbot blenderbot-small camembert data2vec-text electra "
    "ernie florence2 git marian mbart megatron-bert musicgen musicgen_melody mvp pegasus pix2struct plbart "
    "pp_formulanet prophetnet reformer rembert roberta roberta-prelayernorm roc_bert roformer t5gemma2 trocr udop "
    "vision-encoder-decoder whisper xlm xlm-roberta xlm-roberta-xl xlnet xmod"
)
WITH_IMAGES = "blip blip-2 evolla idefics instructblip instructblipvideo kosmos-2 pi0"
EXCEPTIONS: dict[str, str] = {  # no decoder-only language models that run on text, and the reason
    **dict.fromkeys(ENCODERS.split(), "an encoder, or a decoder that attends to one"),
    **dict.fromkeys(WITH_IMAGES.split(), "does not run without an image"),
    "blt": "reads bytes in patches whose number differs from window to window",
    "diffusion_gemma": "a diffusion model",
    "gemma4_assistant": "runs on another model's keys and values",
    "gemma4_unified_assistant": "runs on another model's keys and values",
    "shieldgemma2": "a classifier of images",
}


@dataclass
class Outcome:
    """What was seen of one model: `ok`, `refused` in one line, `fails`, or `not built`."""

    model_type: str
    verdict: str
    notes: str = ""
    seconds: float = 0.0


def check(model_type: str, directory: Path, wrapper: bool) -> Outcome:
    """Build the tiny model of a type, prune it both ways, and compare."""
    started = time.monotonic()
    try:
        with _quiet():
            auto = AutoModelForImageTextToText if wrapper else AutoModelForCausalLM
            model = tiny_model((tiny_wrapper_config if wrapper else tiny_config)(model_type), auto)
            windows = torch.randint(3, 500, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(0))
            with torch.no_grad():
                model(input_ids=windows[:1], use_cache=False)
            model.save_pretrained(directory / "dense")
    except Exception as error:  # whatever transformers raises for these sizes
        return Outcome(model_type, "not built", _line(error), time.monotonic() - started)
    try:
        with _quiet():
            faults, notes = _pruned(directory, windows)
    except BarberError as error:
        return Outcome(model_type, "refused", _line(error), time.monotonic() - started)
    except Exception as error:  # a traceback is what this looks for
        return Outcome(model_type, "fails", _line(error), time.monotonic() - started)
    verdict = "fails" if faults else "ok"
    return Outcome(model_type, verdict, "; ".join(faults) or notes, time.monotonic() - started)


def _pruned(directory: Path, windows: Tensor) -> tuple[list[str], str]:
    """The faults of a pruned model, and a note on what was pruned."""
    faults: list[str] = []
    results, sparsifiers = {}, {}
    obstacle = BarberSparsifier(None, None, _reference(directory / "dense"), stream="auto")._obstacle
    how = "from disk" if obstacle is None else f"in memory: {obstacle}"
    for stream in ("auto", "never"):
        sparsifier = sparsifiers[stream] = BarberSparsifier(None, None, _reference(directory / "dense"), stream=stream)
        config = BarberConfig(sparsity=0.5, allow_dense_rest=True)
        results[stream] = sparsifier.sparsify(config, windows, directory / stream, quiet=True)
        faults += [f"{stream}: {fault}" for fault in verify_checkpoint(directory / stream).faults]
    result, other = results["auto"], results["never"]
    if {n: m.sha256 for n, m in result.masks.items()} != {n: m.sha256 for n, m in other.masks.items()}:
        faults.append("masks from disk and from memory differ")
    for report in result.reports:
        if report.error_after > report.error_before * (1 + 1e-6):
            faults.append(f"{report.block}: E rises from {report.error_before:.3g} to {report.error_after:.3g}")
    weights = sum(mask.weights for mask in result.masks.values())
    if sum(mask.pruned for mask in result.masks.values()) * 2 > weights:
        faults.append("more than half of the weights are pruned")
    faults += _reload_faults(directory, sparsifiers["never"].model, windows)
    faults += _order_faults(directory, windows)
    blocks = Counter(report.block.rpartition(".")[2] for report in result.reports)
    return faults, f"{how}, {len(result.masks)} matrices in {', '.join(blocks)}"


def _reload_faults(directory: Path, model: Any, windows: Tensor) -> Iterator[str]:
    with torch.no_grad():
        expected = model.eval()(input_ids=windows, use_cache=False).logits
        for stream in ("auto", "never"):
            loaded = auto_class(model.config).from_pretrained(directory / stream).eval()
            if not torch.equal(loaded(input_ids=windows, use_cache=False).logits, expected):
                yield f"{stream}: the output loads with other logits"


def _order_faults(directory: Path, windows: Tensor) -> Iterator[str]:
    masks = []
    for order in (windows, windows.flip(0)):
        sparsifier = BarberSparsifier(None, None, _reference(directory / "dense"), stream="never")
        config = BarberConfig(sparsity=0.5, effort="fast", rebuild={"method": "none"}, allow_dense_rest=True)
        result = sparsifier.sparsify(config, order, quiet=True)
        masks.append({name: mask.sha256 for name, mask in result.masks.items()})
    differing = [name for name in masks[0] if masks[0][name] != masks[1][name]]
    if differing:
        yield f"masks depend on the order of the windows: {differing[0]}"


def _reference(directory: Path) -> Any:
    from optimum_barber.models.loading import resolve_model

    return resolve_model(directory)


def _line(error: Exception) -> str:
    text = re.sub(r"'/[^ ]*'", "", " ".join(str(error).split()))[:160]  # without names of temporary folders
    return text if isinstance(error, BarberError) else f"{type(error).__name__}: {text}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        yield
    logging.disable(logging.NOTSET)


def table(outcomes: list[Outcome]) -> str:
    """The outcomes as a Markdown table, decoder-only models first."""
    decoders = [outcome for outcome in outcomes if outcome.model_type not in EXCEPTIONS]
    causal = [outcome for outcome in decoders if outcome.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
    others = [outcome for outcome in decoders if outcome not in causal]
    lines = [
        f"{_counted('decoder-only causal LMs', causal)}; {_counted('models of images and text', others)}.",
        "",
        "| model type | verdict | notes |",
        "| --- | --- | --- |",
    ]
    lines += [f"| {outcome.model_type} | {outcome.verdict} | {outcome.notes} |" for outcome in decoders]
    for outcome in outcomes:
        if outcome.model_type in EXCEPTIONS:
            reason = EXCEPTIONS[outcome.model_type]
            lines.append(f"| {outcome.model_type} | exception, {outcome.verdict} | {reason} |")
    return "\n".join(lines) + "\n"


def _counted(kind: str, outcomes: list[Outcome]) -> str:
    counts = Counter(outcome.verdict for outcome in outcomes)
    return f"{len(outcomes)} {kind}: " + ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS)


def main() -> None:
    """Check the models one after the other; a line each, and the table at the end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = list(dict.fromkeys([*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES]))
    parser.add_argument("--only", nargs="+", default=known, metavar="TYPE")
    parser.add_argument("--output", type=Path, help="file for the table")
    args = parser.parse_args()
    signal.signal(signal.SIGALRM, _too_long)
    outcomes = []
    for model_type in args.only:
        directory = Path(tempfile.mkdtemp())
        signal.alarm(SECONDS)
        try:
            outcomes.append(check(model_type, directory, model_type in WRAPPERS))
        except TimeoutError:
            outcomes.append(Outcome(model_type, "fails", f"more than {SECONDS} s", SECONDS))
        finally:
            signal.alarm(0)
            shutil.rmtree(directory, ignore_errors=True)
        latest = outcomes[-1]
        print(f"{latest.verdict:<9} {latest.model_type:<24} {latest.seconds:6.1f} s  {latest.notes}", flush=True)
    text = table(outcomes)
    print("\n" + text.splitlines()[0])
    if args.output is not None:
        args.output.write_text(text, encoding="utf-8")


def _too_long(*_: object) -> None:
    raise TimeoutError


if __name__ == "__main__":
    main()
