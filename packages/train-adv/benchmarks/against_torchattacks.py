"""One adversarial epoch of ours against plain loops, in one run on one machine: around `torchattacks.PGD` in fp32, and
as good as a plain loop gets (bf16, channels-last, torch.compile, no weight gradients in the attack).

    uv venv bench && uv pip install -p bench torchattacks ./shared ./packages/train-adv
    bench/bin/python packages/train-adv/benchmarks/against_torchattacks.py --data-dir DATA --epochs 3 --json out.json

torchattacks pins an old `requests`, so it wants an environment of its own. All loops train the same ResNet-18 from the
same weights on the same batches with SGD at the same rate; seconds are those of the last epoch, so that compiling does
not count, and all models are then attacked by the same PGD-20.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from expkit.checkpoint import write_json
from expkit.device import resolve_device, synchronize
from expkit.distributed import World
from expkit.rundir import evidence
from train_adv.attacks.pgd import PGD
from train_adv.data.batches import Batches
from train_adv.data.load import load_data
from train_adv.hosts.make import make_host
from train_adv.models.build import build
from train_adv.models.classifier import Classifier, ModelSpec
from train_adv.training.climber import resolve_engine
from train_adv.training.config import OptimizerConfig, TrainConfig
from train_adv.training.measure import right_answers, right_under_pgd
from train_adv.training.trainer import Trainer

ALONE = World(0, 1, 0)
ATTACK = PGD(8 / 255, 2 / 255, 10)


def main() -> None:
    arguments = parse()
    record = evidence(0)
    device = resolve_device("auto")
    data = load_data(arguments.data, arguments.data_dir)
    spec = ModelSpec(arguments.model, data.class_names, data.image_shape, (0.5,) * data.image_shape[0],
                     (0.25,) * data.image_shape[0])  # fmt: skip
    train: Any = data.train
    if arguments.images:
        train = train.select(torch.arange(arguments.images))
    test: Any = data.test.select(torch.arange(min(arguments.test_images, len(data.test))))
    rows = []
    for name in arguments.loops:
        batches = Batches(
            train, batch_size=arguments.batch_size, seed=0, augment=data.augment, device=device, world=ALONE
        )
        torch.manual_seed(0)
        model = build(spec).to(device)
        model, seconds = LOOPS[name](model, batches, arguments, device)
        model.eval()
        natural = float(right_answers(model, test, size=500, device=device).float().mean())
        robust = float(right_under_pgd(model, test, replace(ATTACK, steps=20), size=500, device=device).float().mean())
        rows.append({"loop": name, "seconds": seconds, "natural": natural, "pgd20": robust})
        print(f"{name:14} {seconds:8.2f} s an epoch, natural {natural:.2%}, PGD-20 {robust:.2%}", flush=True)
    ratios = {row["loop"]: row["seconds"] / rows[-1]["seconds"] for row in rows[:-1]}
    for name, ratio in ratios.items():
        print(f"{rows[-1]['loop']} is {ratio:.2f} times as fast as {name}")
    if arguments.json:
        settings = {key: str(value) for key, value in vars(arguments).items()}
        write_json(arguments.json, {"rows": rows, "ratios": ratios, "settings": settings, **record})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--images", type=int, default=0, help="training images; 0 is all")
    parser.add_argument("--test-images", type=int, default=2000)
    parser.add_argument("--loops", type=lambda text: text.split(","), default=list(LOOPS), help="the last is compared")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    for name in arguments.loops:
        if name not in LOOPS:
            parser.error(f"unknown loop {name!r}; use some of {', '.join(LOOPS)}")
    return arguments


def plain(model: Classifier, batches: Batches, arguments: argparse.Namespace, device: torch.device) -> Any:
    """What most repositories do: eager, fp32, the attack through the model in training."""
    import torchattacks

    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    attack = torchattacks.PGD(model, eps=ATTACK.epsilon, alpha=ATTACK.step_size, steps=ATTACK.steps)
    optimizer = torch.optim.SGD(model.parameters(), lr=arguments.lr, momentum=0.9, weight_decay=5e-4)

    def step(images: Tensor, labels: Tensor) -> None:
        images = images.contiguous()  # torch's own layout is the faster one in fp32
        adversarial = attack(images, labels)
        model.train()
        optimizer.zero_grad()
        F.cross_entropy(model(adversarial), labels).backward()
        optimizer.step()

    return model, _timed(_each(batches, step), arguments.epochs, device)


def compiled(model: Classifier, batches: Batches, arguments: argparse.Namespace, device: torch.device) -> Any:
    """The best of a plain loop: bf16, channels-last, torch.compile, and no weight gradients in the attack."""
    model.to(memory_format=torch.channels_last)
    fast = torch.compile(model, dynamic=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=arguments.lr, momentum=0.9, weight_decay=5e-4)

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return F.cross_entropy(fast(images), labels)

    def step(images: Tensor, labels: Tensor) -> None:
        images = images.contiguous(memory_format=torch.channels_last)
        model.eval().requires_grad_(False)
        points = (images + torch.empty_like(images).uniform_(-ATTACK.epsilon, ATTACK.epsilon)).clamp(0, 1)
        for _ in range(ATTACK.steps):
            points.requires_grad_(True)
            (gradient,) = torch.autograd.grad(loss(points, labels), points)
            moved = points.detach() + ATTACK.step_size * gradient.sign() - images
            points = (images + moved.clamp(-ATTACK.epsilon, ATTACK.epsilon)).clamp(0, 1)
        model.train().requires_grad_(True)
        optimizer.zero_grad()
        loss(points, labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return model, _timed(_each(batches, step), arguments.epochs, device)


def ours(model: Classifier, batches: Batches, arguments: argparse.Namespace, device: torch.device) -> Any:
    """The trainer of this package, at the same constant rate."""
    schedule = OptimizerConfig(lr=arguments.lr, schedule="constant")
    config = TrainConfig(epochs=arguments.epochs, batch_size=arguments.batch_size, optimizer=schedule)
    host = make_host("at", ATTACK, None, lambda: model)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    engine = resolve_engine("auto", device)
    trainer = Trainer(config, model, host, None, batches, device=device, dtype=dtype, engine=engine, world=ALONE)
    return trainer.model, _timed(lambda _: list(trainer.epoch()), arguments.epochs, device)


def _each(batches: Batches, step: Callable[[Tensor, Tensor], None]) -> Callable[[int], None]:
    """An epoch of steps."""

    def epoch(number: int) -> None:
        for images, labels in batches.epoch(number):
            step(images, labels)

    return epoch


def _timed(epoch: Callable[[int], Any], epochs: int, device: torch.device) -> float:
    """Seconds of the last of so many epochs."""
    seconds = 0.0
    for number in range(epochs):
        synchronize(device)
        begun = time.perf_counter()
        epoch(number)
        synchronize(device)
        seconds = time.perf_counter() - begun
    return seconds


LOOPS = {"torchattacks": plain, "compiled": compiled, "train-adv": ours}

if __name__ == "__main__":
    main()
