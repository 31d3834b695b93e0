"""Give every reader of files mutated inputs: it must answer with a value or a BarberError, soon, in little memory.

    python -m benchmarks.fuzz [--inputs 2000] [--seed 0] [--only READER]

Makes one good input for each reader from a tiny model, then flips bytes, cuts, and changes JSON values: other types,
huge, deep, NaN, missing or given twice. Each reader works in a process of its own that may take 1 GiB beyond what it
has, and 10 seconds for an input. Counts answers, refusals and faults: another exception, a process that has died or
hung, a file written. Exit status 1 if there is a fault.
"""

import argparse
import json
import multiprocessing
import random
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from optimum_barber import BarberConfig, BarberSparsifier
from optimum_barber.base.errors import BarberError
from optimum_barber.checkpoints.names import MASKS_NAME, SPARSITY_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME
from optimum_barber.checkpoints.record import MaskFile, read_record
from optimum_barber.checkpoints.safetensors import SafetensorsWeights
from optimum_barber.checkpoints.verify import verify_checkpoint
from optimum_barber.models.loading import resolve_model
from optimum_barber.prune.streaming.disk import DiskCheckpoint
from optimum_barber.runs.recipe.validation import read_recipe
from optimum_barber.text.sources import read_texts
from tests.gguf_files import write_gguf

from .table import emit

SECONDS = 10
MEMORY = 2**30  # bytes
RECIPE = """# A recipe with every kind of value.
version: 1
name: chain
model: installed:none
variables: {text: pydoc}
calibration: {texts: ["${text}"], samples: 16, sequence_length: 512}
stages:
  - prune: {producer: wanda, pattern: 2:4}
  - rebuild: {method: barber+swaps}
  - evaluate: {perplexity: ["${text}"], windows: 40}
output: runs/chain
"""


def _every_tensor(directory: Path) -> None:
    weights = SafetensorsWeights.open(directory)
    for name in weights.entries:
        weights.tensor(name)


def _every_mask(directory: Path) -> None:
    file = MaskFile(directory / MASKS_NAME)
    for name in file:
        file[name].unpack()


def _record(directory: Path) -> None:
    read_record(directory)
    verify_checkpoint(directory)


@dataclass(frozen=True)
class Reader:
    """What is read: the file that is mutated, in the folder of a good input, and the function of that folder."""

    folder: str
    file: str
    read: Callable[[Path], Any]


READERS = {
    "config": Reader("model", "config.json", lambda path: DiskCheckpoint.open(resolve_model(path))),
    "index": Reader("shards", WEIGHTS_INDEX_NAME, _every_tensor),
    "safetensors header": Reader("model", WEIGHTS_NAME, _every_tensor),
    "mask file": Reader("pruned", MASKS_NAME, _every_mask),
    "sparsity config": Reader("pruned", SPARSITY_NAME, _record),
    "recipe": Reader("texts", "recipe.yaml", lambda path: read_recipe(path / "recipe.yaml")),
    "gguf header": Reader("gguf", "model.gguf", lambda path: DiskCheckpoint.open(resolve_model(path / "model.gguf"))),
    "jsonl": Reader("texts", "text.jsonl", lambda path: read_texts(str(path / "text.jsonl"), "calibration")),
}


