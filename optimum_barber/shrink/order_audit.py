"""The check of a permuted checkpoint: every tensor is that of the model it was made of, its channels as recorded."""

from pathlib import Path

import torch

from ..base.errors import BarberError
from ..checkpoints.channel_order import ChannelOrder, read_order
from ..checkpoints.safetensors import SafetensorsWeights
from ..models.loading import ModelReference, load_model
from ..models.source import ModelSource
from .audit import dense_model, differences
from .permutation import permute, sites_of


def audit_order(directory: str | Path, base: str | None = None, weights: bool = True) -> tuple[str, list[str]]:
    """Check a permuted checkpoint against the dense model.

    Args:
        directory: of the checkpoint.
        base: the dense model; None for the recorded one, where it is on this machine.
        weights: whether to look at the dense model at all.

    Returns:
        What was checked, in words, and one line for every tensor that differs.

    Raises:
        BarberError: there is no record, no checkpoint or no model `base`.
    """
    record, stored = read_order(directory), SafetensorsWeights.open(directory)
    permuted = f"channels of {len(record.sites)} sites in another order"
    reference = dense_model(record.base_model["name"], base) if weights else None
    if reference is None:
        reason = f"base model {record.base_model['name']} is not at hand, --base names it" if weights else "as asked"
        return f"{permuted}: nothing was compared, {reason}", []
    faults = _faults(record, stored, reference)
    return f"{permuted}: {'FAILED' if faults else f'every weight is that of {reference.name}'}", faults


def _faults(record: ChannelOrder, stored: SafetensorsWeights, reference: ModelReference) -> list[str]:
    source = ModelSource(load_model(reference, record.base_model["dtype"]))
    try:
        sites = sites_of(source, {site.kind for site in record.sites.values()})
    except BarberError as error:
        return [f"{reference.name}: {error}"]
    sizes = {site.name: site.size for site in sites}
    if sizes != {name: len(site.order) for name, site in record.sites.items()}:
        return [f"{reference.name} has other channels than are recorded"]
    orders = {name: torch.tensor(site.order) for name, site in record.sites.items()}
    permute(dict(source.model.named_parameters()), sites, orders)
    return [f"{module}: {fault}" for module, fault in differences(source.model.state_dict(), stored, set()).items()]
