"""The model card of a checkpoint, `README.md`: what a reader of the Hub sees first."""

from .evaluation import record_evaluation
from .write import Step, write_card

__all__ = ["Step", "record_evaluation", "write_card"]
