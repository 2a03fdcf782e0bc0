"""Hosts by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

from expkit.errors import UsageError
from train_adv.attacks.pgd import PGD
from train_adv.hosts.fast import FGSMRS, NFGSM
from train_adv.hosts.host import Host
from train_adv.hosts.lbgat import LBGAT
from train_adv.hosts.mart import Mart
from train_adv.hosts.pgd_at import PGDAT
from train_adv.hosts.standard import Standard
from train_adv.hosts.trades import Trades
from train_adv.models.classifier import Classifier

HostName = Literal["standard", "at", "trades", "mart", "lbgat", "fgsm-rs", "n-fgsm"]
BETAS: dict[str, float] = {"trades": 6.0, "mart": 5.0, "lbgat": 0.0}  # as published
_PLAIN: dict[str, type[Host]] = {
    "standard": Standard,
    "at": PGDAT,
    "trades": Trades,
    "mart": Mart,
    "fgsm-rs": FGSMRS,
    "n-fgsm": NFGSM,
}


def make_host(name: str, attack: PGD, beta: float | None, teacher: Callable[[], Classifier]) -> Host:
    """The host called `name`.

    Args:
        attack: radius, step size, steps and norm; hosts set what is theirs (start, number of steps).
        beta: None is the published one.
        teacher: builds the second network of LBGAT.

    Raises:
        UsageError: an unknown name, a negative beta, or a single-step host with another norm than Linf.
    """
    if name not in get_args(HostName):
        raise UsageError(f"unknown host {name!r}; use one of {', '.join(get_args(HostName))}")
    beta = BETAS.get(name, 0.0) if beta is None else beta
    if beta < 0:
        raise UsageError(f"beta is {beta}; it must be 0 or more")
    if name in ("fgsm-rs", "n-fgsm") and attack.norm.name != "Linf":
        raise UsageError(f"host {name} is defined for Linf, not {attack.norm.name}")
    return LBGAT(attack, teacher(), beta) if name == "lbgat" else _PLAIN[name](attack, beta)
