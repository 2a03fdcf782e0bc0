"""The study's figures: answers image by image in a few bytes, the choice of lambda, and the table of all arms."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from study_arms import BETA, Choice

from expkit.checkpoint import write_json
from train_adv.evaluation.statistics import paired_difference
from train_adv.topology.plots import TITLES, pyplot, save

HOSTS = ("at", "trades")
START = Choice(0.1, "cosine", 30.0)  # until the sweeps have been run
LONG = ("long-", "multistep-")  # names of arms of 100 epochs begin so
TOLERANCE = 0.003  # robust accuracy that TRAIN may cost in the choice, as in the study's aim


def choose(
    results: Sequence[dict[str, Any]], host: str, beta: float | None = None, tolerance: float = TOLERANCE
) -> Choice:
    """A host's learning rate and beta, TRAIN's kernel and lambda, by fixed rules and held-out training images alone.

    The rate is that of the host alone, at its customary beta, with the largest sum of natural and APGD accuracy. Then
    beta, then kernel and lambda at that beta, by one rule for host and TRAIN: of the settings whose APGD accuracy is at
    most 0.3 points below that before, the one with the largest sum; where there is none, the one with the largest sum
    of all. A setting that diverged has no figures.

    Args:
        beta: of TRADES, instead of the one that is chosen.
        tolerance: APGD accuracy that TRAIN may cost, instead of those 0.3 points.
    """
    swept = [each for each in results if each["arm"].startswith(f"tune-{host}-") and "last" in each["evaluation"]]
    alone = [each for each in swept if not each["config"]["topology.weight"]]
    customary = [each for each in alone if _beta(each) == BETA]
    if not customary:
        return START
    base = max(customary, key=_total)
    rate = base["config"]["optimizer.lr"]
    at_rate = [each for each in alone if each["config"]["optimizer.lr"] == rate and beta in (None, _beta(each))]
    own = _best(at_rate or [base], base)
    beta = _beta(own) if host == "trades" else None
    trained = [
        each
        for each in swept
        if each not in alone and each["config"]["optimizer.lr"] == rate and _beta(each) == _beta(own)
    ]
    if not trained:
        return replace(START, rate=rate, beta=beta)
    best = _best(trained, own, tolerance)["config"]
    return Choice(rate, best["topology.kernel"], best["topology.weight"], beta, best.get("topology.inputs", "natural"))


def _best(found: Sequence[dict[str, Any]], before: dict[str, Any], tolerance: float = TOLERANCE) -> dict[str, Any]:
    floor = figure(before, "apgd") - tolerance
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


def publishable(results: Sequence[dict[str, Any]], before: dict[str, Any] | None = None) -> dict[str, Any]:
    """All arms for one file: without a machine's paths, accuracies by class, and the sweeps' answers image by image.

    Args:
        before: what was published before. Where an arm's answers are not at hand any more, its differences stay: a new
            one replaces one of the same seeds or of fewer.
    """
    text = json.dumps(results)
    for option, word in (("data-dir", "DATA"), ("out", "OUT"), ("work", "WORK")):
        paths = {Path(each.split("/gpu")[0]) for each in re.findall(rf"--{option} (/[^ \"]+)", text)}
        for path in sorted(map(str, paths), key=len, reverse=True):
            text = text.replace(path, word)
    arms = json.loads(text)
    for arm in arms:
        if arm.get("tuning_split"):
            arm["answers"] = {}  # they serve no difference
        for attacks in arm["evaluation"].values():
            for each in attacks.values():
                each.pop("per_class", None)
    note = (
        "answers image by image (hexadecimal digits, four images each) are those that were kept of arms judged on test "
        "images; accuracies by class are left out; a machine's paths are DATA, WORK and OUT; the machines had no "
        "repository, and git says what was sent to them; an arm's name holds its rate also where the command and "
        "config.name do not have it yet"
    )
    found = {_pair(each): each for each in (before or {}).get("differences", ())}
    for each in differences(results):
        known = found.get(_pair(each))
        if known is None or known["by_seed"].keys() <= each["by_seed"].keys():
            found[_pair(each)] = each
    return {"note": note, "arms": arms, "differences": [found[pair] for pair in sorted(found)]}


def restore(published: dict[str, Any], out: Path) -> list[Path]:
    """The files of OUT that are not there, from what was published, so that a study goes on elsewhere."""
    written = []
    for arm in published["arms"]:
        path = out / f"{arm['arm']}-{arm['training']['seed']}.json"
        if not path.exists():
            write_json(path, arm)
            written.append(path)
    return written


def _pair(difference: dict[str, Any]) -> tuple[str, ...]:
    return tuple(difference.get(key, "last") for key in ("arm", "other", "checkpoint", "attack"))


def plot_frontier(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Natural against APGD accuracy of the sweeps' arms at the chosen rates, a panel a host, with TRADES in both."""
    series: dict[tuple[str, float, str, str], list[tuple[float, float, float]]] = {}
    for each in results:
        host = each["arm"].removeprefix("tune-").split("-")[0]
        if not each["arm"].startswith("tune-") or host not in HOSTS or "last" not in each["evaluation"]:
            continue
        config = each["config"]
        if config["optimizer.lr"] != choose(results, host).rate:
            continue
        weight = config["topology.weight"]
        inputs = config.get("topology.inputs", "natural")
        key = (host, _beta(each), config["topology.kernel"], inputs) if weight else (host, 0.0, "", "")
        setting = weight or (_beta(each) if host == "trades" else 0.0)
        series.setdefault(key, []).append((setting, figure(each, "natural"), figure(each, "apgd")))
    betas = sorted({beta for host, beta, kernel, _ in series if host == "trades" and kernel})
    drawing, panels = pyplot().subplots(1, 2, figsize=(12, 7.5), sharex=True, sharey=True)
    for host, axes in zip(HOSTS, panels, strict=True):
        for (own, beta, kernel, inputs), points in sorted(series.items()):
            if own != host and (own, kernel) != ("trades", ""):
                continue
            name, line = own.upper(), "-"
            color, marker = ("0.4", "D") if own == "trades" else ("C3", "*")
            if kernel:
                name = f"{name} ({beta:g})" if own == "trades" else name
                name = f"{name} + TRAIN, {kernel}, {inputs} inputs"
                color = {"natural": "C0", "adversarial": "C1", "both": "C2"}[inputs]
                marker = "os^v"[betas.index(beta) % 4] if own == "trades" else "o"
                line = ":" if "softmax" in kernel else "-"
            settings, natural, robust = zip(*sorted(points), strict=True)
            xs, ys = [100 * x for x in natural], [100 * y for y in robust]
            axes.plot(xs, ys, color=color, marker=marker, linestyle=line, label=name)
            for setting, x, y in zip(settings, xs, ys, strict=True):
                text = f"{setting:g}" if setting else ""
                axes.annotate(text, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8, color=color)
        axes.set_title({"at": "AT + TRAIN, by lambda", "trades": "TRADES (beta) + TRAIN, by lambda"}[host], fontsize=10)
        axes.set_xlabel("natural accuracy (%)")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.1), frameon=False)
    panels[0].set_ylabel("APGD-CE + T accuracy (%)")
    drawing.tight_layout()
    save(drawing, path)


