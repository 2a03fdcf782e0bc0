"""The study's figures: answers image by image in a few bytes, the choice of lambda, and the table of all arms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from study_arms import Choice

from train_adv.evaluation.statistics import paired_difference

START = {"at": Choice("cosine", 100.0), "trades": Choice("cosine", 100.0)}  # until the sweep has been run
HOSTS = {"at": "tune-at", "trades": "tune-trades-beta-6"}  # what each sweep is measured against
TOLERANCE = 0.01  # robust accuracy that TRAIN may cost in the choice: two standard errors on 5,000 images, paired


def choose(results: Sequence[dict[str, Any]], host: str) -> Choice:
    """The lambda and kernel for a host, by a rule fixed beforehand and on held-out training images alone.

    Of the settings whose APGD accuracy is at most a point below the host's own, the one with the largest sum of natural
    and APGD accuracy; where there is none, the one with the largest sum of all. A setting that diverged has no figures.
    """
    table = {each["arm"]: each for each in results if each["arm"].startswith("tune-") and "last" in each["evaluation"]}
    base = table.get(HOSTS[host])
    own = [
        each for name, each in table.items()
        if name.startswith(f"tune-{host}-") and each["config"].get("topology.weight", 0) > 0
    ]  # fmt: skip
    if base is None or not own:
        return START[host]
    floor = figure(base, "apgd") - TOLERANCE
    allowed = [each for each in own if figure(each, "apgd") >= floor]
    best = max(allowed or own, key=lambda each: figure(each, "natural") + figure(each, "apgd"))
    return Choice(best["config"]["topology.kernel"], best["config"]["topology.weight"])


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
