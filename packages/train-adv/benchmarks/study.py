"""The study on CIFAR-10 (ResNet-18, Linf 8/255), cut into parts that each fit a lease of about 25 minutes.

    python packages/train-adv/benchmarks/study.py PART --work WORK --data-dir DATA --out OUT [--seeds 0,1]

Parts, with their length on paper (5.5 s an epoch of PGD-10, 6.2 s of TRADES, +18 % / +6 % for TRAIN; evaluation of one
checkpoint by natural, PGD-20 and APGD-CE + T on 10,000 images about 75 s, AutoAttack on 1,000 about 150 s):

    speed       seconds an epoch at batch 512 and 128, with and without TRAIN                         about  4 min
    standard    the standard models; other parts train theirs first where it is missing               about  2 min
    lambda      AT and TRADES + TRAIN, lambda in powers of 3, two kernels, 15 epochs, seed 0          about 55 min
                (16 arms: three leases; arms that have their JSON are skipped)
    beta        TRADES alone, beta 1, 2, 3, 6, 9: the host's own frontier, 15 epochs, seed 0          about 17 min
    main        {at, trades, mart} x {alone, + TRAIN} and the control, 30 epochs: for each seed       about 50 min
                (7 arms of 3 min training, 2 x 75 s evaluation and AutoAttack: two leases)
    epsilons    AT at training epsilons 0, 2, 4, 8 /255, 15 epochs, topology metrics of each epoch    about  7 min
    long        100 epochs at batch 128: --only one pair                                              about 2 x 17 min
    everything  AWP + TRAIN + EMA, 30 epochs, AT and TRADES                                           about 18 min
    report      a table of all results in OUT; needs no GPU

Each arm is trained by `train-adv train` (a killed one resumes), evaluated, and leaves OUT/<arm>-<seed>.json with its
configuration, figures of best and last, metrics of each epoch and answers image by image, so that pairs can be compared
later (`report`) without the weights. Arms that have their JSON are skipped. `--minutes` begins no arm after that time.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from expkit.checkpoint import write_json
from expkit.config import flatten, load_config
from expkit.device import resolve_device
from expkit.distributed import World
from expkit.metrics import read_metrics
from expkit.rundir import evidence
from train_adv.data.dataset import DataSet
from train_adv.evaluation.evaluate import Settings, evaluate, row
from train_adv.evaluation.statistics import paired_difference
from train_adv.training.config import TrainConfig
from train_adv.training.run import Given, Outcome, read_data, train

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
ALONE = World(0, 1, 0)
EPSILON = 8 / 255


@dataclass(frozen=True)
class Arm:
    """One training and its evaluation."""

    name: str
    settings: dict[str, Any]
    base: str = "cifar10-resnet18.toml"
    attacks: tuple[str, ...] = ("natural", "pgd20", "apgd")
    final: tuple[str, ...] = ()  # for the last checkpoint only
    reference: bool = True


def main() -> int:
    arguments = parse()
    if arguments.part == "report":
        print(report(arguments.out))
        return 0
    begun = time.monotonic()
    arms = [arm for arm in parts(arguments)[arguments.part] if not arguments.only or arm.name in arguments.only]
    for seed in arguments.seeds:
        ensure_standard(seed, arms, arguments)
        for arm in arms:
            if (arguments.out / f"{arm.name}-{seed}.json").is_file():
                continue
            if time.monotonic() - begun > 60 * arguments.minutes:
                print(f"time is up before {arm.name}-{seed}; start the same command again")
                return 0
            run_arm(arm, seed, arguments)
    print(report(arguments.out))
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ("speed", "standard", "lambda", "beta", "main", "epsilons", "long", "everything", "report")
    parser.add_argument("part", choices=known)
    parser.add_argument("--work", type=Path, default=Path("work"), help="runs; lost with the machine")
    parser.add_argument("--out", type=Path, default=Path("out"), help="JSON files, to be kept")
    parser.add_argument("--data-dir", type=Path, help="folder of cifar-10-batches-py")
    parser.add_argument("--seeds", type=lambda text: [int(each) for each in text.split(",")], default=[0])
    parser.add_argument("--only", type=lambda text: text.split(","), help="only these arms")
    parser.add_argument("--minutes", type=float, default=22.0, help="begin no arm after this time")
    parser.add_argument("--kernel", default="cosine", help="kernel of the parts main, long and everything")
    parser.add_argument("--at-weight", type=float, default=100.0, help="lambda for AT and MART")
    parser.add_argument("--trades-weight", type=float, default=100.0, help="lambda for TRADES")
    parser.add_argument("--limit", type=int, default=0, help="test images (0: all), to try the script out")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any key, for every arm")
    return parser.parse_args()


def parts(arguments: argparse.Namespace) -> dict[str, list[Arm]]:
    """The arms of every part."""
    kernel = {"topology.kernel": arguments.kernel}
    at = {**kernel, "topology.weight": arguments.at_weight}
    trades = {**kernel, "topology.weight": arguments.trades_weight}
    short = {"epochs": 15}
    scales = {"cosine": (10.0, 30.0, 100.0, 300.0), "softmax-cosine": (0.1, 0.3, 1.0, 3.0)}
    long = "cifar10-resnet18-100.toml"
    aa = ("autoattack",)
    return {
        "speed": [
            Arm(f"speed-{host}{'+train' if weight else ''}-{size}", speed(host, weight, size), attacks=())
            for size in (512, 128)
            for host, weight in (("at", 0.0), ("at", 100.0), ("trades", 0.0), ("trades", 100.0))
        ],
        "standard": [Arm("standard", {"host": "standard", "averaging.kind": "none"}, reference=False)],
        "lambda": [
            Arm(
                f"{host}-{name}-{weight:g}",
                {"host": host, "topology.weight": weight, "topology.kernel": name, **short},
            )
            for name, weights in scales.items()
            for weight in weights
            for host in ("at", "trades")
        ],
        "beta": [
            Arm(f"trades-beta-{beta:g}", {"host": "trades", "beta": beta, **short})
            for beta in (1.0, 2.0, 3.0, 6.0, 9.0)
        ],
        "main": [
            Arm("at", {"host": "at"}, final=aa),
            Arm("at-control", {"host": "at", "topology.control": True}),
            Arm("at+train", {"host": "at", **at}, final=aa),
            Arm("trades", {"host": "trades"}, final=aa),
            Arm("trades+train", {"host": "trades", **trades}, final=aa),
            Arm("mart", {"host": "mart"}, final=aa),
            Arm("mart+train", {"host": "mart", **at}, final=aa),
        ],
        "epsilons": [
            Arm(f"epsilon-{each}", {"host": "at" if each else "standard", "attack.epsilon": max(each, 1) / 255,
                                    "attack.step_size": max(each, 1) / 4 / 255, **short}, attacks=("natural", "pgd20"))
            for each in (0, 2, 4, 8)
        ],
        "long": [
            Arm("long-at", {"host": "at"}, long, final=aa),
            Arm("long-at+train", {"host": "at", **at}, long, final=aa),
            Arm("long-trades", {"host": "trades"}, long, final=aa),
            Arm("long-trades+train", {"host": "trades", **trades}, long, final=aa),
        ],
        "everything": [
            Arm("everything-at", {"host": "at", "awp.gamma": 0.01, **at}, final=aa),
            Arm("everything-trades", {"host": "trades", "awp.gamma": 0.005, **trades}, final=aa),
        ],
    }  # fmt: skip


def speed(host: str, weight: float, size: int) -> dict[str, Any]:
    """Two epochs without validation in between; the first one compiles, so the second one counts."""
    return {
        "host": host, "batch_size": size, "epochs": 2, "topology.weight": weight, "topology.reference_epochs": 1,
        "validation.every": 2, "validation.test": False, "averaging.kind": "ema", "optimizer.lr": 0.05,
    }  # fmt: skip


def ensure_standard(seed: int, arms: list[Arm], arguments: argparse.Namespace) -> None:
    """Weights are lost with a machine: train this seed's standard model again where arms need it."""
    if not any(arm.reference and arm.attacks for arm in arms):
        return
    if not (arguments.work / f"standard-{seed}" / "best.safetensors").is_file():
        train_arm(parts(arguments)["standard"][0], seed, arguments)


