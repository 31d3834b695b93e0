"""Mask producers: functions from one Linear's weight and input statistics to its first keep mask."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from torch import Tensor

from ...base.errors import BarberError
from ...base.registry import Registry
from ...tensors.input_statistics import STATISTICS, InputStatistics
from ...tensors.patterns import SparsityPattern


@dataclass
class LinearInput:
    """What a producer receives for one Linear.

    Attributes:
        name: full name of the Linear, such as "model.layers.0.mlp.up_proj".
        weight: dense W, (out, in), float32; not to be changed.
        statistics: of the Linear's input on the sparse stream: those that the producer asked for.
        transposed: whether the model's files hold the weight as (in, out).
    """

    name: str
    weight: Tensor
    pattern: SparsityPattern
    statistics: InputStatistics = field(default_factory=InputStatistics)
    seed: int = 0
    transposed: bool = False


@dataclass
class Produced:
    """A keep mask, (out, in) bool, with new values of the kept weights, (out, in); None where they stay dense."""

    keep: Tensor
    weight: Tensor | None = None


ProducerFunction = Callable[..., Tensor | Produced]


@dataclass(frozen=True)
class Producer:
    """A registered producer.

    Attributes:
        function: takes a `LinearInput` and keyword-only arguments; returns a keep mask or `Produced`.
        needs: names of the input statistics to collect, out of `STATISTICS`.
        brings_pattern: for masks from outside, says what pattern they have; takes the shapes of the Linears by
            name (a `Shapes`) and the producer's arguments.
    """

    function: ProducerFunction
    needs: frozenset[str] = frozenset()
    brings_pattern: Callable[..., SparsityPattern] | None = None


PRODUCERS: Registry[Producer] = Registry("producer", "optimum_barber.producers")


def producer(
    name: str, needs: Iterable[str] = (), brings_pattern: Callable[..., SparsityPattern] | None = None
) -> Callable[[ProducerFunction], ProducerFunction]:
    """Register the decorated function as the producer `name`; it stays callable as it is."""
    unknown = set(needs) - set(STATISTICS)
    if unknown:
        raise BarberError(f"producer {name!r} needs unknown statistics {sorted(unknown)}: known are {STATISTICS}")

    def decorate(function: ProducerFunction) -> ProducerFunction:
        PRODUCERS.add(name, Producer(function, frozenset(needs), brings_pattern), origin=function.__module__)
        return function

    return decorate


def as_producer(candidate: "str | ProducerFunction | Producer") -> Producer:
    """The producer meant by a registered name, a plain callable, which may have an attribute `needs`, or itself."""
    if isinstance(candidate, Producer):
        return candidate
    if callable(candidate):
        return Producer(candidate, frozenset(getattr(candidate, "needs", ())))
    return as_producer(PRODUCERS[candidate])  # a plug-in may offer a plain function
