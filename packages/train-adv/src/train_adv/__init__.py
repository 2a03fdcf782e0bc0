"""Adversarial training that keeps natural accuracy: TRAIN as a plug-in, its hosts, attacks and evaluation.

``TopologyRegularizer`` goes into a loop of your own; ``fit`` is the complete trainer; ``load`` reads what it leaves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["TopologyLoss", "TopologyRegularizer", "__version__", "fit", "load"]

if TYPE_CHECKING:
    from train_adv.api import fit, load
    from train_adv.topology.loss import TopologyLoss
    from train_adv.topology.regularizer import TopologyRegularizer

_HOMES = {
    "TopologyLoss": "topology.loss",
    "TopologyRegularizer": "topology.regularizer",
    "fit": "api",
    "load": "api",
}


def __getattr__(name: str) -> Any:
    # torch takes seconds to import: only what is used pays for it.
    if name not in _HOMES:
        raise AttributeError(f"module 'train_adv' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"train_adv.{_HOMES[name]}"), name)
