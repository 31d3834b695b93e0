"""The directory or file that a run writes: checked before any work, never left half-written."""

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
    """Return the absolute path of the output directory, if a run may write it.

    Raises:
        BarberError: it is an input or lies within one, is not empty (without `overwrite`), cannot be written, or has
            an unfinished run (without `overwrite` or `resume`).
    """
    output = Path(directory).expanduser().resolve()
    for path in inputs:
        source = path.expanduser().resolve()
        if output == source or source in output.parents:
            raise BarberError(f"output {directory} is the input {path}, or lies within it")
        if output in source.parents:
            raise BarberError(f"output {directory} holds the input {path}")
    _check_place(output, overwrite, directory)
    partial = partial_of(output)
    if unfinished(partial) and not (overwrite or resume):
        raise BarberError(f"an unfinished run lies in {partial}: --resume goes on with it, --overwrite starts anew")
    return output


def _check_place(output: Path, overwrite: bool, name: str | Path) -> None:
    if os.path.ismount(output):
        raise BarberError(f"output {name} is a mount point, which cannot be replaced: give a folder within it")
    parent = next(folder for folder in output.parents if folder.exists())
    place = parent
    if output.exists():
        place = output
        if not output.is_dir():
            raise BarberError(f"output {name} is a file")
        if any(output.iterdir()) and not overwrite:
            raise BarberError(f"output {name} is not empty: give another, or --overwrite")
    if not parent.is_dir() or not os.access(place, os.W_OK):
        raise BarberError(f"output {name} cannot be written: no permission in {parent}")


def check_file(file: str | Path, overwrite: bool) -> Path:
    """Return the path of an output file, if a run may write it.

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


class _FasterRunError(BarberError):
    """Another run has made the partial directory, which stays."""


def partial_of(output: Path) -> Path:
    """Return the sibling directory in which `output` is written before it is put in place."""
    return output.with_name(output.name + ".partial")


def _is_foreign(partial: Path) -> bool:
    if not partial.is_dir():
        return partial.exists()
    return not (partial / PARTIAL_MARK).exists() and any(partial.iterdir())  # an empty one may be what a kill left


def discard(partial: Path) -> None:
    """Remove a partial directory, its mark last: what a kill leaves of it is still known as ours."""
    for path in partial.iterdir() if partial.is_dir() else ():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != PARTIAL_MARK:
            with suppress(OSError):
                path.unlink()
    shutil.rmtree(partial, ignore_errors=True)


def unfinished(partial: Path) -> bool:
    """True if a partial directory holds a run that can be resumed."""
    return (partial / STATE_DIRECTORY / STATE_NAME).is_file()


@contextmanager
def output_lock(output: Path, folder: str = "") -> Iterator[None]:
    """Hold a lock in `folder` of a directory, so that no other run works on it; a `BarberError` where one does."""
    (output / folder).mkdir(exist_ok=True)
    lock = FileLock(output / folder / LOCK_NAME)
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
    """Yield a sibling `DIR.partial`, which replaces `output` when the block ends well, and is removed when it fails.

    What `output` held before stays untouched until then, also through a kill. A partial directory that holds an
    unfinished run is gone on with (`resume`), and stays when the block fails.
    """
    partial = partial_of(output)
    if _is_foreign(partial):
        raise BarberError(f"output {output}: {partial} is in the way and not ours; move it")
    if not (resume and unfinished(partial)):
        discard(partial)
    new_parents = [parent for parent in partial.parents if not parent.exists()]
    try:
        with _refusals_of(output):
            partial.mkdir(parents=True, exist_ok=resume)
            (partial / PARTIAL_MARK).touch()
        yield partial
    except _FasterRunError:
        raise
    except BaseException:
        _remove_failed(partial, new_parents)
        raise
    try:
        _swap_in(partial, output)
    except OSError as error:
        raise BarberError(f"output {output} cannot be put in place ({error.strerror}); all is in {partial}") from None
    discard(partial)


def _remove_failed(partial: Path, new_parents: list[Path]) -> None:
    if unfinished(partial):
        return
    discard(partial)
    for path in new_parents:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _refusals_of(output: Path) -> Iterator[None]:
    try:
        yield
    except FileExistsError as error:
        raise _FasterRunError(f"output {output} cannot be written: {error.strerror}") from None
    except OSError as error:
        raise BarberError(f"output {output} cannot be written: {error.strerror}") from None


def _swap_in(partial: Path, output: Path) -> None:
    """Put `partial` in the place of `output`; what `output` was is in `partial` then, to be removed."""
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
    """Exchange two directories in one atomic step; False where the system cannot."""
    at_cwd, exchange = -100, 2
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    return rename(at_cwd, os.fsencode(first), at_cwd, os.fsencode(second), exchange) == 0


def wait_for(path: Path, seconds: int = 60) -> Path:
    """Wait for a path that another rank has made, which a network file system may show late, and return it."""
    for _ in range(seconds):
        if path.exists():
            return path
        time.sleep(1)
    raise BarberError(f"output {path} cannot be seen by every rank: give one on a file system that they share")


@contextmanager
def full_disk(partial: Path) -> Iterator[None]:
    """Report a full disk by an `UnfinishedError`; after any other failure log that the run can be resumed, if so."""
    try:
        yield
    except BaseException as error:
        staged_too = (partial.parent / PARTIAL_MARK).exists()  # as in a recipe's stage, which is removed as a whole
        resumable = unfinished(partial) and not staged_too
        refusal = error.__cause__ or error  # the system's own error, or one that it caused, as in `write_file`
        if isinstance(refusal, OSError) and refusal.errno in (errno.ENOSPC, errno.EDQUOT):
            advice = "make room and go on with --resume" if resumable else "nothing was kept"
            raise UnfinishedError(f"no space is left for {partial}; {advice}") from None
        if resumable:
            logger.warning("what is done lies in %s: go on with --resume", partial)
        raise
