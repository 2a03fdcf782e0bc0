"""Training runs: they learn, they resume to the bit, they leave a drafter that loads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from coral_spec.drafter import Drafter, load_ranking
from coral_spec.targets import Target
from coral_spec.training import run as run_module
from coral_spec.training.config import BatchConfig, LossConfig, OptimizerConfig, RouterConfig, TrainConfig
from coral_spec.training.csra import CsraConfig
from coral_spec.training.data import Answers
from coral_spec.training.harmonised import draft_step, harmonised_mask, shift
from coral_spec.training.initialise import new_drafter
from coral_spec.training.run import train
from coral_spec.training.trainer import Trainer
from expkit.checkpoint import CheckpointStore
from expkit.config import load_config
from expkit.distributed import World
from expkit.errors import UsageError
from expkit.metrics import read_metrics
from making_answers import small_config, write_answers
from tiny import tiny_target

ALONE = World(rank=0, size=1, local_rank=0)


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target()


@pytest.fixture(scope="module")
def data(target: Target, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("answers")
    write_answers(folder, target)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = CheckpointStore(folder / "checkpoints").latest()
    assert checkpoint is not None
    return checkpoint.tensors


def test_a_run_leaves_a_drafter_figures_and_curves(target: Target, data: Path, tmp_path: Path) -> None:
    outcome = train(small_config(data), target, tmp_path, ALONE)
    assert outcome is not None
    folder = tmp_path / "run"
    assert {"config.toml", "env.json", "metrics.jsonl", "curves.png", "result.json"} <= {
        entry.name for entry in folder.iterdir()
    }
    Drafter.load(folder / "drafter", target)
    ranking = load_ranking(folder / "drafter", 259)
    assert ranking is not None and sorted(ranking.tolist()) == list(range(259))
    result = json.loads((folder / "result.json").read_text())
    assert result["steps"] == 4 and result["tau_sim"] >= 1 and len(result["rates"]) == 3
    assert {"command", "seed", "versions", "hardware", "git", "started"} <= set(result)
    assert "HASS" in (folder / "drafter" / "README.md").read_text()
    lines = read_metrics(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert {"feature_1", "soft_2", "top_2", "agreed_1", "lr", "tokens_per_second"} <= set(lines[0])
    assert lines[1]["top_1"] == 0 and lines[3]["top_1"] > 0


def test_a_killed_run_resumed_equals_an_uninterrupted_one(
    target: Target, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(data, steps=6)
    train(config, target, tmp_path / "whole", ALONE)
    original = Trainer.step

    def killed(self: Trainer) -> None:
        if self.clock.step == 3:
            raise KeyboardInterrupt
        original(self)

    monkeypatch.setattr(Trainer, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        train(config, target, tmp_path / "killed", ALONE)
    monkeypatch.setattr(Trainer, "step", original)
    train(config, target, tmp_path / "killed", ALONE, resume=True)
    whole, resumed = weights(tmp_path / "whole" / "run"), weights(tmp_path / "killed" / "run")
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name
    curves = [read_metrics(tmp_path / kind / "run" / "metrics.jsonl") for kind in ("whole", "killed")]
    timing = {"seconds", "tokens_per_second"}
    assert [{k: v for k, v in line.items() if k not in timing} for line in curves[0]] == [
        {k: v for k, v in line.items() if k not in timing} for line in curves[1]
    ]


def test_losses_fall_and_acceptance_rises(target: Target, data: Path, tmp_path: Path) -> None:
    config = small_config(data, steps=80, noise=0.0, optimizer=OptimizerConfig(lr=1e-2))
    trainer = Trainer(config, target, Answers.read(data), ALONE)
    trainer.held_out = [trainer.plan.batch(0)]  # whether it can learn at all, so on what it learns from
    before = trainer.evaluate()
    trainer.step()
    first = trainer.take_metrics()
    for _ in range(78):
        trainer.step()
    trainer.take_metrics()
    trainer.step()
    last = trainer.take_metrics()
    for name in ("soft_1", "soft_2", "feature_1", "feature_2"):
        assert last[name] < 0.9 * first[name], (name, first[name], last[name])
    assert trainer.evaluate().tau > before.tau + 0.2


def test_prompt_and_padding_do_not_reach_the_gradient(target: Target, data: Path) -> None:
    config = small_config(data, noise=0.0, align_steps=1)
    trainer = Trainer(config, target, Answers.read(data), ALONE)
    batch = trainer.plan.batch(0)
    seen: list[torch.Tensor] = []
    original = trainer.forward

    def recorded(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features, embeddings = original(tokens)
        spoiled = features.clone()
        labels = torch.zeros(tokens.shape, dtype=torch.bool)
        labels.view(-1)[batch.positions(1) + 1] = True
        inputs = torch.arange(tokens.shape[1]) <= batch.last[:, None]
        spoiled[~(labels | inputs)] = 1e4  # padding
        seen.append(spoiled)
        return spoiled if len(seen) > 1 else features, embeddings

    trainer.forward = recorded  # type: ignore[method-assign]
    gradients = []
    for _ in range(2):
        trainer.optimizer.zero_grad()
        trainer.now = 1.0
        trainer.accumulate(0, batch, [batch.count(1)])
        gradients.append([parameter.grad.clone() for parameter in trainer.drafter.parameters()])  # type: ignore[union-attr]
    for plain, padded in zip(*gradients, strict=True):
        assert torch.equal(plain, padded)


def whole_graph_gradients(trainer: Trainer, number: int) -> list[torch.Tensor]:
    """All steps in one graph, the losses summed, one backward: what the step-wise backward must equal."""
    batch, config = trainer.plan.batch(number), trainer.config
    features, embeddings = trainer.forward(batch.tokens)
    length, labels = features.shape[1], features.flatten(0, 1)
    inputs, outputs, total = [features], {}, torch.zeros(())
    for step in range(1, config.align_steps + 1):
        mask = harmonised_mask(length, step, features.dtype, features.device)
        outputs[step] = draft_step(trainer.drafter, embeddings, inputs, mask)
        inputs.append(shift(outputs[step], features))
        where = batch.positions(step)
        chosen, count = outputs[step].flatten(0, 1)[where], batch.count(step)
        total = total + functional.smooth_l1_loss(chosen, labels[where + 1])
        anchor = config.csra.anchor_of(step)
        if anchor is not None:
            fixed = labels[where + 1] if anchor == 0 else outputs[anchor].flatten(0, 1)[where]
            fixed = fixed.detach() if config.csra.stop_gradient else fixed
            alike = functional.normalize(chosen, dim=-1) @ functional.normalize(fixed, dim=-1).T
            nce = functional.cross_entropy(alike / config.csra.temperature, torch.arange(count))
            total = total + config.csra.weight * nce
    return list(torch.autograd.grad(total, list(trainer.drafter.parameters())))


@pytest.mark.parametrize(
    ("anchor", "stop_gradient", "steps"),
    [
        ("first", True, 3),
        ("first", False, 3),
        ("previous", True, 3),
        ("previous", False, 3),
        ("target", True, 3),
        ("target", True, 1),
    ],
)
def test_alignment_has_the_gradient_of_one_whole_graph(
    target: Target, data: Path, anchor: Any, stop_gradient: bool, steps: int
) -> None:
    csra = CsraConfig(weight=0.5, anchor=anchor, stop_gradient=stop_gradient, chunk=16)
    loss = LossConfig(feature=1.0, soft=0.0, top=0.0)
    config = small_config(data, noise=0.0, align_steps=steps, csra=csra, loss=loss)
    trainer = Trainer(config, target, Answers.read(data), ALONE)
    batch = trainer.plan.batch(0)
    trainer.optimizer.zero_grad()
    trainer.accumulate(0, batch, [batch.count(step) for step in range(1, steps + 1)])
    for parameter, wanted in zip(trainer.drafter.parameters(), whole_graph_gradients(trainer, 0), strict=True):
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, wanted, atol=1e-6, rtol=1e-4)


def test_alignment_is_logged_for_every_step_that_has_an_anchor(target: Target, data: Path) -> None:
    trainer = Trainer(small_config(data, csra=CsraConfig(weight=0.1)), target, Answers.read(data), ALONE)
    trainer.step()
    figures = trainer.take_metrics()
    assert "csra_1" not in figures and figures["csra_2"] > 0 and -1 <= figures["cosine_2"] <= 1


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3"])
def test_features_with_a_given_mask_are_those_without(architecture: str, tmp_path: Path) -> None:
    model = tiny_target(architecture)
    write_answers(tmp_path, model)
    trainer = Trainer(small_config(tmp_path), model, Answers.read(tmp_path), ALONE)
    tokens = torch.randint(3, 250, (3, 40), generator=torch.Generator().manual_seed(0))  # longer than Gemma's window
    with torch.no_grad():
        torch.testing.assert_close(trainer._decode_masked(tokens), trainer._decode(tokens))


def test_alignment_with_one_step_is_refused() -> None:
    with pytest.raises(UsageError, match=r"csra\.weight is 0\.1, but align_steps is 1"):
        load_config(TrainConfig, None, {"align_steps": 1, "csra.weight": 0.1})


def test_alignment_with_one_step_to_the_target_is_said_to_be_a_loss() -> None:
    with pytest.warns(UserWarning, match=r"csra\.weight is 3\.0 with one step: .*csra\.weight 0 leaves it out"):
        load_config(TrainConfig, None, {"align_steps": 1, "csra.weight": 3.0, "csra.anchor": "target"})


def test_accumulated_batches_and_several_processes_are_one_larger_batch(target: Target, data: Path) -> None:
    """Both average over all positions: two batches in turn, or on two processes whose gradients are averaged."""
    answers = Answers.read(data)
    config = small_config(data, batch=BatchConfig(tokens=192, accumulate=2, max_length=64))
    together = Trainer(config, target, answers, ALONE)
    together.step()
    single = replace(config, batch=BatchConfig(tokens=192, accumulate=1, max_length=64))
    gradients = []
    for rank in (0, 1):
        trainer = Trainer(single, target, answers, World(rank=rank, size=2, local_rank=rank))
        trainer._apply = lambda rate: None  # type: ignore[method-assign]
        trainer.step()
        gradients.append([parameter.grad for parameter in trainer.drafter.parameters()])
    for own, *parts in zip(together.drafter.parameters(), *gradients, strict=True):
        mean = sum(part.clone() for part in parts if part is not None) / 2
        clipped = mean.clamp(-0.5, 0.5)
        assert own.grad is not None and torch.allclose(own.grad, clipped, atol=1e-6)


def test_a_run_that_exists_or_changed_is_refused(target: Target, data: Path, tmp_path: Path) -> None:
    config = small_config(data, steps=1)
    train(config, target, tmp_path, ALONE)
    with pytest.raises(UsageError, match="exists already"):
        train(config, target, tmp_path, ALONE)
    with pytest.raises(UsageError, match="steps"):
        train(replace(config, steps=9), target, tmp_path, ALONE, resume=True)


def test_answers_of_another_tokenizer_are_refused(data: Path, tmp_path: Path) -> None:
    other = tiny_target(vocab=300)
    with pytest.raises(UsageError, match="tokenizer hash"):
        train(small_config(data), other, tmp_path, ALONE)
    assert not (tmp_path / "run").exists()


def test_the_clock_ends_a_run_with_a_time_limit(target: Target, data: Path, tmp_path: Path) -> None:
    config = small_config(data, steps=100_000, max_minutes=0.5 / 60)
    outcome = train(config, target, tmp_path, ALONE)
    assert outcome is not None and 1 <= outcome.result["steps"] < 1000
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert "tau_sim" in lines[-1] and lines[-1]["lr"] < 3e-3


def test_the_last_layer_passes_the_feature_through_at_first(target: Target) -> None:
    drafter = new_drafter(target, "last-layer", 0)
    decoder = target.model.get_decoder()  # type: ignore[no-untyped-call]
    own = drafter.layer.mlp.down_proj.weight
    assert torch.equal(own, decoder.layers[-1].mlp.down_proj.weight)
    features = torch.randn(1, 3, 32)
    assert torch.allclose(drafter.fuse(torch.zeros_like(features), features), features, atol=1e-5)
    with pytest.raises(UsageError, match="init"):
        new_drafter(tiny_target("gemma3"), "last-layer", 0)


def test_wrong_settings_are_named(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("[optimizer]\nleaning_rate = 1.0\n")
    with pytest.raises(UsageError, match="leaning_rate"):
        load_config(TrainConfig, tmp_path / "c.toml")
    with pytest.raises(UsageError, match="align_steps is 0"):
        load_config(TrainConfig, None, {"align_steps": 0})


@pytest.mark.parametrize("name,steps", [("hass", 3), ("eagle2", 1), ("coral", 3)])
def test_presets_train_drafters_that_differ_in_steps_and_alignment_only(name: str, steps: int) -> None:
    folder = Path(__file__).parents[2] / "configs"
    preset = load_config(TrainConfig, folder / f"{name}.toml")
    twin = load_config(TrainConfig, folder / "hass.toml")
    assert preset.align_steps == steps
    assert (preset.csra.weight > 0) == (name == "coral")
    assert ("router" in preset.stages) == (name == "coral")
    same = {"name": "", "align_steps": 3, "csra": CsraConfig(), "stages": ("drafter",), "router": RouterConfig()}
    assert replace(preset, **same) == replace(twin, **same)


def test_missing_plots_do_not_stop_a_run(
    target: Target, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "plot_curves", lambda *_: False)
    assert train(small_config(data, steps=1), target, tmp_path, ALONE) is not None
