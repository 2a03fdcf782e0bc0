"""Baselines in the same harness: each says what a step's loss is, and may add images to the pool."""

from __future__ import annotations

from expkit.errors import UsageError
from pden.baselines.ada import Ada
from pden.baselines.augmix import AugMix
from pden.baselines.erm import Erm
from pden.baselines.me_ada import MeAda
from pden.baselines.randaugment import RandAugment
from pden.baselines.randconv import RandConv

BASELINES: dict[str, type[Erm]] = {
    "erm": Erm,
    "randaugment": RandAugment,
    "augmix": AugMix,
    "randconv": RandConv,
    "ada": Ada,
    "me-ada": MeAda,
}


def build_baseline(name: str) -> Erm:
    """A baseline with its default settings.

    Raises:
        UsageError: an unknown name.
    """
    if name not in BASELINES:
        raise UsageError(f'unknown method "{name}"; use pden, {", ".join(BASELINES)}')
    return BASELINES[name]()


__all__ = ["BASELINES", "Ada", "AugMix", "Erm", "MeAda", "RandAugment", "RandConv", "build_baseline"]
