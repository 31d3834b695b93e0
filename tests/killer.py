"""Run a command undisturbed, then again with a SIGKILL at random changes of the disk: no clock decides when.

    python -m tests.killer KILLS WORD...

`OUT` in a word is `whole` for the undisturbed run and `out` for the other. After each kill a line tells which files
named `*.json` stand in `out` and beside it.
"""

import gc
import os
import random
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

MODULES = ["optimum_barber.prune.sparsifier", "accelerate", "transformers.models.llama.modeling_llama"]
MODULES += ["transformers.models.auto.modeling_auto", "transformers.tokenization_utils_tokenizers"]
TOOLS = ["optimum_barber.integrations.lora.training", "optimum_barber.integrations.quantization.quantize"]
CHANGES = {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate"}


def killed(folder, kills, *words):
    """Run this module in `folder`; the lines that it prints."""
    command = [sys.executable, "-m", "tests.killer", kills, *words]
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([*map(str, command)], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def changes(words, deadly=0):
    """Run a command in a fork that dies before its `deadly`-th change of the disk; its status, and its changes."""
    source, sink = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(source)
        write, count = os.pwrite, 0

        def change():
            nonlocal count
            count += 1
            os.write(sink, b".")
            if count == deadly:
                os.kill(os.getpid(), signal.SIGKILL)

        def watch(event, arguments):
            writes = event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
            if writes or event in CHANGES:
                change()

        def write_half(file, data, position):
            if count + 1 == deadly:
                write(file, data[: len(data) // 2], position)
            change()
            return write(file, data, position)

        os.pwrite = write_half
        sys.addaudithook(watch)
        os._exit(import_module("optimum_barber.cli").main(words))
    os.close(sink)
    with os.fdopen(source, "rb") as made:
        count = len(made.read())
    return os.waitpid(child, 0)[1], count


def run(kills, words):
    """See the module."""
    for module in [*MODULES, *(TOOLS if words[0] == "run" else [])]:
        import_module(module)  # once, before any fork
    gc.freeze()
    whole, disturbed = ([word.replace("OUT", name) for word in words] for name in ("whole", "out"))
    status, count = changes(whole)
    assert status == 0, status
    moments, done = random.Random(0), 0
    for _ in range(kills):
        status, _ = changes(disturbed, moments.randint(1, max(count // 3, 1)))
        if status == 0:
            break
        assert status == signal.SIGKILL, status
        done += 1
        print(sorted(str(path) for path in Path().glob("out*/**/*.json")), flush=True)
    else:
        assert changes(disturbed)[0] == 0
    print(f"{done} kills, {count} changes")


if __name__ == "__main__":
    run(int(sys.argv[1]), sys.argv[2:])
