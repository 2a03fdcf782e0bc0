"""Schedules and detectors."""

from __future__ import annotations

import pytest

from train_adv.training.config import GuardConfig, OptimizerConfig, TrainConfig
from train_adv.training.detect import catastrophic_overfitting, robust_overfitting
from train_adv.training.schedule import learning_rate


def rates(**settings) -> list[float]:
    config = OptimizerConfig(lr=1.0, **settings)
    return [learning_rate(config, step / 10) for step in range(11)]


def test_cosine_falls_to_nothing():
    found = rates(schedule="cosine")
    assert found[0] == 1 and found[5] == pytest.approx(0.5) and found[10] == pytest.approx(0, abs=1e-9)
    assert found == sorted(found, reverse=True)


def test_onecycle_rises_to_its_peak_and_falls():
    found = rates(schedule="onecycle", peak=0.3)
    assert found.index(max(found)) == 3 and max(found) == 1 and found[0] < 0.1 and found[10] < 1e-9


def test_multistep_drops_by_ten_at_each_milestone():
    assert rates(schedule="multistep", milestones=(0.5, 0.8))[::4] == pytest.approx([1, 1, 0.01])


def entry(epoch: int, pgd: float, train: float) -> dict[str, float]:
    return {"epoch": float(epoch), "val_pgd": pgd, "train_robust": train}


def test_a_collapse_is_catastrophic_and_noise_is_not():
    config = GuardConfig()
    steady = [entry(1, 0.40, 0.4), entry(2, 0.38, 0.42)]
    assert catastrophic_overfitting(steady, config) is None
    message = catastrophic_overfitting([*steady, entry(3, 0.01, 0.9)], config)
    assert message is not None and "epoch 3" in message and "n-fgsm" in message


def test_a_long_decline_with_rising_training_accuracy_is_robust_overfitting():
    config = GuardConfig(patience=3, decline=0.02)
    history = [entry(1, 0.45, 0.45), entry(2, 0.50, 0.50), entry(3, 0.47, 0.55), entry(4, 0.46, 0.6)]
    assert robust_overfitting(history, config) is None
    message = robust_overfitting([*history, entry(5, 0.45, 0.65)], config)
    assert message is not None and "epoch 2" in message
    falling = [dict(each, train_robust=0.3) for each in [*history, entry(5, 0.45, 0.65)]]
    assert robust_overfitting(falling, config) is None


def test_what_is_left_out_depends_on_the_data():
    config = TrainConfig().resolved()
    assert config.model == "small-cnn" and config.attack.epsilon is not None
    assert config.attack.step_size == pytest.approx(config.attack.epsilon / 4)
    from train_adv.training.config import DataConfig

    assert TrainConfig(data=DataConfig(name="cifar10")).resolved().attack.epsilon == 8 / 255
