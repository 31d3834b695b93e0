"""The model card of a checkpoint, `README.md`: what a reader of the Hub sees first."""

from .evaluation import record_evaluation
from .write import Made, write_card

__all__ = ["Made", "record_evaluation", "write_card"]