def train_arm(arm: Arm, seed: int, arguments: argparse.Namespace) -> tuple[TrainConfig, DataSet, Outcome]:
    """Train an arm, or go on with it."""
    name = f"{arm.name}-{seed}"
    flags: dict[str, Any] = {"name": name, "seed": seed, "data.dir": arguments.data_dir, **arm.settings}
    if arm.reference and arm.attacks:
        flags |= {"topology.metrics": True, "topology.path": arguments.work / f"standard-{seed}"}
    for text in arguments.set:
        key, _, value = text.partition("=")
        flags[key] = json.loads(value)
    config = load_config(TrainConfig, CONFIGS / arm.base, flags)
    data = read_data(config.data)
    resume = (arguments.work / name / "config.toml").is_file()
    print(f"--- {name}", flush=True)
    outcome = train(config, arguments.work, ALONE, resume=resume, given=Given(data=data))
    assert outcome is not None
    return config, data, outcome


def run_arm(arm: Arm, seed: int, arguments: argparse.Namespace) -> None:
    """Train, evaluate best and last, write the JSON."""
    record = evidence(seed)
    name = f"{arm.name}-{seed}"
    config, data, outcome = train_arm(arm, seed, arguments)
    lines = read_metrics(outcome.folder / "metrics.jsonl")
    seconds = [now["seconds"] - before["seconds"] for before, now in pairwise(lines)]
    found: dict[str, Any] = {
        "arm": arm.name,
        "config": flatten(json.loads(json.dumps(asdict(config.resolved()), default=str))),
        "training": outcome.result,
        "seconds_per_epoch_after_the_first": sum(seconds) / len(seconds) if seconds else None,
        "epochs": lines,
        "evaluation": {},
        "answers": {},
    }
    checkpoints = {"best": arm.attacks, "last": (*arm.attacks, *arm.final)} if arm.attacks else {}
    for which, attacks in checkpoints.items():
        answers = judge(outcome.folder / f"{which}.safetensors", data, attacks, seed, arguments.limit)
        found["evaluation"][which] = row(name, answers, data)["attacks"]
        found["answers"][which] = {attack: pack(right) for attack, right in answers.items()}
    write_json(arguments.out / f"{name}.json", {**found, **record})
    print(line(found), flush=True)


