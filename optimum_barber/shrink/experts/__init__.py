"""Removal of whole experts: how they are scored, cut out, recorded and audited."""

from .audit import audit_experts, describe_removal
from .remove import ExpertRemoval, plan_removal, remove_experts
from .scores import EXPERT_SCORERS

__all__ = [
    "EXPERT_SCORERS", "ExpertRemoval", "audit_experts", "describe_removal", "plan_removal", "remove_experts",
]  # fmt: skip
