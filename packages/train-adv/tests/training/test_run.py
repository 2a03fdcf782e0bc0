"""Runs: what they leave, resuming to the bit after a kill, two processes, guards, and the Python interface."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path

import pytest
import torch

import train_adv
from expkit.checkpoint import CheckpointStore, load_tensors
from expkit.errors import UsageError
from expkit.metrics import read_metrics
from tiny_models import tiny_batch, tiny_net
from train_adv.data.dataset import Augment, DataSet, Resident
from train_adv.models.checkpoint import figures_of
from train_adv.topology.loss import TopologyLoss
from train_adv.topology.metrics import NEIGHBOURS
from train_adv.training.trainer import Trainer

SCRIPT = Path(__file__).with_name("killed.py")
QUICK = {
    "epochs": 2,
    "batch_size": 32,
    "device": "cpu",
    "data": {"limit": 160},
    "attack": {"steps": 2},
    "validation": {"fraction": 0.2, "steps": 2},
}


def fit(tmp_path: Path, **settings):
    merged = deepcopy(QUICK)
    for key, value in settings.items():
        merged[key] = {**merged.get(key, {}), **value} if isinstance(value, dict) else value
    table = merged.pop("data")
    data = train_adv_data(table.get("limit", 0)) if "given" not in merged else merged.pop("given")
    return train_adv.fit(merged.pop("model", "small-cnn"), data, runs=tmp_path, **merged)


def train_adv_data(limit: int) -> DataSet:
    from train_adv.training.config import DataConfig
    from train_adv.training.given import read_data

    return read_data(DataConfig(limit=limit))


@pytest.mark.parametrize("host", ["standard", "at", "trades", "mart", "lbgat", "fgsm-rs", "n-fgsm"])
def test_every_host_trains_and_composes_with_all_there_is(host, tmp_path):
    averaging = {"kind": "ema"} if host in ("at", "trades") else {"kind": "swa", "start": 0.0}
    outcome = fit(
        tmp_path,
        host=host,
        epochs=1,
        topology={"weight": 20.0, "reference_epochs": 1},
        awp={"gamma": 0.005},
        averaging=averaging,
    )
    result = json.loads((outcome.folder / "result.json").read_text())
    assert {"natural", "pgd20", "epoch"} <= result["best"].keys() & result["last"].keys()
    assert {"command", "seed", "versions", "hardware", "git", "started"} <= result.keys()
    (line,) = read_metrics(outcome.folder / "metrics.jsonl")
    assert line["topology"] > 0 and line["norm_host"] > 0 and line["norm_topology"] > 0
    loaded = train_adv.load(outcome.folder)
    images, _ = tiny_batch(4, channels=1)
    assert torch.allclose(loaded(images), outcome.model(images), atol=1e-5)


def test_training_learns(tmp_path):
    outcome = fit(tmp_path, epochs=8, data={"limit": 0}, attack={"epsilon": 0.05})
    assert outcome.result["best"]["natural"] > 0.8
    assert outcome.result["best"]["natural"] > outcome.result["best"]["pgd20"] > 0.4


def test_a_killed_run_resumes_to_the_bit(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(tmp_path)]
    subprocess.run([*command, "whole"], check=True, env=environment, capture_output=True)
    process = subprocess.Popen([*command, "cut"], env=environment, stderr=subprocess.DEVNULL)
    store = CheckpointStore(tmp_path / "cut" / "checkpoints")
    deadline = time.monotonic() + 60
    while not any(step % 4 for step in store.steps()) or store.steps()[-1] < 6:  # in the middle of the second epoch
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "cut" / "result.json").exists()
    subprocess.run([*command, "cut", "resume"], check=True, env=environment, capture_output=True)
    for name in ("best.safetensors", "last.safetensors"):
        whole, cut = (load_tensors(tmp_path / run / name) for run in ("whole", "cut"))
        assert whole.keys() == cut.keys() and all(torch.equal(whole[each], cut[each]) for each in whole)
    lines = [read_metrics(tmp_path / run / "metrics.jsonl") for run in ("whole", "cut")]
    for line in (line for part in lines for line in part):
        line.pop("seconds")
    assert lines[0] == lines[1]


def test_two_processes_take_the_steps_of_one(tmp_path):
    """Gradients, AWP's direction, the gathered features, the ratio of norms: all are of the whole batch."""
    script = str(SCRIPT.with_name("parity.py"))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    for processes, name in (([], "one"), (torchrun, "two")):
        command = [sys.executable, *processes, script, str(tmp_path), name]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    alone, *both = (load_tensors(tmp_path / f"{name}.safetensors") for name in ("one-0", "two-0", "two-1"))
    for name, value in alone.items():
        assert torch.equal(both[0][name], both[1][name]) and torch.allclose(both[0][name], value, atol=1e-5), name