def make_inputs(place: Path) -> None:
    """Write a good input for every reader."""
    torch.manual_seed(0)
    sizes = LlamaConfig(
        hidden_size=16, intermediate_size=16, vocab_size=32, max_position_embeddings=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(sizes)
    model.save_pretrained(place / "model")
    model.save_pretrained(place / "shards", max_shard_size="4KB")
    (place / "gguf").mkdir()
    write_gguf(place / "gguf" / "model.gguf", model)
    config = BarberConfig(producer="magnitude", sparsity=0.5, rebuild="none")
    BarberSparsifier(model).sparsify(config, torch.zeros(1, 4).long(), place / "pruned", quiet=True)
    (place / "texts").mkdir()
    (place / "texts" / "recipe.yaml").write_text(RECIPE)
    lines = [json.dumps({"text": f"line {number}", "n": number, "more": [1.5, None]}) for number in range(4)]
    (place / "texts" / "text.jsonl").write_text("\n".join(lines))


def strange_value(chance: random.Random, value: Any) -> Any:
    """A value of another type, or an extreme one."""
    deep: list[Any] = []
    for _ in range(chance.choice([50, 500])):
        deep = [deep]
    return chance.choice(
        [
            None, True, -1, 0, 1.5, 10**9, 2**63, 10**30, 10**400, -(2**62), float("nan"), float("inf"), 1e308, "",
            "x" * 10_000, "../../etc/passwd", "/etc/passwd", "\0", "\ud83d", "9" * 5000 + ":4", [], {}, [value],
            {"x": value}, deep, [[1, 2]] * 1000, str(value), [value, value],
        ]
    )  # fmt: skip


def changed_value(chance: random.Random, content: Any) -> Any:
    """The content with one value changed, dropped or moved somewhere within it."""
    if chance.random() < 0.15 or not isinstance(content, dict | list) or not content:
        return strange_value(chance, content)
    copy = dict(content) if isinstance(content, dict) else list(content)
    key = chance.choice(list(copy) if isinstance(copy, dict) else range(len(copy)))
    action = chance.random()
    if action < 0.1:
        del copy[key]
    elif action < 0.15 and isinstance(copy, dict):
        copy[chance.choice(["", "x" * 1000, "__metadata__", f"{key}x", "weight_map"])] = copy[key]
    else:
        copy[key] = changed_value(chance, copy[key])
    return copy


def as_json(chance: random.Random, content: Any) -> bytes:
    """JSON text, sometimes with a key twice, or a very deep or long part that no writer would make."""
    text = json.dumps(content)
    if chance.random() < 0.1:
        part = chance.choice(["[" * 100_000, "9" * 5000, '{"a":' * 2000, '"a": 1, "a": 2,', "\ufeff", "NaN"])
        place = chance.randrange(len(text) + 1)
        text = text[:place] + part + text[place:]
    return text.encode()


def mutated_bytes(chance: random.Random, data: bytes) -> bytes:
    """Bytes flipped, cut, repeated or put in; most of them near the beginning, where headers are."""
    changed = bytearray(data)
    for _ in range(chance.choice([1, 1, 2, 8])):
        place = min(int(chance.expovariate(4 / min(len(data), 4000))), len(changed))
        action = chance.random()
        if action < 0.6 and place < len(changed):
            changed[place] = chance.choice([0, 1, 0x7F, 0xFF, chance.randrange(256)])
        elif action < 0.75:
            changed[place : place + 8] = chance.choice([2**63, 2**32, 2**40, 2**64 - 1]).to_bytes(8, "little")
        elif action < 0.85:
            del changed[place : place + chance.randrange(1, 64)]
        elif action < 0.95:
            changed[place:place] = bytes(changed[place : place + chance.randrange(1, 64)])
        else:
            del changed[place:]
    return bytes(changed)


def mutated(chance: random.Random, reader: Reader, data: bytes) -> bytes:
    """One mutated input: by its bytes, or by the JSON in it."""
    if chance.random() < 0.35 or reader.file.endswith((".yaml", ".gguf")):
        return mutated_bytes(chance, data)
    if reader.file.endswith(".safetensors"):
        length = int.from_bytes(data[:8], "little")
        content = json.loads(data[8 : 8 + length])
        metadata = content.get("__metadata__", {})
        if "optimum_barber.masks" in metadata and chance.random() < 0.7:
            inner = changed_value(chance, json.loads(metadata["optimum_barber.masks"]))
            header = json.dumps({**content, "__metadata__": {"optimum_barber.masks": as_json(chance, inner).decode()}})
            return len(header.encode()).to_bytes(8, "little") + header.encode() + data[8 + length :]
        text = as_json(chance, changed_value(chance, content))
        return len(text).to_bytes(8, "little") + text + data[8 + length :]
    if reader.file.endswith(".jsonl"):
        lines = data.split(b"\n")
        place = chance.randrange(len(lines))
        lines[place] = as_json(chance, changed_value(chance, json.loads(lines[place])))
        return b"\n".join(lines)
    return as_json(chance, changed_value(chance, json.loads(data)))


def listing(folder: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of all files."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def answer_of(reader: Reader, folder: Path) -> str:
    """What a reader answers: 'value', 'refused', or the fault."""
    before = listing(folder)
    try:
        with redirect_stderr(StringIO()):
            reader.read(folder)
        answer = "value"
    except BarberError as error:
        one_line = "\n" not in str(error) or reader.file.endswith(".yaml")  # a recipe's faults are one line each
        answer = "refused" if one_line and len(str(error)) < 4100 else f"long message {str(error)[:200]}"
    except BaseException as error:  # whatever is no BarberError is what is looked for
        answer = f"{type(error).__name__}: {str(error)[:200]}"
    return answer if listing(folder) == before else "a file was written"


def work(reader: Reader, folder: Path, inputs: int, seed: str, first: int, sender: Any) -> None:
    """Read the mutated inputs from number `first` on, in a process of its own, and send each answer."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, resource.RLIM_INFINITY))
    path = folder / reader.file
    data = path.read_bytes()
    for number in range(first, inputs):
        path.write_bytes(mutated(random.Random(f"{seed} {number}"), reader, data))
        sender.send((number, answer_of(reader, folder)))
        path.write_bytes(data)


def answers(reader: Reader, folder: Path, inputs: int, seed: str) -> Iterator[tuple[int, str, float]]:
    """The number, the answer and the seconds of every input; a process that dies or hangs is begun anew."""
    number = 0
    context = multiprocessing.get_context("fork")
    data = (folder / reader.file).read_bytes()
    while number < inputs:
        receiver, sender = context.Pipe(False)
        process = context.Process(target=work, args=(reader, folder, inputs, seed, number, sender))
        process.start()
        sender.close()
        try:
            while number < inputs:
                started = time.perf_counter()
                if not receiver.poll(SECONDS):
                    raise TimeoutError
                done, answer = receiver.recv()
                yield done, answer, time.perf_counter() - started
                number = done + 1
        except (TimeoutError, EOFError) as error:
            process.kill()
            yield number, "hung" if isinstance(error, TimeoutError) else "died", SECONDS
            number += 1
        process.join()
        (folder / reader.file).write_bytes(data)


def fuzz(names: Mapping[str, Reader], inputs: int, seed: int) -> int:
    """Print a row for each reader and a line for each kind of fault; return how many faults there were."""
    faults = 0
    emit("| reader | inputs | read | refused | faults | slowest |\n| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as place:
        make_inputs(Path(place))
        for name, reader in names.items():
            folder = Path(place) / f"work {name}"
            shutil.copytree(Path(place) / reader.folder, folder)
            counts: Counter[str] = Counter()
            kinds: dict[str, int] = {}
            slowest = 0.0
            for number, answer, seconds in answers(reader, folder, inputs, f"{seed} {name}"):
                counts[answer if answer in ("value", "refused") else "fault"] += 1
                slowest = max(slowest, seconds)
                if answer not in ("value", "refused"):
                    kinds.setdefault(answer, number)
            row = [name, inputs, counts["value"], counts["refused"], counts["fault"], f"{slowest:.2f} s"]
            emit(f"| {' | '.join(map(str, row))} |")
            for kind, number in kinds.items():
                emit(f"  input {number} of {name!r}: {kind}")
            faults += counts["fault"]
    return faults


def main() -> int:
    """Fuzz the readers; 1 where there is a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=READERS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    chosen = {args.only: READERS[args.only]} if args.only else READERS
    return int(fuzz(chosen, args.inputs, args.seed) > 0)


if __name__ == "__main__":
    sys.exit(main())
