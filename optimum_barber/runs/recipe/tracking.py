"""Trackers that follow a run: accelerate's own, none of ours."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...base.errors import BarberError


class Trackers:
    """Passes figures on to MLflow, TensorBoard or Weights & Biases through accelerate.

    `directory` takes the files of those that write any. Raises BarberError if a tracker's package is not installed.
    """

    def __init__(self, names: Sequence[str], run: str, directory: Path, settings: Mapping[str, Any]) -> None:
        self._trackers: list[Any] = []
        if not names:
            return
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

        PartialState()
        available = [str(tracker) for tracker in get_available_trackers()]
        missing = [name for name in names if name not in available]
        if missing:
            raise BarberError(f"track {missing[0]!r} needs its package: pip install {missing[0]}")
        for name in names:
            kind = LOGGER_TYPE_TO_CLASS[name]
            options = {"logging_dir": str(directory)} if kind.requires_logging_directory else {}
            tracker = kind(run, **options)
            tracker.start()
            tracker.store_init_configuration(dict(settings))
            self._trackers.append(tracker)

    def log(self, figures: Mapping[str, float], step: int | None) -> None:
        """Pass figures on."""
        for tracker in self._trackers:
            tracker.log(dict(figures), step=step)

    def finish(self) -> None:
        """Close all trackers."""
        for tracker in self._trackers:
            tracker.finish()
