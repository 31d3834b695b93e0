"""The directory or file that a run writes: checked before any work, never half-written."""

import ctypes
import errno
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import BarberError, UnfinishedError

logger = logging.getLogger(__name__)
PARTIAL_MARK = ".optimum_barber_partial"
STATE_DIRECTORY = ".resume"  # within the partial directory: what a run needs to go on where it was stopped
STATE_NAME = "state.json"
LOCK_NAME = ".lock"


def check_output(directory: str | Path, overwrite: bool, inputs: list[Path], resume: bool = False) -> Path:
    """The output directory, if it may be written.

    Raises:
        BarberError: it is an input or within one, is not empty (without `overwrite`), cannot be written, or an
            unfinished run for it is there that is neither to be resumed nor to be overwritten.
    """
    output = Path(directory).expanduser().resolve()
    for path in inputs:
        held = path.expanduser().resolve()
        if output == held or held in output.parents:
            raise BarberError(f"output {directory} is the input {path}, or lies within it")
        if output in held.parents:
            raise BarberError(f"output {directory} holds the input {path}")
    if os.path.ismount(output):
        raise BarberError(f"output {directory} is a mount point, which cannot be replaced: give a folder within it")
    if output.exists() and not output.is_dir():
        raise BarberError(f"output {directory} is a file")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise BarberError(f"output {directory} is not empty: give another, or --overwrite")
    parent = next(p for p in output.parents if p.exists())
    if not parent.is_dir() or not os.access(output if output.is_dir() else parent, os.W_OK):
        raise BarberError(f"output {directory} cannot be written: no permission in {parent}")
    partial = partial_of(output)
    if unfinished(partial) and not (overwrite or resume):
        raise BarberError(f"an unfinished run lies in {partial}: --resume goes on with it, --overwrite starts anew")
    return output


def check_file(file: str | Path, overwrite: bool) -> Path:
    """The file to write, if it may be.

    Raises:
        BarberError: it is there (without `overwrite`), is a directory, or its folder is missing or closed to us.
    """
    path = Path(file)
    folder = path.absolute().parent
    if path.exists() and (path.is_dir() or not overwrite):
        raise BarberError(f"output {path} is there already: give another, or --overwrite")
    if not folder.is_dir():
        raise BarberError(f"output {path} cannot be written: there is no such folder")
    if not os.access(folder, os.W_OK):
        raise BarberError(f"output {path} cannot be written: no permission in {folder}")
    return path


def partial_of(output: Path) -> Path:
    """The sibling in which `output` is made."""
    return output.with_name(output.name + ".partial")


def is_foreign(partial: Path) -> bool:
    """Whether what lies in a partial directory's place is not ours; an empty one may be what a kill left of it."""
    if not partial.is_dir():
        return partial.exists()
    return not (partial / PARTIAL_MARK).exists() and any(partial.iterdir())


def discard(partial: Path) -> None:
    """Remove a partial directory, its mark last, so that what a kill leaves of it is still known as ours."""
    for path in partial.iterdir() if partial.is_dir() else ():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != PARTIAL_MARK:
            with suppress(OSError):
                path.unlink()
    shutil.rmtree(partial, ignore_errors=True)


def unfinished(partial: Path) -> bool:
    """Whether a run that can be resumed lies in a partial directory."""
    return (partial / STATE_DIRECTORY / STATE_NAME).is_file()


@contextmanager
def alone(output: Path, within: str = "") -> Iterator[None]:
    """Inside, no other run works on this output.

    Args:
        output: a directory.
        within: folder of it that holds the lock, made if need be.

    Raises:
        BarberError: another run does.
    """
    (output / within).mkdir(exist_ok=True)
    lock = FileLock(output / within / LOCK_NAME)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BarberError(f"output {output} is being written by another run") from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def staged(output: Path, resume: bool = False) -> Iterator[Path]:
    """A sibling `DIR.partial` that takes the place of `output` when the block ends well, else vanishes.

    What `output` held before stays untouched until then, also through a kill. With `resume`, a partial directory
    that holds an unfinished run is taken up; and one that holds it when the block fails stays.
    """
    partial = partial_of(output)
    if is_foreign(partial):
        raise BarberError(f"output {output}: {partial} is in the way and not ours; move it")
    if not (resume and unfinished(partial)):
        discard(partial)
    made = [parent for parent in partial.parents if not parent.exists()]
    with _refusals_of(output):
        partial.mkdir(parents=True, exist_ok=resume)  # fails, and removes nothing, where another run was faster
    try:
        with _refusals_of(output):
            (partial / PARTIAL_MARK).touch()
        yield partial
    except BaseException:
        if not unfinished(partial):
            discard(partial)
            for path in made:
                shutil.rmtree(path, ignore_errors=True)
        raise
    try:
        _swap_in(partial, output)
    except OSError as error:
        raise BarberError(f"output {output} cannot be put in place ({error.strerror}); all is in {partial}") from None
    discard(partial)


@contextmanager
def _refusals_of(output: Path) -> Iterator[None]:
    """What the system refuses inside, as one line."""
    try:
        yield
    except OSError as error:
        raise BarberError(f"output {output} cannot be written: {error.strerror}") from None


def _swap_in(partial: Path, output: Path) -> None:
    """Put `partial` in the place of `output`; what was there ends up in `partial`, to be removed."""
    for path in partial.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    mark = partial / PARTIAL_MARK
    if not output.exists():
        partial.rename(output)
        (output / PARTIAL_MARK).unlink()
    elif _exchange(partial, output):
        mark.touch()  # `partial` is now what was there before, and may go
        (output / PARTIAL_MARK).unlink()
    else:
        old = output.with_name(output.name + ".old")
        mark.unlink()
        output.rename(old)
        partial.rename(output)
        shutil.rmtree(old)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two directories in one atomic step, where the system can."""
    at_cwd, exchange = -100, 2
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    return rename(at_cwd, os.fsencode(first), at_cwd, os.fsencode(second), exchange) == 0


def shown(directory: Path, seconds: int = 60) -> Path:
    """A directory that another rank has made; network file systems may show it late.

    Raises:
        BarberError: it cannot be seen from here.
    """
    for _ in range(seconds):
        if directory.is_dir():
            return directory
        time.sleep(1)
    raise BarberError(f"output {directory} cannot be seen by every rank: give one on a file system that they share")


@contextmanager
def full_disk(partial: Path) -> Iterator[None]:
    """Tell of a full disk in one line, and after any other failure that something can be resumed, where it can.

    Raises:
        UnfinishedError: the disk is full.
    """
    try:
        yield
    except BaseException as error:
        if _is_for_lack_of_room(error):
            advice = "make room and go on with --resume" if unfinished(partial) else "nothing was kept"
            raise UnfinishedError(f"no space is left for {partial}; {advice}") from None
        if unfinished(partial):
            logger.warning("what is done lies in %s: go on with --resume", partial)
        raise


def _is_for_lack_of_room(error: BaseException) -> bool:
    """True for the system's own error, and for one that it caused, as in `write_file`."""
    refusal = error.__cause__ or error
    return isinstance(refusal, OSError) and refusal.errno in (errno.ENOSPC, errno.EDQUOT)
