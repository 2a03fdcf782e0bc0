"""What rounds cost: interpolation, the cache on disk, and the measurement itself."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from coral_spec.drafter import DrafterConfig
from coral_spec.engine import Session
from coral_spec.tree import TreeShape
from coral_spec.tuning.costs import CAPACITY, StepCosts, cached, costs_key, interpolate, measure
from drafting import drafting_model
from tiny import tiny_target

COSTS = StepCosts(plain=10.0, verify={2: 12.0, 6: 16.0, 61: 71.0}, level={1: 1.0, 4: 2.5})
KEY = {"target": ["tiny", 2], "threads": 2}


@pytest.fixture(autouse=True)
def undisturbed(monkeypatch):
    """Other tests may run beside these."""
    monkeypatch.setattr("coral_spec.tuning.costs.PREEMPTIONS", float("inf"))


@pytest.mark.parametrize(
    ("at", "wanted"), [(2, 12.0), (4, 14.0), (6, 16.0), (7, 17.0), (61, 71.0), (71, 81.0), (1, 11.0)]
)
def test_costs_lie_on_lines_through_the_measured_points(at, wanted):
    assert interpolate(COSTS.verify, at) == pytest.approx(wanted)


def test_a_single_point_holds_everywhere():
    assert interpolate({3: 5.0}, 40) == 5.0


def test_a_round_is_its_verification_and_its_further_levels():
    assert COSTS.round(TreeShape(3, 2, 5)) == pytest.approx(16.0 + 2 * 1.5)
    assert COSTS.round(TreeShape(1, 1, 1)) == pytest.approx(12.0)
    assert COSTS.round(None) == 10.0


@pytest.mark.parametrize(
    "wrong", [{"plain": -1.0}, {"plain": float("nan")}, {"verify": {}}, {"level": {1: float("inf")}}]
)
def test_costs_are_finite_milliseconds(wrong):
    with pytest.raises(ValueError, match="milliseconds"):
        replace(COSTS, **wrong)


def test_costs_are_measured_once_per_key(tmp_path):
    asked: list[str] = []

    def measured(name):
        asked.append(name)
        return COSTS

    assert cached(KEY, tmp_path, lambda: measured("first")) == COSTS
    assert cached(KEY, tmp_path, lambda: measured("again")) == COSTS
    assert cached({**KEY, "threads": 1}, tmp_path, lambda: measured("other")) == COSTS
    assert asked == ["first", "other"]


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[]", '{"key": KEY, "costs": {"plain": "x"}}', '{"key": KEY, "costs": {"plain": 1, "verify": 2}}'],
)
def test_a_damaged_file_is_measured_anew(text, tmp_path):
    cached(KEY, tmp_path, lambda: replace(COSTS, plain=1.0))
    (path,) = tmp_path.iterdir()
    path.write_text(text.replace("KEY", json.dumps(KEY)))
    assert cached(KEY, tmp_path, lambda: COSTS) == COSTS
    assert cached(KEY, tmp_path, lambda: replace(COSTS, plain=2.0)) == COSTS


def test_a_folder_that_cannot_be_written_to_is_no_error(tmp_path):
    (tmp_path / "file").touch()
    assert cached(KEY, tmp_path / "file" / "inside", lambda: COSTS) == COSTS


def test_costs_that_other_work_disturbed_are_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("coral_spec.tuning.costs.PREEMPTIONS", -1.0)
    assert cached(KEY, tmp_path, lambda: COSTS) == COSTS
    assert not list(tmp_path.iterdir())


def test_every_part_is_measured_through_the_engine(tmp_path):
    model = drafting_model(tiny_target("llama"), tmp_path)
    backbone = model._backbone
    costs = measure(lambda shape: Session(backbone, model._make_draft(shape), CAPACITY), most_rows=30, seconds=5.0)
    assert costs.plain > 0
    assert set(costs.verify) == {2, 4, 6, 9, 13, 17, 25}  # 61 needs 60 rows of the head
    assert set(costs.level) == {2, 4, 10}
    assert min(costs.verify.values()) > 0
    assert costs.round(TreeShape(6, 4, 20)) > costs.round(TreeShape(1, 4, 4))


def test_a_slow_machine_times_few_shapes(tmp_path):
    model = drafting_model(tiny_target("llama"), tmp_path)
    backbone = model._backbone
    costs = measure(lambda shape: Session(backbone, model._make_draft(shape), CAPACITY), most_rows=64, seconds=0.0)
    assert (set(costs.verify), set(costs.level)) == ({6, 13}, {2})


def test_a_gpu_times_two_trees_that_differ_in_depth(tmp_path):
    model = drafting_model(tiny_target("llama"), tmp_path)
    backbone = model._backbone
    costs = measure(lambda shape: Session(backbone, model._make_draft(shape), CAPACITY), most_rows=64, cuda=True)
    assert (set(costs.verify), set(costs.level)) == ({61}, {10})
    assert costs.change > 0
    assert StepCosts.from_json(json.loads(json.dumps(asdict(costs)))) == costs


def test_the_key_tells_models_and_heads_apart(tmp_path):
    keys = []
    for layers, rows in ((2, 64), (2, 128), (3, 64)):
        target = tiny_target("llama", layers=layers)
        model = drafting_model(target, tmp_path / f"{layers}", head=rows)
        keys.append(costs_key(model._backbone, DrafterConfig.from_target(target), rows))
    assert keys[0] != keys[1] and keys[0] != keys[2]
    assert json.loads(json.dumps(keys[0])) == keys[0]
