"""The study's figures: answers image by image in a few bytes, the choice of lambda, and the table of all arms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from study_arms import BETA, RATES, Choice

from train_adv.evaluation.statistics import paired_difference

HOSTS = ("at", "trades")
START = Choice(0.1, "cosine", 30.0)  # until the sweeps have been run
TOLERANCE = 0.003  # robust accuracy that TRAIN may cost in the choice, as in the study's aim


def choose(results: Sequence[dict[str, Any]], host: str) -> Choice:
    """A host's learning rate and beta, TRAIN's kernel and lambda, by fixed rules and held-out training images alone.

    The rate is that of the host alone, at its customary beta, with the largest sum of natural and APGD accuracy. Then
    beta, then kernel and lambda at that beta, by one rule for host and TRAIN: of the settings whose APGD accuracy is at
    most 0.3 points below that before, the one with the largest sum; where there is none, the one with the largest sum
    of all. A setting that diverged has no figures, and rates beyond those of the part `rate` are only looked at.
    """
    swept = [
        each
        for each in results
        if each["arm"].startswith(f"tune-{host}-")
        and "last" in each["evaluation"]
        and each["config"]["optimizer.lr"] in RATES
    ]
    alone = [each for each in swept if not each["config"]["topology.weight"]]
    customary = [each for each in alone if _beta(each) == BETA]
    if not customary:
        return START
    base = max(customary, key=_total)
    rate = base["config"]["optimizer.lr"]
    own = _best([each for each in alone if each["config"]["optimizer.lr"] == rate], base)
    beta = _beta(own) if host == "trades" else None
    trained = [
        each
        for each in swept
        if each not in alone and each["config"]["optimizer.lr"] == rate and _beta(each) == _beta(own)
    ]
    if not trained:
        return replace(START, rate=rate, beta=beta)
    best = _best(trained, own)["config"]
    return Choice(rate, best["topology.kernel"], best["topology.weight"], beta)


def _best(found: Sequence[dict[str, Any]], before: dict[str, Any]) -> dict[str, Any]:
    floor = figure(before, "apgd") - TOLERANCE
    return max([each for each in found if figure(each, "apgd") >= floor] or found, key=_total)


def _beta(found: dict[str, Any]) -> float:
    """Of TRADES; the customary one is not always written out. Hosts without a beta all have the same."""
    beta = found["config"].get("beta")
    return BETA if beta is None else float(beta)


def _total(found: dict[str, Any]) -> float:
    return figure(found, "natural") + figure(found, "apgd")


def figure(found: dict[str, Any], attack: str) -> float:
    """An arm's accuracy, of its last checkpoint."""
    return float(found["evaluation"]["last"][attack]["accuracy"])


def pack(right: torch.Tensor) -> str:
    """Booleans as hexadecimal digits, four images each, the first one in the highest bit."""
    bits = "".join("1" if each else "0" for each in right.tolist())
    padded = bits.ljust(-(-len(bits) // 4) * 4, "0")
    return f"{len(bits)}:" + f"{int(padded or '0', 2):0{len(padded) // 4}x}"


def unpack(text: str) -> torch.Tensor:
    """The inverse of `pack`."""
    count, _, digits = text.partition(":")
    bits = f"{int(digits or '0', 16):0{4 * len(digits)}b}"
    return torch.tensor([each == "1" for each in bits[: int(count)]], dtype=torch.bool)


def line(found: dict[str, Any]) -> str:
    """One arm in one line."""
    cells = [f"{found['arm']:28} seed {found['training']['seed']}"]
    pace = found["seconds_per_epoch_after_the_first"]
    cells.append(f"{pace:5.2f} s/epoch" if pace is not None else "")
    for which, table in found["evaluation"].items():
        shown = ", ".join(f"{name} {100 * each['accuracy']:.2f}" for name, each in table.items())
        cells.append(f"{which}: {shown}")
    if "failed" in found:
        cells.append(found["failed"])
    if found["evaluation"]:
        cells.append(f"on {found['judged_on']}")
    return " | ".join(cells)


def report(results: Sequence[dict[str, Any]]) -> str:
    """All arms; paired differences (last checkpoints, all common seeds) of every arm with TRAIN to its host."""
    lines = [line(each) for each in results]
    by_arm: dict[str, dict[int, dict[str, Any]]] = {}
    for each in results:
        by_arm.setdefault(each["arm"], {})[each["training"]["seed"]] = each["answers"].get("last", {})
    for arm, seeds in by_arm.items():
        host = arm.removesuffix("+train")
        for other in (host, f"{host}-control") if arm.endswith("+train") else ():
            lines += _differences(arm, seeds, other, by_arm.get(other, {}))
    for host in HOSTS:
        lines.append(f"chosen on held-out training images for {host}: {choose(results, host)}")
    return "\n".join(lines)


def _differences(arm: str, own: dict[int, Any], other: str, theirs: dict[int, Any]) -> list[str]:
    lines = []
    for attack in ("natural", "pgd20", "apgd", "autoattack"):
        common = [seed for seed in sorted(own.keys() & theirs.keys()) if attack in own[seed] and attack in theirs[seed]]
        if not common:
            continue
        result = paired_difference([(unpack(own[seed][attack]), unpack(theirs[seed][attack])) for seed in common])
        low, high = result["interval"]
        lines.append(
            f"{arm} - {other}, {attack}, seeds {common}: {100 * result['difference']:+.2f} "
            f"[{100 * low:+.2f}, {100 * high:+.2f}]"
        )
    return lines
