"""Where producers read masks from: the files of a run, and whether they were made for its model."""

from pathlib import Path

from ..base.files import is_there
from ..checkpoints.channel_order import check_order
from ..checkpoints.names import SPARSITY_NAME
from ..checkpoints.record import read_record
from ..models.loading import ModelReference
from .settings import BarberConfig

ARGUMENTS = ("sparse_model", "masks")  # of producers that read masks


def mask_paths(config: BarberConfig) -> list[Path]:
    """Return the files and directories from which a producer takes its masks."""
    names = [str(config.producer_args[key]) for key in ARGUMENTS if config.producer_args.get(key) is not None]
    return [Path(name) for name in names if is_there(name)]


def check_mask_orders(config: BarberConfig, model: ModelReference | None) -> None:
    """Refuse masks that are recorded for a model whose channels stand in another order; see `check_order`."""
    for path in mask_paths(config):
        directory = path if path.is_dir() else path.parent
        if (directory / SPARSITY_NAME).is_file():
            check_order(model, read_record(directory).base_model["name"], f"mask {path}")
