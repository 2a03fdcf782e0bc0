"""The study's figures: answers image by image in a few bytes, the choice of lambda, and the table of all arms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from study_arms import Choice

from train_adv.evaluation.statistics import paired_difference

HOSTS = ("at", "trades")
START = Choice(0.1, "cosine", 30.0)  # until the sweeps have been run
TOLERANCE = 0.003  # robust accuracy that TRAIN may cost in the choice, as in the study's aim


def choose(results: Sequence[dict[str, Any]], host: str) -> Choice:
    """Learning rate, kernel and lambda for a host, by rules fixed beforehand and on held-out training images alone.

    The rate is that of the host alone with the largest sum of natural and APGD accuracy. Of TRAIN's settings whose APGD
    accuracy is at most 0.3 points below the host's own at that rate, the one with the largest sum; where there is none,
    the one with the largest sum of all. A setting that diverged has no figures.
    """
    swept = [
        each
        for each in results
        if each["arm"].startswith(f"tune-{host}-") and "last" in each["evaluation"] and "beta" not in each["arm"]
    ]
    alone = [each for each in swept if not each["config"].get("topology.weight", 0)]
    own = [each for each in swept if each not in alone]
    if not alone:
        return START
    base = max(alone, key=_total)
    rate = base["config"]["optimizer.lr"]
    if not own:
        return replace(START, rate=rate)
    floor = figure(base, "apgd") - TOLERANCE
    best = max([each for each in own if figure(each, "apgd") >= floor] or own, key=_total)
    return Choice(rate, best["config"]["topology.kernel"], best["config"]["topology.weight"])


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