def test_every_process_gets_the_same_outcome(tmp_path):
    """Initial weights, recomputed statistics, figures and decisions are the same, whoever drew and measured what."""
    script = str(SCRIPT.with_name("ranks.py"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run([*command, str(tmp_path)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert first == second and first["trained"].keys() == {"model", "average"}
    result = first["result"]
    assert result == json.loads((tmp_path / "run" / "result.json").read_text())
    assert round(result["last"]["val_natural"] * 41, 6) % 1 == 0  # every one of the 41 images counts once
    stored = load_tensors(tmp_path / "run" / "best.safetensors")
    assert {"natural", "pgd20"} <= result["best"].keys() and len(stored) > 10


def test_validation_and_measurement_step_a_quarter_of_epsilon_in_fp32(tmp_path, monkeypatch):
    from train_adv.training import run as module

    seen, asked = [], set()
    real = module.right_under_pgd

    def watching(model, split, attack, **options):
        def note(module, inputs, logits):
            asked.add((logits.dtype, torch.is_autocast_enabled("cpu"), torch.backends.cudnn.allow_tf32))

        seen.append((attack.step_size, attack.steps))
        hook = model.register_forward_hook(note)
        right = real(model, split, attack, **options)
        hook.remove()
        return right

    monkeypatch.setattr(module, "right_under_pgd", watching)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    fit(tmp_path, epochs=1, dtype="bf16", attack={"epsilon": 0.2, "step_size": 0.15, "steps": 2})
    assert seen == [(0.05, 2), (0.05, 20)]  # the best epoch is the last one
    assert asked == {(torch.float32, False, False)} and torch.backends.cudnn.allow_tf32


def test_the_training_attack_moves_the_second_networks_statistics_once_a_step(tmp_path, monkeypatch):
    """A co-trained reference is in train mode; neither AWP's ascent nor the measured norms count as its batches."""
    kept = []
    real = Trainer.__init__

    def keeping(self, *arguments, **options):
        real(self, *arguments, **options)
        kept.append(self)

    monkeypatch.setattr(Trainer, "__init__", keeping)
    fit(
        tmp_path,
        host="lbgat",
        epochs=1,
        awp={"gamma": 0.005},
        topology={"weight": 20.0, "reference": "co-trained", "reference_epochs": 1},
    )
    trainer = kept[-1]
    steps = trainer.batches.steps
    reference, teacher = trainer.topology.reference, trainer.host.teacher
    trained_before = steps  # the reference's own training, one epoch of the same batches
    assert int(teacher.backbone.trunk[1].num_batches_tracked) == steps
    assert int(reference.backbone.trunk[1].num_batches_tracked) == trained_before + steps
    assert int(trainer.model.backbone.trunk[1].num_batches_tracked) == 2 * steps  # attacked, and TRAIN's natural


@pytest.mark.parametrize(("host", "inputs"), [("at", "adversarial"), ("at", "both"), ("trades", "adversarial")])
def test_the_topology_is_kept_by_the_features_that_were_asked_for(host, inputs, tmp_path, monkeypatch):
    kept: list[Trainer] = []
    real = Trainer.__init__

    def keeping(self: Trainer, *arguments: object, **named: object) -> None:
        real(self, *arguments, **named)  # type: ignore[arg-type]
        kept.append(self)

    monkeypatch.setattr(Trainer, "__init__", keeping)
    fit(tmp_path, host=host, epochs=1, topology={"weight": 20.0, "reference_epochs": 1, "inputs": inputs})
    trainer = kept[-1]
    forwards = 1 if host == "at" and inputs == "adversarial" else 2  # plain AT needs no natural forward of its own
    assert int(trainer.model.backbone.trunk[1].num_batches_tracked) == forwards * trainer.batches.steps
    images = torch.rand(16, 1, 8, 8)
    adversarial, labels = (images + 0.2).clamp(0, 1), torch.arange(16) % 10
    found = trainer._whole_loss(images, adversarial, labels, torch.tensor(20.0))
    shown = {"adversarial": [adversarial], "both": [images, adversarial]}[inputs]
    reference = trainer.topology.reference.with_features(images).features
    values = [TopologyLoss()(trainer.model.with_features(each).features, reference) for each in shown]
    value = sum(map(float, values)) / len(values)
    assert float(found.topology) == pytest.approx(value, rel=1e-4)
    alone = trainer.host.loss(trainer.model.with_features, images, adversarial, labels)
    assert float(found.total) == pytest.approx(float(alone.total) + 20 * value, rel=1e-4)


def test_the_standard_model_is_trained_first_and_used_again(tmp_path):
    first = fit(tmp_path, name="a", epochs=1, topology={"weight": 20.0, "reference_epochs": 2})
    assert json.loads((first.folder / "reference" / "result.json").read_text())["host"] == "standard"
    second = fit(tmp_path, name="b", epochs=1, topology={"weight": 20.0, "path": first.folder / "reference"})
    assert not (second.folder / "reference").exists()
    assert first.result["last"]["loss"] == second.result["last"]["loss"]


def test_lambda_follows_a_ratio_of_gradient_norms(tmp_path):
    outcome = fit(tmp_path, topology={"ratio": 0.5, "reference_epochs": 1})
    for line in read_metrics(outcome.folder / "metrics.jsonl"):
        assert line["weight"] * line["norm_topology"] == pytest.approx(0.5 * line["norm_host"], rel=1e-4)


def test_the_control_has_the_natural_forward_and_nothing_else(tmp_path):
    plain = fit(tmp_path, name="plain", epochs=1)
    control = fit(tmp_path, name="control", epochs=1, topology={"control": True})
    frozen = fit(tmp_path, name="frozen", epochs=1, topology={"control": True, "statistics": "dual"})
    weights = [load_tensors(run.folder / "last.safetensors") for run in (plain, control, frozen)]
    changed = {name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])}
    assert any("running" in name for name in changed)  # so the attacks differ, and with them the weights
    assert all(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])


def test_topology_metrics_are_logged_without_a_weight(tmp_path):
    reference = fit(tmp_path, name="standard", host="standard", epochs=1)
    outcome = fit(tmp_path, name="at", topology={"metrics": True, "path": reference.folder})
    for line in read_metrics(outcome.folder / "metrics.jsonl"):
        assert {"topology_cka", "topology_l_topo", f"topology_knn_{NEIGHBOURS[0]}"} <= line.keys()
        assert "topology" not in line


def test_recomputed_statistics_are_not_averaged_ones(tmp_path):
    settings = {"kind": "ema", "batches": 2}
    one = fit(tmp_path, name="one", averaging=settings)
    two = fit(tmp_path, name="two", averaging={**settings, "statistics": "recompute"})
    weights = [load_tensors(run.folder / "last.safetensors") for run in (one, two)]
    for name in weights[0]:
        if "num_batches" not in name:
            assert torch.equal(weights[0][name], weights[1][name]) is ("running" not in name), name


def test_a_lambda_too_large_ends_in_one_line_and_keeps_what_was(tmp_path):
    with pytest.raises(UsageError, match=r"not a number in epoch \d.*topology\.weight"):
        fit(tmp_path, topology={"weight": 1e38, "reference_epochs": 1})
    assert not (tmp_path / "run" / "last.safetensors").exists()


def test_a_network_of_ones_own_on_data_of_ones_own(tmp_path):
    images, labels = tiny_batch(200)
    split = Resident((images * 255).to(torch.uint8), labels)
    data = DataSet("mine", tuple("abcd"), split, split, Augment(1, True))
    network = tiny_net()
    before = deepcopy(network.state_dict())
    outcome = fit(tmp_path, model=network, given=data, topology={"weight": 10.0, "reference_epochs": 1})
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    again = train_adv.load(outcome.folder, model=tiny_net(seed=9))
    assert torch.allclose(again(images), outcome.model(images), atol=1e-5) and figures_of(outcome.folder)["epoch"] >= 1


def test_a_compiled_run_is_the_eager_one(tmp_path):
    """The engine may change rounding, so weights are only near; CUDA graphs need a GPU."""
    runs = [
        fit(tmp_path, name=engine, engine=engine, epochs=1, topology={"weight": 20.0, "reference_epochs": 1})
        for engine in ("eager", "compile")
    ]
    losses = [run.result["last"]["loss"] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"host": "trade"}, "trades"),
        ({"attack": {"epsilon": 8.0}}, "8/255"),
        ({"batch_size": 1}, "no neighbours"),
        ({"epoch": 3}, 'did you mean "epochs"'),
        ({"topology": {"weight": 1.0, "path": "nowhere"}}, "nowhere"),
        ({"dtype": "fp16"}, "float16"),
        ({"model": "resnet-18"}, "did you mean"),
    ],
)
def test_wrong_use_is_said(settings, said, tmp_path):
    with pytest.raises(UsageError, match=said):
        fit(tmp_path, **settings)


def test_a_reference_of_other_classes_is_refused(tmp_path):
    images, labels = tiny_batch(120, channels=1)
    split = Resident((images * 255).to(torch.uint8), labels)
    data = DataSet("mine", tuple("abcd"), split, split, Augment(0, False))
    reference = fit(tmp_path, name="four", given=data, host="standard", epochs=1)
    with pytest.raises(UsageError, match="4 classes"):
        fit(tmp_path, name="ten", topology={"weight": 1.0, "path": reference.folder})
