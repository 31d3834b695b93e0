"""The model card of a checkpoint or an adapter, `README.md`: what a reader of the Hub sees first."""

from .adapter import write_adapter_card
from .evaluation import record_evaluation
from .write import Step, write_card

__all__ = ["Step", "record_evaluation", "write_adapter_card", "write_card"]
