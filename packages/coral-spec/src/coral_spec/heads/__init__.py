"""Proposal heads: which rows of the target's head a drafter reads while drafting.

Verification always uses the target's full logits, so a head that reads less can only cost acceptance, never
correctness. One file each: all rows (`full`), the most frequent ones (`frequency`, after FR-Spec), a product of two
thin matrices (`low_rank`, after SlimSpec), and the groups that a router chooses (`routed`, after CORAL).
"""

from coral_spec.heads.frequency import FrequencyHead
from coral_spec.heads.full import FullHead
from coral_spec.heads.interface import ProposalHead
from coral_spec.heads.low_rank import LowRankHead
from coral_spec.heads.routed import RoutedHead

__all__ = ["FrequencyHead", "FullHead", "LowRankHead", "ProposalHead", "RoutedHead"]
