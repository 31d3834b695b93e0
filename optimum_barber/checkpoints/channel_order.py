"""`channel_order.json`: in which order a checkpoint has the channels of the model that it was made of."""

import logging
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator
from typing_extensions import TypedDict

from ..base.errors import BarberError
from ..models.loading import ModelReference
from .names import ORDER_NAME
from .record import read_versioned

logger = logging.getLogger(__name__)


class PermutedModel(TypedDict):
    """The model that was permuted; without a name where it was made in memory."""

    name: str | None
    model_type: str
    dtype: Literal["float32", "float16", "bfloat16"]


class OrderedChannels(BaseModel):
    """Channels that changed places among each other."""

    kind: Literal["channels", "values", "stream"] = Field(description="of the FFN, of attention's values, residual")
    order: list[int] = Field(min_length=1, description="which channel stands at each place, by its former position")
    dropped_before: float = Field(
        ge=0, le=1, description="share of the scores that were looked at that a mask drops in the former order"
    )
    dropped_after: float = Field(ge=0, le=1, description="the same in the new order")

    @field_validator("order")
    @classmethod
    def _is_order(cls, order: list[int]) -> list[int]:
        if sorted(order) != list(range(len(order))):
            raise ValueError(f"not an order of {len(order)} channels")
        return order


class ChannelOrder(BaseModel):
    """`channel_order.json`: what was permuted, for which pattern, from what, with what."""

    model_config = ConfigDict(extra="forbid", title="optimum_barber channel order")

    format_version: Literal[1] = Field(1, description="version of this format")
    pattern: str = Field(description="N:M that the order is made for")
    sites: dict[str, OrderedChannels] = Field(
        description="by the Linear that reads the channels, for values with the number of their group; or stream"
    )
    calibration: dict[str, Any] = Field(description="source, samples, sequence_length, seed, fingerprint")
    base_model: PermutedModel = Field(description="name, model_type and dtype of the model that was permuted")
    software: dict[str, str] = Field(description="versions")

    @property
    def orders(self) -> dict[str, list[int]]:
        """Which channel stands at each place, by site."""
        return {name: site.order for name, site in self.sites.items()}

    def dropped(self) -> dict[str, tuple[float, float]]:
        """Return the mean share that a mask drops before and after, by kind of channels."""
        shares: dict[str, list[OrderedChannels]] = {}
        for site in self.sites.values():
            shares.setdefault(site.kind, []).append(site)
        means = {}
        for kind, sites in shares.items():
            before = sum(site.dropped_before for site in sites) / len(sites)
            means[kind] = before, sum(site.dropped_after for site in sites) / len(sites)
        return means


def read_order(directory: str | Path) -> ChannelOrder:
    """Return the record of a permuted checkpoint; raises BarberError if it is missing, broken or newer."""
    path = Path(directory) / ORDER_NAME
    return read_versioned(path, ChannelOrder, "record of a channel order")


def check_order(model: ModelReference | None, base: str | None, what: str) -> None:
    """Refuse masks, or a cut, that were made for channels in another order than a permuted model has them.

    A model without a record may have been made of a permuted one: then a warning says so.

    Args:
        model: the one that they are to be used on; None for one made in memory.
        base: the recorded name of the one that they were made for.
        what: names them in the message.

    Raises:
        BarberError: both models are at hand and differ, or `base` is what `model` was permuted from.
    """
    if model is None or base is None:
        return
    own, other = _order_in(model.directory), _order_in(Path(base))
    if own is not None and own.base_model["name"] == base:
        other = None  # though it may not be at hand
    elif not Path(base).is_dir():
        return
    if _orders_of(own) == _orders_of(other):
        return
    message = f"{what} is made for {base}, whose channels stand in another order than those of {model.full_name}"
    if own is not None:
        raise BarberError(message)
    logger.warning("%s, unless that was made of it", message)


def _order_in(directory: Path) -> ChannelOrder | None:
    return read_order(directory) if (directory / ORDER_NAME).is_file() else None


def _orders_of(record: ChannelOrder | None) -> dict[str, list[int]]:
    return {} if record is None else record.orders
