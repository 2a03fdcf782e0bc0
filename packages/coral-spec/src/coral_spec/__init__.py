"""Lossless speculative decoding for any Hugging Face causal language model.

``coral_spec.load`` returns a model whose ``generate`` gives the text of plain decoding, sooner.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Conversation", "Generation", "Model", "Statistics", "TreeShape", "__version__", "load"]

if TYPE_CHECKING:
    from coral_spec.answer import Generation
    from coral_spec.conversation import Conversation
    from coral_spec.model import Model, load
    from coral_spec.statistics import Statistics
    from coral_spec.tree import TreeShape

_HOMES = {
    "Conversation": "conversation",
    "Generation": "answer",
    "Model": "model",
    "Statistics": "statistics",
    "TreeShape": "tree",
    "load": "model",
}


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import: only what is used pays for them.
    if name not in _HOMES:
        raise AttributeError(f"module 'coral_spec' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"coral_spec.{_HOMES[name]}"), name)