def judge(path: Path, data: DataSet, attacks: tuple[str, ...], seed: int, limit: int) -> dict[str, torch.Tensor]:
    """Attacks in TF32 on compiled models and CUDA graphs; AutoAttack is its authors' code, in fp32."""
    device = resolve_device("auto")
    fast = Settings(
        EPSILON, size=500, limit=limit, autoattack_limit=min(limit or 1000, 1000), precision="tf32",
        compiled=device.type == "cuda", seed=seed,
    )  # fmt: skip
    plain = replace(fast, precision="fp32", compiled=False)
    own = [name for name in attacks if name != "autoattack"]
    answers = evaluate(path, data, own, fast, device=device)
    if "autoattack" in attacks:
        answers |= evaluate(path, data, ["autoattack"], plain, device=device)
    return answers


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
    cells = [f"{found['arm']:24} seed {found['training']['seed']}"]
    pace = found["seconds_per_epoch_after_the_first"]
    cells.append(f"{pace:5.2f} s/epoch" if pace is not None else "")
    for which, table in found["evaluation"].items():
        shown = ", ".join(f"{name} {100 * each['accuracy']:.2f}" for name, each in table.items())
        cells.append(f"{which}: {shown}")
    return " | ".join(cells)


def report(out: Path) -> str:
    """All arms, and paired differences (last checkpoints, all common seeds) of every arm with TRAIN to its host."""
    found = [json.loads(path.read_text()) for path in sorted(out.glob("*-[0-9]*.json"))]
    found = [each for each in found if "arm" in each]
    lines = [line(each) for each in found]
    by_arm: dict[str, dict[int, dict[str, Any]]] = {}
    for each in found:
        by_arm.setdefault(each["arm"], {})[each["training"]["seed"]] = each["answers"].get("last", {})
    for arm, seeds in by_arm.items():
        host = arm.removesuffix("+train")
        for other in (host, f"{host}-control") if arm.endswith("+train") else ():
            common = sorted(seeds.keys() & by_arm.get(other, {}).keys())
            attacks = [n for n in ("natural", "pgd20", "apgd", "autoattack") if all(n in seeds[s] for s in common)]
            for attack in attacks if common else ():
                if not all(attack in by_arm[other][seed] for seed in common):
                    continue
                pairs = [(unpack(seeds[s][attack]), unpack(by_arm[other][s][attack])) for s in common]
                result = paired_difference(pairs)
                low, high = result["interval"]
                lines.append(
                    f"{arm} - {other}, {attack}, seeds {common}: {100 * result['difference']:+.2f} "
                    f"[{100 * low:+.2f}, {100 * high:+.2f}]"
                )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
