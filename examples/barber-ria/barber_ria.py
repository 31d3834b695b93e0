"""A mask producer for optimum-barber: RIA, relative importance and activations (arXiv 2402.04902)."""

from torch import Tensor

from optimum_barber import BarberError, LinearInput, producer
from optimum_barber.tensors.masks import keep_highest


@producer("ria", needs=["input_norm"])
def ria(linear: LinearInput, *, power: float = 0.5, scope: str = "layer") -> Tensor:
    """Keep the weights of highest (|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) * ||X_j||_2 ** power.

    Args:
        linear: weight, (out, in), pattern, and norms of the input channels, (in,).
        power: the paper's exponent a; 0 ignores the inputs.
        scope: "layer" compares all weights of the Linear, "row" those of each output row. N:M ignores it.

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
