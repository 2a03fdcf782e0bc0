"""Target models: hub ids, folders, GGUF files and the aliases that come from the package index."""

from __future__ import annotations

from coral_spec.targets.load import load_target
from coral_spec.targets.target import Target, make_target

__all__ = ["Target", "load_target", "make_target"]
