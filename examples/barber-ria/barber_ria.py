"""RIA, relative importance and activations (arXiv 2402.04902), as a mask producer for optimum-barber."""

from torch import Tensor

from optimum_barber import BarberError, LinearInput, producer
from optimum_barber.tensors.masks import keep_highest


@producer("ria", needs=["input_norm"])
def ria(linear: LinearInput, *, power: float = 0.5, scope: str = "layer") -> Tensor:
    """Keep the weights of highest (|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) * ||X_j||_2 ** power.

    Args:
        linear: weight (out, in), its pattern, and the norms of its input channels, (in,).
        power: a of the paper; 0 leaves the inputs out.
        scope: "layer" compares all weights of the Linear, "row" each output row on its own; N:M needs neither.

    Returns:
        The keep mask, (out, in) bool.
    """
    if scope not in ("layer", "row"):
        raise BarberError(f"argument scope={scope} of producer 'ria' is not legal: layer or row")
    weight = linear.weight.abs()
    tiny = 1e-12  # a dead row or column has importance 0, not 0 / 0
    by_column = weight / weight.sum(0, keepdim=True).clamp_min(tiny)
    by_row = weight / weight.sum(1, keepdim=True).clamp_min(tiny)
    return keep_highest((by_column + by_row) * linear.statistics.input_norm**power, linear.pattern, scope)
