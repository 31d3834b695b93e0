"""The Linear that closes its block: where nothing but its mask changes, it alone has to run again. Torch only."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from ..models.activations import Activations

ROOM = 2**28  # bytes; where its inputs take more, they are not kept


@dataclass
class Behind:
    """What the closing Linear was given under some masks.

    Attributes:
        name: of that Linear, whose output is the block's.
        masks: of the whole block.
        inputs: one tensor a sample, in their order.
    """

    name: str
    masks: Mapping[str, Tensor]
    inputs: list[Tensor] = field(default_factory=list)

    def same(self, masks: Mapping[str, Tensor]) -> bool:
        """Whether it is given the same under other masks: all but its own are the very same tensors."""
        return all(masks[name] is keep for name, keep in self.masks.items() if name != self.name)


def may_be_kept(linears: Mapping[str, nn.Linear], name: str, inputs: Activations) -> bool:
    """Whether a block may keep what its closing Linear is given: beside the work, in little memory.

    Not where samples wait elsewhere, nor where another Linear has the same weight, whose mask would change with it.
    """
    weight = linears[name].weight
    tied = sum(linear.weight is weight for linear in linears.values()) > 1
    tokens = sum(sample.numel() // sample.shape[-1] for sample in inputs.held)
    fits = tokens * weight.shape[1] * weight.element_size() <= ROOM
    return fits and not tied and inputs.batch_size is None and inputs.folder is None
