"""Profile a run by source line: where its seconds go, and how much of the machine's product rate it reaches.

    python -m benchmarks.profile [--only default] [--model MODEL] [--calibration TEXT] [--precision auto] [--lines 30]

A thread looks every few milliseconds which line of this package computes; what that line calls outside of the package
counts to it. Prints the seconds by room and file and by line, and the run's time over one plain forward pass.
"""

import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import FrameType

import optimum_barber

from .one_pass import SETTINGS, arguments, measure, opened, plain_seconds
from .table import emit

PACKAGE = str(Path(optimum_barber.__file__).parent)
EVERY = 0.004


class LineSampler:
    """Context manager: counts which line of the package the calling thread is in."""

    def __init__(self) -> None:
        self.lines: Counter[tuple[str, int]] = Counter()
        self._thread = threading.get_ident()
        self._ended = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self.seconds = 0.0

    def __enter__(self) -> "LineSampler":
        self._started = time.perf_counter()
        self._sampler.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._started
        self._ended.set()
        self._sampler.join()

    def _sample(self) -> None:
        while not self._ended.wait(EVERY):
            frame: FrameType | None = sys._current_frames().get(self._thread)
            while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
                frame = frame.f_back
            if frame is not None:
                self.lines[frame.f_code.co_filename.removeprefix(PACKAGE + "/"), frame.f_lineno] += 1


def emit_table(sampler: LineSampler, count: int) -> None:
    """Print the seconds by file and by line, the most first."""
    total = sum(sampler.lines.values())
    files: Counter[str] = Counter()
    for (file, _), samples in sampler.lines.items():
        files[file] += samples
    emit("\n| seconds | share | file |\n| ---: | ---: | --- |")
    for file, samples in files.most_common(count // 2):
        emit(f"| {samples / total * sampler.seconds:.2f} | {samples / total:.1%} | {file} |")
    emit("\n| seconds | share | line | source |\n| ---: | ---: | --- | --- |")
    for (file, line), samples in sampler.lines.most_common(count):
        source = (Path(PACKAGE) / file).read_text(encoding="utf-8").splitlines()[line - 1].strip()
        emit(f"| {samples / total * sampler.seconds:.2f} | {samples / total:.1%} | {file}:{line} | `{source[:80]}` |")


def main() -> int:
    """Run the benchmark."""
    parser = arguments(__doc__)
    parser.set_defaults(only="default")
    parser.add_argument("--lines", type=int, default=30)
    args = parser.parse_args()
    load, windows = opened(args)
    for name in [args.only] if args.only else SETTINGS:
        model = load()
        plain = plain_seconds(model, windows)
        with LineSampler() as sampler:
            run = measure(name, model, windows)
        emit(f"{name}: {run.seconds:.1f} s, {run.seconds / plain:.2f} x a plain forward pass of {plain:.1f} s")
        emit_table(sampler, args.lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
