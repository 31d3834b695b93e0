"""Check whether two versions of the package compute the same bits: a hundred small runs on tiny models, hashed.

    python same_bits.py record OLD.json [--only NAME ...] [--work DIR]    # with the one version installed
    python same_bits.py record NEW.json [--only NAME ...] [--work DIR]    # with the other
    python same_bits.py compare OLD.json NEW.json

`record` makes models and texts from seeds. It runs each case with the installed `optimum_barber`, by its command line,
in a process and a folder of its own. Then it hashes the files there: every tensor of every safetensors file, the file
itself, and every JSON and CSV file without the fields that differ from run to run (`canonical`). A case that fails is
left out, and the exit status is 1. `--work` keeps the folders of the cases, for a look at the differences. It needs a
POSIX system and some minutes on a CPU.

`compare` prints for each case whether it is the same, differs (and in which files and tensors) or is missing in one of
the records. The exit status is 1 unless all are the same. Records compare on one machine, with the same versions of
all libraries.

The script imports only public names of the package, so modules may be renamed between two records.
"""

import argparse
import csv
import hashlib
import importlib.util
import json
import os
import platform
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatch
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGE = "optimum_barber"
LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "peft", "compressed-tensors")
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}
MODELS, CASES, LOG, TEXT = "models", "cases", "log.txt", "text.txt"  # within the working folder
TO_WORK = Path("..", "..")  # from the folder of a case
TEXT_CHARACTERS = 60_000
VOCABULARY = 300
SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-bfloat16": ("Llama", {"dtype": "bfloat16"}),
    "llama-deep": ("Llama", {"num_hidden_layers": 4, "tie_word_embeddings": False}),
    "mistral": ("Mistral", {"sliding_window": 8}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "gemma": ("Gemma", {"head_dim": 16}),
    "gemma2": ("Gemma2", {"head_dim": 16, "sliding_window": 8}),
    "phi3": ("Phi3", {}),
    "opt": ("OPT", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
}
SHARD = "100KB"  # of a model's files: several a model
HASHED = (".safetensors", ".json", ".jsonl", ".csv")
SETTINGS = {  # files that only say again what was asked for, some of them in no fixed order
    "barber_config.json", "adapter_config.json", "run.json", "generation_config.json", "tokenizer_config.json",
}  # fmt: skip
UNSTEADY = {"software", "peak_memory"}
OF_FILE_TIMES = {"fingerprint", "fingerprints"}  # of stages and cells, which begin with when a model's files were made
TRIES = 20  # to kill a run between two layers
POLL = 0.001
SHOWN = 6  # files and tensors that differ, by case

Step = Callable[[], None]
Cases = dict[str, list[Step]]
Hashes = dict[str, str]


class CaseError(Exception):
    """A case did not run as it should."""


def main() -> int:
    """Record or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="run the cases with the installed package, and write their hashes")
    recording.add_argument("output", type=Path, metavar="OUT.json")
    recording.add_argument("--work", type=Path, metavar="DIR", help="a new folder to work in, kept (default: none)")
    comparing = commands.add_parser("compare", help="compare two records")
    comparing.add_argument("one", type=Path, metavar="A.json")
    comparing.add_argument("other", type=Path, metavar="B.json")
    for command in (recording, comparing):
        command.add_argument("--only", nargs="+", default=["*"], metavar="NAME", help="these cases alone, by glob")
    args = parser.parse_args()
    if args.command == "compare":
        return compare(args.one, args.other, args.only)
    output = args.output.absolute()
    if args.work is not None:
        args.work.mkdir(parents=True)
        return record(args.work.resolve(), output, args.only)
    with tempfile.TemporaryDirectory() as folder:
        return record(Path(folder).resolve(), output, args.only)


# ---------------------------------------------------------------------------------------------------------- record


def record(work: Path, output: Path, only: list[str]) -> int:
    """Run the cases in `work` and write their hashes; 1 where one failed."""
    os.environ.update(ENVIRONMENT)
    sys.path[0] = str(work)  # as `python -m` has it, and away from the neighbours of this file
    say(f"{PACKAGE} {version('optimum-barber')} of {package_folder()}")
    cases = {name: steps for name, steps in all_cases().items() if chosen(name, only)}
    preload()
    recorded: dict[str, Hashes] = {"inputs": run_case(work, "inputs", [partial(in_child, make_inputs)])}
    failed = []
    for name, steps in cases.items():
        started = time.perf_counter()
        try:
            recorded[name] = run_case(work, name, steps)
        except CaseError as error:
            failed.append(name)
            say(f"FAILED {name}: {error}\n{tail(work / LOG)}")
        else:
            say(f"{time.perf_counter() - started:6.1f} s  {name}, {len(recorded[name])} hashes")
    os.chdir(output.parent)
    content = {"environment": environment(), "cases": recorded}
    output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    say(f"{len(cases) - len(failed)} of {len(cases)} cases recorded; failed: {', '.join(failed) or 'none'}")
    return int(bool(failed))


def run_case(work: Path, name: str, steps: Iterable[Step]) -> Hashes:
    """Run the steps of a case in its own folder, and hash what they left.

    Raises:
        CaseError: a step failed, or left nothing.
    """
    folder = work / CASES / name
    folder.mkdir(parents=True)
    os.chdir(folder)
    (work / LOG).write_text("", encoding="utf-8")
    for step in steps:
        step()
    hashes = hashes_of(folder, str(work))
    if not hashes:
        raise CaseError("it left nothing to hash")
    return hashes


def preload() -> None:
    """Import what every child would have to import, and nothing of the package."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401

    torch.set_num_threads(1)


def package_folder() -> str:
    """Where the package is that the cases will run."""
    actual = importlib.util.find_spec(PACKAGE)
    if actual is None or actual.origin is None:
        raise SystemExit(f"{PACKAGE} is not installed")
    return str(Path(actual.origin).parent)


def environment() -> dict[str, str]:
    """What else decides the bits."""
    return {"python": platform.python_version(), "machine": platform.machine(), **{n: version(n) for n in LIBRARIES}}


def chosen(name: str, only: list[str]) -> bool:
    """Whether one of the globs matches."""
    return any(fnmatch(name, glob) for glob in only)


def say(line: str) -> None:
    """A line to the standard error."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def tail(log: Path) -> str:
    """The end of what a case has said."""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-12:])


# ------------------------------------------------------------------------------------------------------- processes


def start_child(work: Callable[[], object]) -> int:
    """A process of its own, forked from this one, which has the libraries in memory; its number."""
    log = TO_WORK / LOG
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        work()
        status = 0
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def in_child(work: Callable[[], object]) -> None:
    """Do it in a process of its own.

    Raises:
        CaseError: it ended with another exit status than 0.
    """
    _, waited = os.waitpid(start_child(work), 0)
    status = os.waitstatus_to_exitcode(waited)
    if status:
        raise CaseError(f"exit status {status}")


def run_module(arguments: tuple[str, ...]) -> None:
    """What `python -m optimum_barber ARGUMENTS` does."""
    sys.argv = [PACKAGE, *arguments]
    sys.path[0] = os.getcwd()
    runpy.run_module(PACKAGE, run_name="__main__", alter_sys=True)


def barber(*arguments: str) -> Step:
    """A step that runs the command line."""
    return partial(in_child, partial(run_module, arguments))


def launched(*arguments: str) -> None:
    """Run the command line in a process that begins from nothing.

    Raises:
        CaseError: it ended with another exit status than 0.
    """
    with (TO_WORK / LOG).open("ab") as log:
        done = subprocess.run([sys.executable, "-m", *arguments], stdout=log, stderr=log, check=False)
    if done.returncode:
        raise CaseError(f"exit status {done.returncode}")


def by_two_ranks(*arguments: str) -> None:
    """Run the command line as two ranks of torchrun."""
    launched("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", PACKAGE, *arguments)


def killed_and_resumed(*arguments: str) -> None:
    """Kill a run into `out` when its first layer is done, then go on with `--resume`.

    Raises:
        CaseError: no run could be killed in time, or one failed.
    """
    for _ in range(TRIES):
        for left in ("out", "out.partial"):
            shutil.rmtree(left, ignore_errors=True)
        child = start_child(partial(run_module, arguments))
        status = None
        while status is None and not layers_done():
            time.sleep(POLL)
            status = ended(child)
        if status is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        elif status:
            raise CaseError(f"exit status {status}")
        if layers_done() and not Path("out").exists():
            in_child(partial(run_module, (*arguments, "--resume")))
            return
    raise CaseError(f"{TRIES} runs ended before they could be killed")


def ended(child: int) -> int | None:
    """The exit status of a child; None while it runs."""
    number, waited = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(waited) if number else None


def layers_done() -> int:
    """How many layers an unfinished run into `out` says are done."""
    try:
        states = [*Path("out.partial").rglob("state.json")]
        return int(json.loads(states[0].read_text(encoding="utf-8"))["layers"]) if states else 0
    except FileNotFoundError:  # the run has just put its result in place
        return 0


# ---------------------------------------------------------------------------------------------------------- inputs


def make_inputs() -> None:
    """Models, tokenizer and text, from seeds and Python's own documentation; a copy of the models is hashed."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))[:TEXT_CHARACTERS]
    (TO_WORK / TEXT).write_text(text, encoding="utf-8")
    tokenizer = trained_tokenizer(text)
    for name, (family, own) in FAMILIES.items():
        folder = TO_WORK / MODELS / name
        tiny_model(family, own).save_pretrained(folder, max_shard_size=SHARD)
        tokenizer.save_pretrained(folder)
    shutil.copytree(TO_WORK / MODELS, MODELS)


def trained_tokenizer(text: str) -> Any:
    """A byte-level BPE."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([text], vocab_size=VOCABULARY, special_tokens=["<pad>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call,unused-ignore]
        tokenizer_object=trained._tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def tiny_model(family: str, own: Mapping[str, Any]) -> Any:
    """A causal LM with random weights, large enough to matter."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **own})
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for parameter in model.parameters():
        noise = 0.2 * torch.randn_like(parameter)
        parameter.data = noise if parameter.ndim > 1 else parameter.data + noise  # of norms and biases
    return model.to(getattr(torch, own.get("dtype", "float32")))


# ----------------------------------------------------------------------------------------------------------- cases

WINDOWS = ("--samples", "8", "--sequence-length", "32")
CALIBRATION = ("--calibration", str(TO_WORK / TEXT), *WINDOWS, "--quiet")
PYDOC = ("--calibration", "pydoc", "--samples", "4", "--sequence-length", "64", "--quiet")
EVALUATION = ("--evaluation", str(TO_WORK / TEXT), "--windows", "8")
HALF = ("--sparsity", "0.5")


def model(name: str = "llama") -> str:
    """A model as the folder of a case sees it."""
    return str(TO_WORK / MODELS / name)


def pruning(*flags: str, of: str = "llama", to: str = "out") -> tuple[str, ...]:
    """The command line that prunes a model."""
    return ("prune", model(of), *flags, *CALIBRATION, "-o", to)


def pruned(*flags: str, of: str = "llama", to: str = "out") -> Step:
    """A step that prunes a model."""
    return barber(*pruning(*flags, of=of, to=to))


def shrunk(*flags: str, of: str = "llama", to: str = "out") -> Step:
    """A step that shrinks a model."""
    return barber("shrink", model(of), *flags, "--no-latency", *CALIBRATION, "-o", to)


def recipe(stages: str, of: str = "llama") -> list[Step]:
    """Steps that run a recipe's stages."""
    text = (
        f"model: {model(of)}\ncalibration: {{texts: [{TO_WORK / TEXT}], samples: 8, sequence_length: 32}}\n"
        f"stages:\n{stages}output: out\n"
    )
    return [partial(put, "recipe.yaml", text), barber("run", "recipe.yaml", "--quiet")]


def put(name: str, text: str) -> None:
    """Write a file."""
    Path(name).write_text(text, encoding="utf-8")


def all_cases() -> Cases:
    """The steps of every case by its name."""
    kinds = (
        producers, rebuilders, barber_settings, reconstructions, allocations, patterns, families, machinery, refinement,
        shrinking, tables, recipes,
    )  # fmt: skip
    return {name: steps for kind in kinds for name, steps in kind().items()}


def producers() -> Cases:
    """First masks alone, and those from outside rebuilt."""
    cases: Cases = {}
    for name in ("magnitude", "wanda", "sparsegpt", "random"):
        cases[f"producer-{name}"] = [pruned("--producer", name, *HALF, "--rebuild", "none")]
    magnitude = ("--producer", "magnitude", *HALF, "--rebuild", "none")
    sparsegpt = ("--producer", "sparsegpt", "--producer-arg")
    cases["producer-wanda-pydoc"] = [barber("prune", model(), *HALF, "--rebuild", "none", *PYDOC, "-o", "out")]
    for scope in ("row", "layer"):
        cases[f"producer-magnitude-{scope}"] = [pruned(*magnitude, "--producer-arg", f"scope={scope}")]
    cases["producer-sparsegpt-mask"] = [pruned(*sparsegpt, "update=false", *HALF, "--rebuild", "none")]
    cases["producer-sparsegpt-blocks"] = [
        pruned(*sparsegpt, "block_size=16", "--producer-arg", "damping=0.05", *HALF, "--rebuild", "swaps")
    ]
    cases["producer-sparsegpt-2:4"] = [pruned("--producer", "sparsegpt", "--pattern", "2:4", "--rebuild", "none")]
    foreign = ("--producer", "existing", "--sparse-model", "first")
    cases["producer-existing"] = [pruned(*magnitude, to="first"), pruned(*foreign)]
    changed = pruned("--producer", "sparsegpt", "--pattern", "2:4", "--rebuild", "none", to="first")
    cases["producer-existing-2:4-weights"] = [changed, pruned(*foreign, "--producer-arg", "keep_weights=true")]
    filed = ("--producer", "masks", "--masks", "first/sparsity_masks.safetensors")
    cases["producer-masks"] = [pruned(*magnitude, to="first"), pruned(*filed)]
    cases["producer-masks-weights"] = [changed, pruned(*filed, "--producer-arg", "weights=first", "--rebuild", "swaps")]
    return cases


def rebuilders() -> Cases:
    """Every rebuilder and chain, free and within groups."""
    cases: Cases = {}
    for chain in (
        "barber", "swaps", "gauss-newton", "barber+swaps", "swaps+gauss-newton", "barber+swaps+gauss-newton",
    ):  # fmt: skip
        cases[f"rebuild-{chain}"] = [pruned(*HALF, "--rebuild", chain)]
        cases[f"rebuild-{chain}-2:4"] = [pruned("--pattern", "2:4", "--rebuild", chain)]
    for chain in ("dsnot", "dsnot+barber", "dsnot+gauss-newton"):  # on random weights its masks are no better
        cases[f"rebuild-{chain}"] = [pruned(*HALF, "--rebuild", chain, "--accept", "always")]
        cases[f"rebuild-{chain}-2:4"] = [pruned("--pattern", "2:4", "--rebuild", chain, "--accept", "always")]
    cases["rebuild-dsnot-if-better"] = [pruned(*HALF, "--rebuild", "dsnot")]
    cases["rebuild-swaps-few"] = [pruned(*HALF, "--rebuild", "swaps", "--swaps", "3", "--shrinkage", "0")]
    cases["rebuild-gauss-newton-rounds"] = [
        pruned(*HALF, "--rebuild", "swaps+gauss-newton", "--newton-rounds", "4", "--shrinkage", "0.1")
    ]
    cases["rebuild-swaps-absolute"] = [pruned(*HALF, "--rebuild", "swaps+gauss-newton", "--error", "absolute")]
    cases["rebuild-magnitude"] = [pruned("--producer", "magnitude", *HALF, "--rebuild", "barber+swaps+gauss-newton")]
    return cases


def barber_settings() -> Cases:
    """The settings of LLM-Barber."""
    cases: Cases = {}
    alone = ("--producer", "magnitude", *HALF, "--rebuild", "barber")
    for granularity in ("block", "layer", "input", "output"):
        cases[f"barber-granularity-{granularity}"] = [pruned(*alone, "--granularity", granularity)]
    for flag, value in (
        ("metric", "weight"), ("metric", "gradient"), ("expansion", "dense"), ("reduction", "mean"),
        ("error", "relative"), ("accept", "always"), ("rebuild-ratio", "0.05"), ("rounds", "1"),
    ):  # fmt: skip
        cases[f"barber-{flag}-{value}"] = [pruned(*alone, f"--{flag}", value)]
    preset = ("--preset", "published-code")
    cases["barber-published-code"] = [pruned(*HALF, *preset)]
    cases["barber-published-code-2:4"] = [pruned("--pattern", "2:4", *preset, "--granularity", "output")]
    cases["barber-published-code-ratio"] = [pruned(*HALF, *preset, "--rebuild-ratio", "0.01", "--accept", "if-better")]
    return cases


def reconstructions() -> Cases:
    """New values for the kept weights."""
    cases: Cases = {}
    for chain in ("least-squares", "gradient", "least-squares+gradient"):
        cases[f"reconstruct-{chain}"] = [pruned(*HALF, "--rebuild", "swaps", "--reconstruct", chain)]
    cases["reconstruct-least-squares-2:4"] = [
        pruned("--pattern", "2:4", "--reconstruct", "least-squares", "--reconstruct-shrinkage", "0.1")
    ]
    cases["reconstruct-least-squares-sparsegpt"] = [
        pruned("--producer", "sparsegpt", *HALF, "--rebuild", "none", "--reconstruct", "least-squares",
               "--reconstruct-iterations", "4")
    ]  # fmt: skip
    cases["reconstruct-gradient-passes"] = [
        pruned(*HALF, "--rebuild", "none", "--reconstruct", "gradient", "--reconstruct-passes", "2",
               "--reconstruct-learning-rate", "0.001")
    ]  # fmt: skip
    return cases


def allocations() -> Cases:
    """How the sparsity is shared out."""
    cases: Cases = {}
    for name, arguments in (
        ("owl", ()), ("owl", ("outlier=3", "spread=0.1")), ("measured", ()), ("measured", ("spread=0.15",)),
        ("measured", ("spread=0.05", "samples=3")),
    ):  # fmt: skip
        options: tuple[str, ...] = ()
        for argument in arguments:
            options += ("--allocation-arg", argument)
        label = "-".join(["allocation", name, *arguments])
        cases[label] = [pruned("--sparsity", "0.6", "--allocation", name, *options, of="llama-deep")]
    cases["allocation-measured-none"] = [
        pruned(*HALF, "--allocation", "measured", "--rebuild", "none", of="llama-deep")
    ]
    return cases


def patterns() -> Cases:
    """Patterns with the default rebuild, and pairing by rows."""
    cases: Cases = {}
    cases["pattern-unstructured"] = [pruned(*HALF)]
    cases["pattern-unstructured-0.73"] = [pruned("--sparsity", "0.73")]
    for pattern in ("2:4", "4:8", "1:4"):
        cases[f"pattern-{pattern}"] = [pruned("--pattern", pattern)]
    for pairing in ("group", "row"):
        barber_alone = ("--pattern", "4:8", "--rebuild", "barber", "--pairing", pairing)
        cases[f"pattern-4:8-pairing-{pairing}"] = [pruned(*barber_alone)]
    cases["pattern-2:4-layer"] = [pruned("--pattern", "2:4", "--rebuild", "barber", "--granularity", "layer")]
    return cases


def families() -> Cases:
    """The other architectures, and weights in bfloat16."""
    cases: Cases = {}
    for name in ("mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "opt", "llama-bfloat16"):
        cases[f"model-{name}"] = [pruned(*HALF, "--rebuild", "barber+swaps+gauss-newton", of=name)]
    for name in ("gemma2", "phi3", "opt", "llama-bfloat16"):
        cases[f"model-{name}-2:4"] = [pruned("--pattern", "2:4", "--reconstruct", "least-squares", of=name)]
    cases["model-opt-sparsegpt"] = [
        pruned("--producer", "sparsegpt", *HALF, "--rebuild", "dsnot", "--accept", "always", of="opt")
    ]
    cases["model-llama-to-bfloat16"] = [pruned(*HALF, "--dtype", "bfloat16")]
    return cases


def machinery() -> Cases:
    """From memory and from disk, stopped and resumed, alone and by two; most of it comes to the same bits."""
    cases: Cases = {}
    whole = ("--rebuild", "barber+swaps+gauss-newton", "--allocation", "measured", "--reconstruct", "least-squares")
    deep = pruning(*HALF, *whole, of="llama-deep")
    cases["run-from-memory"] = [barber(*deep, "--stream", "never")]
    cases["run-from-disk"] = [barber(*deep, "--stream", "always")]
    cases["run-activations-on-disk"] = [barber(*deep, "--stream", "always", "--activations", "disk")]
    cases["run-one-by-one"] = [barber(*deep, "--batch-size", "1")]
    cases["run-process-of-its-own"] = [partial(launched, PACKAGE, *deep)]
    cases["run-from-memory-opt"] = [pruned(*HALF, "--stream", "never", of="opt")]
    cases["run-resumed"] = [partial(killed_and_resumed, *deep)]
    cases["run-resumed-2:4"] = [
        partial(killed_and_resumed, *pruning("--pattern", "2:4", "--producer", "sparsegpt", of="llama-deep"))
    ]
    cases["run-resumed-activations-on-disk"] = [partial(killed_and_resumed, *deep, "--activations", "disk")]
    cases["run-two-ranks"] = [partial(by_two_ranks, *deep)]
    cases["run-two-ranks-sparsegpt-2:4"] = [
        partial(by_two_ranks, *pruning("--pattern", "2:4", "--producer", "sparsegpt", of="phi3"))
    ]
    cases["run-ignore"] = [pruned(*HALF, "--ignore", "*.o_proj", "--ignore", "*.layers.1.mlp.*")]
    cases["run-seed"] = [pruned(*HALF, "--producer", "random", "--seed", "7", "--precision", "medium")]
    cases["run-python"] = [partial(in_child, from_python)]
    cases["run-own-text"] = [
        barber("own-text", model(), "--tokens", "1024", "--length", "32", "--quiet", "-o", "own.jsonl"),
        barber("prune", model(), *HALF, "--calibration", "own.jsonl", *WINDOWS, "--quiet", "-o", "out"),
    ]
    cases["run-own-text-settings"] = [
        barber("own-text", model(), "--tokens", "256", "--length", "16", "--temperature", "0.7", "--top-p", "0.5",
               "--batch", "3", "--seed", "4", "--start", "The", "--quiet", "-o", "own.jsonl")
    ]  # fmt: skip
    return cases


def from_python() -> None:
    """A model in memory, token windows, and a function as the producer."""
    import torch
    from transformers import AutoModelForCausalLM

    from optimum_barber import BarberConfig, BarberSparsifier

    windows = torch.randint(3, VOCABULARY, (6, 24), generator=torch.Generator().manual_seed(1))
    calibration = {"samples": 6, "sequence_length": 24}
    config = BarberConfig(producer=first_half, sparsity=0.5, rebuild={"rounds": 2}, calibration=calibration)
    sparsifier = BarberSparsifier(AutoModelForCausalLM.from_pretrained(model()), None)
    sparsifier.sparsify(config, calibration=windows, save_dir="out", quiet=True)


def first_half(linear: Any) -> Any:
    """Keep mask that leaves the second half of every row."""
    import torch

    keep = torch.ones_like(linear.weight, dtype=torch.bool)
    keep[:, : keep.shape[1] // 2] = False
    return keep


def refinement() -> Cases:
    """Exchanges by the whole model."""
    cases: Cases = {}
    refined = ("refine", "first", *CALIBRATION, "-o", "out")
    unstructured = pruned(*HALF, "--rebuild", "swaps", to="first")
    cases["refine"] = [unstructured, barber(*refined), barber("verify", "out")]
    cases["refine-settings"] = [
        unstructured,
        barber(*refined, "--steps", "6", "--batch-size", "2", "--exchanges", "4", "--shrinkage", "0.1"),
    ]
    cases["refine-2:4"] = [pruned("--pattern", "2:4", "--rebuild", "none", to="first"), barber(*refined)]
    for name in ("opt", "gemma2", "llama-bfloat16"):
        cases[f"refine-{name}"] = [pruned(*HALF, "--rebuild", "none", of=name, to="first"), barber(*refined)]
    return cases


def shrinking() -> Cases:
    """Heads and channels removed."""
    cases: Cases = {}
    for scorer in ("bip", "barber", "taylor", "wanda", "magnitude", "importance-propagation", "random"):
        ranked = ("--scorer", scorer)
        cases[f"shrink-{scorer}"] = [shrunk(*ranked, "--remove", "0.3")]
        cases[f"shrink-{scorer}-query"] = [
            shrunk(*ranked, "--remove-heads", "0.5", "--remove-channels", "0.25", "--head-unit", "query")
        ]
        cases[f"shrink-{scorer}-opt"] = [shrunk(*ranked, "--remove-heads", "0", "--remove-channels", "0.4", of="opt")]
    cases["shrink-bip-channels"] = [shrunk("--remove-heads", "0", "--remove-channels", "0.5")]
    cases["shrink-bip-rounded"] = [shrunk("--remove", "0.4", "--round-to", "16")]
    cases["shrink-bip-norm-gain"] = [
        shrunk("--scorer-arg", "norm_gain=true", "--remove-heads", "0", "--remove-channels", "0.5")
    ]
    for name in ("phi3", "gemma2", "qwen3", "llama-bfloat16"):
        cases[f"shrink-barber-{name}"] = [shrunk("--scorer", "barber", "--remove", "0.4", of=name)]
    cases["shrink-compensate"] = [shrunk("--remove", "0.3", "--compensate")]
    again = barber("shrink", model(), "--structure", "first", "--no-latency", "--quiet", "-o", "out")
    cases["shrink-structure"] = [shrunk("--remove", "0.3", to="first"), again, barber("verify", "out")]
    cases["shrink-prune"] = [
        shrunk("--remove", "0.3", to="first"), barber("prune", "first", *HALF, *CALIBRATION, "-o", "out"),
    ]  # fmt: skip
    return cases


def tables() -> Cases:
    """Perplexity, sweeps and comparisons."""
    cases: Cases = {}
    asked = ("--perplexity", str(TO_WORK / TEXT), "--sequence-length", "32", "--windows", "16", "--quiet")
    cases["eval"] = [pruned(*HALF, to="first"), barber("eval", "first", model("opt"), *asked, "--json", "eval.json")]
    cases["eval-bfloat16"] = [
        barber("eval", model("gemma2"), model("phi3"), *asked, "--dtype", "bfloat16", "--json", "eval.json")
    ]
    cases["sweep"] = [
        barber("sweep", model(), "--scorers", "bip", "barber", "taylor", "random", "--remove", "0.2", "0.4",
               "--samples", "4", "8", "--calibration", str(TO_WORK / TEXT), "--sequence-length", "32", *EVALUATION,
               "--no-latency", "--quiet", "-o", "out")
    ]  # fmt: skip
    cases["compare"] = [
        barber("compare", model(), "--producers", "magnitude", "wanda", "sparsegpt,update=false,as=mask", "--rebuilds",
               "none", "barber,rounds=1", "barber+swaps", "--patterns", "unstructured", "2:4", "--sparsities", "0.5",
               "--keep-masks", *CALIBRATION, *EVALUATION, "-o", "out")
    ]  # fmt: skip
    cases["compare-vary"] = [
        barber("compare", model(), "--producers", "wanda", "--rebuilds", "barber", "--sparsities", "0.5", "0.7",
               "--rebuild-arg", "rounds=1", "--vary", "granularity=block,output", "--vary", "reconstruct=none,gradient",
               "--keep-masks", *CALIBRATION, *EVALUATION, "-o", "out")
    ]  # fmt: skip
    return cases


def recipes() -> Cases:
    """Chains of stages: tuning under the masks, quantizing, evaluating."""
    cases: Cases = {}
    lora = "  - lora: {steps: 4, batch_size: 2, rank: 4, learning_rate: 0.01, logging_steps: 1}\n  - merge\n"
    evaluate = f"  - evaluate: {{perplexity: [{TO_WORK / TEXT}], windows: 8}}\n"
    gptq = "  - quantize: {method: gptq, bits: 4, group_size: 16}\n"
    half = "  - prune: {producer: wanda, sparsity: 0.5}\n"
    cases["recipe-chain"] = recipe(
        "  - prune: {producer: wanda, pattern: 2:4}\n  - rebuild: {method: swaps+gauss-newton}\n"
        "  - refine: {steps: 4}\n" + lora + gptq + evaluate
    )  # fmt: skip
    cases["recipe-rslora"] = recipe(
        half + "  - lora: {steps: 3, batch_size: 2, gradient_accumulation: 2, rank: 4, use_rslora: true, dropout: 0.1, "
        "gradient_checkpointing: true}\n  - merge\n", of="opt",
    )  # fmt: skip
    cases["recipe-lora-bfloat16"] = recipe(half + lora + evaluate, of="llama-bfloat16")
    cases["recipe-lora-evaluated"] = recipe(half + lora.replace("  - merge\n", "") + evaluate)
    cases["recipe-lora-dense"] = recipe("  - shrink: {remove: 0.3, latency: false}\n" + lora + gptq + evaluate)
    cases["recipe-gptq"] = recipe("  - prune: {sparsity: 0.5, rebuild: {}}\n" + gptq + evaluate, of="phi3")
    cases["recipe-gptq-blocks"] = recipe(
        half + "  - quantize: {method: gptq, bits: 8, group_size: -1, block_size: 24, sweeps: 0, damping: 0.1}\n"
    )
    cases["recipe-round-to-nearest"] = recipe(half + "  - quantize: {method: round-to-nearest, group_size: 32}\n")
    cases["recipe-reconstruct"] = recipe(
        "  - prune: {sparsity: 0.5, allocation: owl, rebuild: swaps, reconstruct: least-squares}\n" + evaluate,
        of="gemma2",
    )
    return cases


# ---------------------------------------------------------------------------------------------------------- hashes


def hashes_of(folder: Path, work: str) -> Hashes:
    """The hash of every file below a folder that is a result, and of every tensor in it, by their names."""
    actual: Hashes = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix not in HASHED or path.name in SETTINGS or not path.is_file():
            continue
        if path.suffix == ".safetensors":
            actual |= tensor_hashes(path, name)
        else:
            actual[name] = digest(json.dumps(canonical(content_of(path), work), sort_keys=True).encode())
    return actual


def content_of(path: Path) -> Any:
    """What a JSON or CSV file holds."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".csv":
        return [*csv.DictReader(text.splitlines())]
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in text.splitlines()]
    return json.loads(text)


def canonical(content: Any, work: str, within: str = "") -> Any:
    """JSON without what differs from run to run: versions, times, memory, hashes of file times, the working folder."""
    if isinstance(content, list):
        return [canonical(item, work) for item in content]
    if isinstance(content, str):
        return content.replace(work, "WORK")
    if not isinstance(content, dict):
        return content
    leave = UNSTEADY if within in ("calibration", "windows") else UNSTEADY | OF_FILE_TIMES
    kept = [key for key in content if key not in leave and not key.endswith("seconds")]
    return {key: canonical(content[key], work, key) for key in kept}


def tensor_hashes(path: Path, name: str) -> Hashes:
    """Hashes of a safetensors file: as it is, and of each tensor's dtype, shape and bytes."""
    content = path.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    actual = {name: digest(content)}
    for tensor, entry in sorted(json.loads(content[8:begin]).items()):
        if tensor != "__metadata__":
            first, last = entry["data_offsets"]
            kind = f"{entry['dtype']} {entry['shape']} ".encode()
            actual[f"{name}: {tensor}"] = digest(kind + content[begin + first : begin + last])
    return actual


def digest(content: bytes) -> str:
    """SHA-256."""
    return hashlib.sha256(content).hexdigest()


# --------------------------------------------------------------------------------------------------------- compare


def compare(one: Path, other: Path, only: list[str]) -> int:
    """Say of every case whether both records have the same hashes; 1 unless all have."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in (one, other)]
    before, after = (actual["cases"] for actual in records)
    for key in sorted(differences(*(actual["environment"] for actual in records))):
        say(f"not the same {key}: {[actual['environment'].get(key) for actual in records]}")
    counts = {"same": 0, "differs": 0, "missing": 0}
    for name in {**before, **after}:
        if chosen(name, only):
            verdict, note = judged(before.get(name), after.get(name))
            counts[verdict] += 1
            sys.stdout.write(f"{verdict:<8} {name}{note}\n")
    sys.stdout.write(", ".join(f"{verdict} {count}" for verdict, count in counts.items()) + "\n")
    return int(counts["same"] != sum(counts.values()) or not counts["same"])


def judged(before: Hashes | None, after: Hashes | None) -> tuple[str, str]:
    """The verdict on a case, and what to add to it."""
    if before is None or after is None:
        return "missing", f" in {'the first' if before is None else 'the second'}"
    differ = differences(before, after)
    if not differ:
        return "same", ""
    more = f"\n           and {len(differ) - SHOWN} more" if len(differ) > SHOWN else ""
    return "differs", "".join(f"\n           {key}" for key in differ[:SHOWN]) + more


def differences(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """The keys whose values are not the same, or that one alone has."""
    return [key for key in {**before, **after} if before.get(key) != after.get(key)]


if __name__ == "__main__":
    sys.exit(main())
