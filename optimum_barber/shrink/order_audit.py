"""The check of a permuted checkpoint: every tensor is that of the model it was made of, its channels as recorded."""

from pathlib import Path

import torch

from ..base.errors import BarberError
from ..checkpoints.channel_order import ChannelOrder, read_order
from ..checkpoints.safetensors import SafetensorsWeights
from ..models.loading import ModelReference, load_model, local_model, resolve_model
from ..models.source import ModelSource
from .audit import differences
from .permutation import Site, permute, sites_of


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
    reference = _dense_model(record, base) if weights else None
    if reference is None:
        return f"{permuted}: the dense model is not at hand, nothing was compared", []
    faults = _faults(record, stored, reference)
    return f"{permuted}: {'FAILED' if faults else f'every weight is that of {reference.name}'}", faults


def _dense_model(record: ChannelOrder, base: str | None) -> ModelReference | None:
    if base is not None:
        return resolve_model(base)
    name = record.base_model["name"]
    return local_model(name) if name is not None else None


def _faults(record: ChannelOrder, stored: SafetensorsWeights, reference: ModelReference) -> list[str]:
    source = ModelSource(load_model(reference, record.base_model["dtype"]))
    sites = _recorded_sites(record, source)
    if len(sites) < len(record.sites):
        return [f"{reference.name} has other channels than are recorded"]
    orders = {site.name: torch.tensor(record.sites[site.name].order) for site in sites}
    permute(dict(source.model.named_parameters()), sites, orders)
    return [f"{module}: {fault}" for module, fault in differences(source.model.state_dict(), stored, set()).items()]


def _recorded_sites(record: ChannelOrder, source: ModelSource) -> list[Site]:
    """Return the sites of a model that are recorded with as many channels as they have."""
    try:
        sites = sites_of(source)
    except BarberError:
        return []
    recorded = []
    for site in sites:
        if site.name in record.sites and len(record.sites[site.name].order) == site.size:
            recorded.append(site)
    return recorded
