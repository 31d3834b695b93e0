"""Mask producers: functions from one Linear's weight and input statistics to its first keep mask."""

from . import existing, magnitude, random, sparsegpt, wanda  # noqa: F401  registered on import
from .base import PRODUCERS, LinearInput, Produced, Producer, ProducerFunction, as_producer, producer

__all__ = ["PRODUCERS", "LinearInput", "Produced", "Producer", "ProducerFunction", "as_producer", "producer"]