def plot_topology(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Topology metrics against natural accuracy, both on held-out training images, over the epochs of each radius."""
    metrics = ("knn_10", "trustworthiness", "continuity", "cka", "spearman", "l_topo")
    drawing, axes = pyplot().subplots(2, 3, figsize=(11, 6.5), sharey=True)
    for each in results:
        epochs = [epoch for epoch in each.get("epochs", ()) if "topology_cka" in epoch]
        if not each["arm"].startswith("epsilon-"):
            continue
        natural = [100 * epoch["val_natural"] for epoch in epochs]
        for axis, metric in zip(axes.flat, metrics, strict=True):
            values = [epoch[f"topology_{metric}"] for epoch in epochs]
            (drawn,) = axis.plot(values, natural, "-", alpha=0.6)
            label = f"training epsilon {each['arm'].removeprefix('epsilon-')}/255, last epoch"
            axis.plot(values[-1:], natural[-1:], "o", color=drawn.get_color(), label=label)
    for axis, metric in zip(axes.flat, metrics, strict=True):
        axis.set_xlabel(TITLES[metric])
        axis.grid(alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_ylabel("natural accuracy (%)")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    drawing.legend(handles, labels, loc="lower center", ncols=4, frameon=False, fontsize=9)
    drawing.tight_layout(rect=(0, 0.05, 1, 1))
    save(drawing, path)


def plot_long(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Accuracy on the validation images over the epochs of the arms of 100 epochs; a point at the best checkpoint.

    An arm and the same one with TRAIN share a colour.
    """
    arms = [each for each in results if each["arm"].startswith((*LONG, "everything-")) and each.get("epochs")]
    hosts = sorted({_spelled(each["config"])[0] for each in arms})
    drawing, panels = pyplot().subplots(1, 2, figsize=(12, 4.5))
    for axes, key, title in zip(panels, ("val_natural", "val_pgd"), ("natural", "PGD-10"), strict=True):
        for each in arms:
            seen = [epoch for epoch in each["epochs"] if key in epoch]
            best = each["training"]["best"]["epoch"]
            xs, ys = [epoch["epoch"] for epoch in seen], [100 * epoch[key] for epoch in seen]
            host, train = _spelled(each["config"])
            color = f"C{hosts.index(host)}"
            axes.plot(xs, ys, "--" if train else "-", color=color, label=host + train)
            axes.plot([best], [ys[xs.index(best)]], "o", color=color)
        axes.set_xlabel("epoch")
        axes.set_ylabel(f"{title} accuracy, validation images (%)")
        axes.set_ylim(bottom=30)
        axes.grid(alpha=0.3)
    panels[1].legend(fontsize=8, loc="lower right")
    drawing.tight_layout()
    save(drawing, path)


def _spelled(config: dict[str, Any]) -> tuple[str, str]:
    """An arm of 100 epochs as RESULTS.md has it: ("AT in steps, erasing", " + TRAIN (both)"); without TRAIN, ""."""
    host = config["host"].upper() + (" in steps" if config["optimizer.schedule"] == "multistep" else "")
    host += f", AWP {config['awp.gamma']:g}" if config["awp.gamma"] else ""
    host += ", erasing" if config.get("data.erase") else ""  # arms from before there was erasing have no such key
    return host, f" + TRAIN ({config['topology.inputs']})" if config["topology.weight"] else ""


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
    """All arms, `differences`, and what is chosen."""
    lines = [line(each) for each in results]
    for each in differences(results):
        by_seed = ", ".join(f"seed {seed} {100 * value:+.2f}" for seed, value in each["by_seed"].items())
        low, high = each["interval"]
        lines.append(
            f"{each['arm']} - {each['other']}, {each['checkpoint']}, {each['attack']}: {100 * each['difference']:+.2f} "
            f"[{100 * low:+.2f}, {100 * high:+.2f}] ({by_seed})"
        )
    for host in HOSTS:
        lines.append(f"chosen on held-out training images for {host}: {choose(results, host)}")
    return "\n".join(lines)


def differences(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of every arm with TRAIN to its host, its control, and TRADES where it meets that one's frontier: paired, all
    common seeds; last checkpoints, and the best ones of arms of 100 epochs, whose ends may have overfitted."""
    found = []
    by_arm: dict[str, dict[int, dict[str, Any]]] = {}
    for each in results:
        answers = each.get("answers", {})
        if each.get("complete"):  # its best checkpoint is the last one where it was not judged by itself
            answers = {"best": answers.get("last", {}), **answers}
        by_arm.setdefault(each["arm"], {})[each["training"]["seed"]] = answers
    for arm, seeds in by_arm.items():
        host, train, _ = arm.partition("+train")
        others = [host, f"{host}-control"]
        others += ["trades"] if host in ("at", f"trades-{BETA:g}") else []  # whose frontier these meet
        for other in others if train else ():
            for which in ("last", "best") if arm.startswith(LONG) else ("last",):
                own, theirs = (
                    {seed: answers.get(which, {}) for seed, answers in each.items()}
                    for each in (seeds, by_arm.get(other, {}))
                )
                found += [
                    {"arm": arm, "other": other, "checkpoint": which, **each} for each in _differences(own, theirs)
                ]
    return found


def _differences(own: dict[int, Any], theirs: dict[int, Any]) -> list[dict[str, Any]]:
    found = []
    for attack in ("natural", "pgd20", "apgd", "autoattack"):
        common = [seed for seed in sorted(own.keys() & theirs.keys()) if attack in own[seed] and attack in theirs[seed]]
        if not common:
            continue
        result = paired_difference([(unpack(own[seed][attack]), unpack(theirs[seed][attack])) for seed in common])
        by_seed = dict(zip(map(str, common), result.pop("pairs"), strict=True))
        found.append({"attack": attack, **result, "by_seed": by_seed})
    return found
