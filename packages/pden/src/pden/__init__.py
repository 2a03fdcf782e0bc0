"""Single domain generalization by progressive domain expansion.

``pden.load`` gives a trained model and its generators; ``pden.Trainer`` is the loop, whose outcome ``pden.save`` keeps;
generators, losses, models and data are usable alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "Domain",
    "Expanded",
    "Home",
    "TrainConfig",
    "Trainer",
    "__version__",
    "from_dataset",
    "load",
    "load_domain",
    "save",
]

if TYPE_CHECKING:
    from pden.data import Domain, Home, from_dataset, load_domain
    from pden.saving import Expanded, load, save
    from pden.training.config import TrainConfig
    from pden.training.trainer import Trainer

_HOMES = {
    "Domain": "data",
    "Expanded": "saving",
    "Home": "data",
    "TrainConfig": "training.config",
    "Trainer": "training.trainer",
    "from_dataset": "data",
    "load": "saving",
    "load_domain": "data",
    "save": "saving",
}


def __getattr__(name: str) -> Any:
    # torch takes seconds to import: only what is used pays for it.
    if name not in _HOMES:
        raise AttributeError(f"module 'pden' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"pden.{_HOMES[name]}"), name)
