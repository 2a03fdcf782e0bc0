"""What only a GPU can show: CUDA graphs, bf16, exact resume there."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch._inductor.config

import train_adv
from expkit.checkpoint import load_tensors
from expkit.graphs import Captured
from train_adv.attacks.apgd import APGD
from train_adv.attacks.losses import cross_entropy
from train_adv.attacks.pgd import PGD
from train_adv.data.dataset import Augment, DataSet, Resident
from train_adv.evaluation.attacks import Evaluator
from train_adv.hosts.make import make_host
from train_adv.models.build import build
from train_adv.models.classifier import Classifier, ModelSpec
from train_adv.modes import attack_twin
from train_adv.training.climber import Climber
from train_adv.training.run import Outcome
from train_adv.training.trainer import Trainer

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
NAMES = tuple(str(digit) for digit in range(10))


def classifier(name: str = "small-cnn", size: int = 16) -> Classifier:
    torch.manual_seed(0)
    spec = ModelSpec(name, NAMES, (3, size, size), (0.5,) * 3, (0.25,) * 3)
    return build(spec).to(CUDA).to(memory_format=torch.channels_last)


def batch(count: int = 64, size: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, 3, size, size, generator=generator)
    return images.to(CUDA), torch.randint(10, (count,), generator=generator).to(CUDA)


@pytest.mark.parametrize("host_name", ["at", "trades", "n-fgsm"])
def test_a_graph_is_the_eager_attack_and_follows_the_weights(host_name):
    model = classifier()
    images, labels = batch()
    host = make_host(host_name, PGD(8 / 255, 2 / 255, 5), None, classifier)
    start = host.start(images, torch.Generator(CUDA).manual_seed(1))
    eager, graphs = (Climber(host, model, engine, CUDA, torch.float32) for engine in ("eager", "graphs"))
    for _ in range(3):
        first, second = eager(start, images, labels), graphs(start, images, labels)
        # sums in another order turn the signs of tiny gradients, those of TRADES at its start most of all
        assert ((first - second).abs() < 1e-3).float().mean() > 0.95
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))


def test_bf16_leaves_images_in_fp32():
    model = classifier("resnet18", 32)
    images, labels = batch(16, 32)
    climber = Climber(
        make_host("at", PGD(8 / 255, 2 / 255, 5), None, classifier), model, "graphs", CUDA, torch.bfloat16
    )
    found = climber(images, images, labels)
    assert found.dtype == torch.float32 and 0 < float((found - images).abs().max()) <= 8 / 255 + 1e-6


def test_apgd_as_a_graph_reaches_the_eager_loss():
    model = attack_twin(classifier())
    images, labels = batch()
    attack = APGD(8 / 255, 20)
    start = attack.draw(images, torch.Generator(CUDA).manual_seed(0))

    def run(points: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return attack.run(model, points, x, y, cross_entropy).loss

    eager, graph = run(start, images, labels), Captured(run, True)(start, images, labels)
    assert torch.allclose(eager.mean(), graph.mean(), rtol=1e-2)


def test_compiled_evaluation_agrees_with_the_plain_one():
    model = classifier().eval()
    images, labels = batch(100)
    labels = model(images).argmax(1)
    counts = [
        int(Evaluator(model, 4 / 255, "Linf", 50, CUDA, compiled=compiled).survivors("apgd", images, labels, 0).sum())
        for compiled in (False, True)
    ]
    assert abs(counts[0] - counts[1]) <= 3


def made() -> DataSet:
    images, labels = batch(320)
    split = Resident((images.cpu() * 255).to(torch.uint8), labels.cpu())
    return DataSet("made", NAMES, split, split, Augment(2, True))


SETTINGS = {
    "host": "trades",
    "topology": {"weight": 20.0, "reference_epochs": 1},
    "epochs": 2,
    "batch_size": 64,
    "deterministic": True,
    "awp": {"gamma": 0.005},
    "averaging": {"kind": "ema"},
    "validation": {"fraction": 0.2, "steps": 2},
}


def weights_of(outcome: Outcome) -> dict[str, torch.Tensor]:
    return load_tensors(outcome.folder / "last.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_deterministic_runs_are_the_same_to_the_bit(tmp_path):
    runs = [train_adv.fit("small-cnn", made(), name=name, runs=tmp_path, **SETTINGS) for name in ("one", "two")]
    assert same(*map(weights_of, runs))


ALONE = """
import sys
import train_adv
train_adv.fit("resnet18", "digits", host="trades", name=sys.argv[2], runs=sys.argv[1], epochs=1, batch_size=128,
              deterministic=True, topology={"weight": 20.0, "reference_epochs": 1}, validation={"test": False})
"""


def test_deterministic_processes_that_share_the_compilers_cache_are_the_same_to_the_bit(tmp_path):
    for name in ("one", "two"):
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
        command = [sys.executable, "-c", ALONE, str(tmp_path), name]
        subprocess.run(command, env=environment, check=True, capture_output=True)
    one, two = (load_tensors(tmp_path / name / "last.safetensors") for name in ("one", "two"))
    assert same(one, two)


def test_a_run_that_was_cut_off_records_its_graphs_anew_and_goes_on_to_the_bit(tmp_path, monkeypatch):
    whole = train_adv.fit("small-cnn", made(), name="whole", runs=tmp_path, **SETTINGS)
    step, done = Trainer._step, []

    def cut(self: Trainer, images: torch.Tensor, labels: torch.Tensor) -> None:
        if self.config.host == "trades":
            done.append(1)
            if len(done) == 7:  # in the second of two epochs of four steps, after a checkpoint within it
                raise KeyboardInterrupt
        step(self, images, labels)

    settings = {**SETTINGS, "checkpoint_every": 2, "name": "cut", "runs": tmp_path}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "_step", cut)
        train_adv.fit("small-cnn", made(), **settings)
    assert same(weights_of(whole), weights_of(train_adv.fit("small-cnn", made(), resume=True, **settings)))


@pytest.mark.parametrize("host", ["at", "trades", "mart", "lbgat"])
def test_a_whole_step_as_graphs_is_the_plain_one(host, tmp_path):
    """With everything on: AWP's ascent, TRAIN, the average."""
    settings = {**SETTINGS, "host": host, "dtype": "fp32", "runs": tmp_path, "data": made(), "model": "small-cnn"}
    runs = [train_adv.fit(name=engine, engine=engine, **settings) for engine in ("compile", "graphs")]
    one, other = map(weights_of, runs)
    for name, value in one.items():
        if value.is_floating_point():
            assert torch.allclose(value, other[name], rtol=1e-2, atol=2e-3), name
    losses = [run.result["last"]["loss"] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
