"""Ranks for tests: processes forked from a server that has imported everything once, joined by gloo."""

import json
import os
import sys
import tempfile
import time
from datetime import timedelta
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import distributed as dist
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401 imported once, in the server

from optimum_barber import BarberConfig, BarberSparsifier
from optimum_barber.base.ranks import RankGroup, all_ranks
from optimum_barber.cli import launch, main
from optimum_barber.models.loading import load_model, resolve_model
from optimum_barber.prune.refine.settings import RefineSettings
from optimum_barber.prune.refine.steps import refined
from optimum_barber.prune.refine.whole import trial_of
from optimum_barber.tensors.masks import PackedMask
from optimum_barber.tensors.patterns import SparsityPattern

from .conftest import tiny_model

SERVER = get_context("forkserver")
SERVER.set_forkserver_preload(["tests.ranks"])


def start(count, work, *arguments, seconds=1500, **named):
    """Run `work(rank, *arguments)` as `count` ranks; their exit statuses, None for one that had to be ended."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        tasks = [(rank, count, f"{folder}/store", partial(work, **named), arguments) for rank in range(count)]
        processes = [SERVER.Process(target=_rank, args=task) for task in tasks]
        for process in processes:
            process.start()
        for process in processes:
            process.join(max(seconds + started - time.monotonic(), 0))
            if process.is_alive():
                process.kill()
        for path in sorted(Path(folder).glob("stderr-*")):
            sys.stderr.write(path.read_text())
    return [process.exitcode for process in processes]


def _rank(rank, count, store, work, arguments):
    torch.set_num_threads(1)
    sys.stderr = open(Path(store).parent / f"stderr-{rank}", "w")
    if work.func is command:
        sys.exit(work(rank, count, *arguments))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
    work(rank, *arguments)
    dist.destroy_process_group()


def command(rank, count, port, output, arguments, late=None):
    """`optimum-barber ARGUMENTS` as a launcher starts it; what it says goes to files in `output`.

    The rank `late` notices what is wrong long after the others have done so.
    """
    launch.GRACE = timedelta(seconds=0.1)
    if rank == late:
        say = launch.Voice.say
        launch.Voice.say = lambda *message: (time.sleep(1), say(*message))
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.stdout, sys.stderr = (open(Path(output) / f"{name}-{rank}", "w") for name in ("stdout", "stderr"))
    try:
        return main(arguments)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def free_port():
    """A port that nobody listens on."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def note(directory, rank, content):
    """Leave what a rank has to tell."""
    (Path(directory) / f"{rank}.json").write_text(json.dumps(content))


def notes(directory):
    """What the ranks have told, in their order."""
    return [json.loads(path.read_text()) for path in sorted(Path(directory).glob("*.json"))]


def prune_in_memory(rank, directory, settings, windows, changes=None):
    """Prune a tiny model; rank 0 writes it, every rank tells its masks and errors."""
    model = tiny_model(**(changes or {}))
    result = BarberSparsifier(model).sparsify(BarberConfig(**settings), windows, save_dir=directory / "out", quiet=True)
    note(directory, rank, told(result))


def prune_checkpoint(rank, directory, model, settings, windows):
    """Prune a checkpoint loaded whole."""
    sparsifier = BarberSparsifier(load_model(resolve_model(str(model))))
    note(directory, rank, told(sparsifier.sparsify(BarberConfig(**settings), windows, quiet=True)))


def refine(rank, directory, masks, windows):
    """Refine masks of a tiny model."""
    model = tiny_model()
    linears = {name: model.get_submodule(name) for name in masks}
    with all_ranks(torch.device("cpu")) as group:
        trial = trial_of(model, linears, windows, SparsityPattern(0.5), group)
        masks, looks = refined(trial, masks, RefineSettings(steps=12, batch_size=3))
    hashes = {name: PackedMask.pack(keep).sha256 for name, keep in masks.items()}
    note(directory, rank, {"masks": hashes, "looks": looks})


def evaluate_recipe(rank, directory, recipe):
    """Open the model of a recipe for lm-eval, which its first rank makes."""
    from optimum_barber.integrations.lm_eval.model import BarberLM

    lm = BarberLM(recipe=str(recipe), device="cpu")
    note(directory, rank, [lm.rank, lm.world_size, lm.sparsity["mask_fingerprint"]])


def leave_a_group_open(_):
    """The first rank fails between two verbs of a group, the other waits in one."""
    with launch.joined() as voice:
        group = RankGroup(torch.device("cpu"))
        if group.first:
            voice.failed = True
            return 2
        group.wait()
    return 0


def told(result):
    """Hashes of the masks and the errors of the blocks."""
    errors = [(report.error_before, report.error_after, report.swaps) for report in result.reports]
    return {"masks": {name: mask.sha256 for name, mask in result.masks.items()}, "errors": errors}


def stream(rank, directory, model, settings, windows, output, dies=None, **how):
    """Prune a checkpoint from disk to disk; a rank may be killed after some blocks."""
    left = [dies[1]] if dies and dies[0] == rank else [-1]

    def kill(_):
        left[0] -= 1
        if left[0] == 0:
            (directory / "killed").write_text(str(time.monotonic()))
            os.kill(os.getpid(), 9)

    try:
        result = BarberSparsifier(None, None, resolve_model(str(model)), stream="always").sparsify(
            BarberConfig(**settings), windows, directory / output, callbacks=[kill], quiet=True, **how
        )
        note(directory, rank, told(result))
    except Exception as error:
        note(directory, rank, f"{type(error).__name__}: {error}")
        sys.exit(1)
