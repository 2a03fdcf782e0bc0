"""One command from prompts to a routed drafter: stages in order, nothing done twice, killed anywhere."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from coral_spec.drafter import Drafter
from coral_spec.grouping import make_grouping
from coral_spec.model import load
from coral_spec.router import Routing
from coral_spec.targets import Target
from coral_spec.training.config import AnswersConfig, LowRankConfig, OptimizerConfig, RouterConfig, TrainConfig
from coral_spec.training.data import Answers
from coral_spec.training.initialise import new_drafter
from coral_spec.training.second import LowRankTrainer, RouterTrainer
from coral_spec.training.stages import require_inputs, run_stages
from coral_spec.tree import TreeShape
from drafting import save_drafter
from expkit.checkpoint import CheckpointStore
from expkit.config import load_config
from expkit.distributed import World
from expkit.errors import UsageError
from expkit.metrics import read_metrics
from making_answers import small_config, write_answers
from tiny import tiny_target

ALONE = World(rank=0, size=1, local_rank=0)
ROUTER = RouterConfig(groups=8, always=1, active=2, steps=4, lr=3e-3)


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target()


@pytest.fixture(scope="module")
def data(target: Target, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("answers")
    write_answers(folder, target)
    return folder


def telling_drafter(target: Target) -> Drafter:
    """A random one whose features differ from position to position."""
    drafter = new_drafter(target, "random", 0)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.mul_(4)
    return drafter


def stages_config(data: Path, *stages: str, **changes: Any) -> TrainConfig:
    fields: dict[str, Any] = {"stages": stages, "router": ROUTER, "low_rank": LowRankConfig(rank=6, steps=2), **changes}
    return small_config(data, **fields)


def test_all_stages_leave_a_drafter_that_drafts_with_every_head(target: Target, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"tell me about {number}"}) + "\n" for number in range(16)))
    answers = AnswersConfig(prompts=prompts, max_new_tokens=16, batch_size=16)
    config = stages_config(tmp_path / "answers", "data", "drafter", "router", "low-rank", answers=answers)
    require_inputs(config)
    found = run_stages(config, target, tmp_path / "runs", ALONE)
    assert list(found) == ["drafter", "router", "low-rank"]
    folder = tmp_path / "runs" / "run" / "drafter"
    routed = 3 * 33 + -(-(32 * 32 + 32 + 8 * 32 + 8) // 32)  # the router's weights count too
    for head, rows in (("full", 259), ("routed", routed), ("auto", 259), ("low-rank", -(-6 * (259 + 32) // 32))):
        assert load(target, draft=str(folder), head=head, tree=TreeShape(3, 2, 5)).head_rows == rows
    card = (folder / "README.md").read_text()
    assert "8 groups of 33 head rows (kmeans), 1 always read, 2 more at every level: 99 rows, 38.2%" in card
    assert "Rank 6" in card and card.startswith("# Drafter for")
    result = json.loads((tmp_path / "runs" / "run" / "router" / "result.json").read_text())
    assert {"command", "seed", "versions", "hardware", "git", "started", "rows", "held_out_mass"} <= result.keys()
    assert len(result["mass_by_active"]) == 7 and result["mass_by_active"][-1] == pytest.approx(1, abs=1e-5)
    assert sorted(result["recall_by_active"]) == result["recall_by_active"]
    assert result["mass_by_active"][1] == pytest.approx(result["held_out_mass"])
    lines = read_metrics(tmp_path / "runs" / "run" / "router" / "metrics.jsonl")
    assert {"router_1", "recall_2", "mass_1"} <= lines[0].keys() and "held_out_recall_2" in lines[-1]
    assert (tmp_path / "runs" / "run" / "low-rank" / "curves.png").is_file()


@pytest.mark.parametrize("grouping", ["contiguous", "cooccurrence"])
def test_a_router_can_be_trained_for_a_drafter_that_is_there(
    target: Target, data: Path, tmp_path: Path, grouping: Any
) -> None:
    there = save_drafter(target, tmp_path / "there")
    settings = replace(ROUTER, grouping=grouping, scores="hierarchical")
    config = stages_config(data, "router", drafter=there, router=settings)
    run_stages(config, target, tmp_path, ALONE)
    routing = Routing.load(tmp_path / "run" / "drafter", target, 259, 32)
    assert (routing.grouping.kind, routing.active, routing.scores) == (grouping, 2, "hierarchical")
    assert not (there / "router.safetensors").exists()
    same = (each / "drafter.safetensors" for each in (there, tmp_path / "run" / "drafter"))
    assert len({path.read_bytes() for path in same}) == 1


@pytest.mark.parametrize("stage", ["router", "low-rank"])
def test_a_second_stage_killed_and_resumed_equals_an_uninterrupted_one(
    target: Target, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    kind = RouterTrainer if stage == "router" else LowRankTrainer
    changes = {"router": replace(ROUTER, steps=4), "low_rank": LowRankConfig(rank=6, steps=4)}
    config = stages_config(data, "drafter", stage, steps=2, **changes)
    run_stages(config, target, tmp_path / "whole", ALONE)
    original = kind.step

    def killed(self: Any) -> None:
        if self.clock.step == 3:
            raise KeyboardInterrupt
        original(self)

    monkeypatch.setattr(kind, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        run_stages(config, target, tmp_path / "killed", ALONE)
    monkeypatch.setattr(kind, "step", original)
    drafter = (tmp_path / "killed" / "run" / "drafter" / "drafter.safetensors").stat().st_mtime_ns
    run_stages(config, target, tmp_path / "killed", ALONE, resume=True)
    assert (tmp_path / "killed" / "run" / "drafter" / "drafter.safetensors").stat().st_mtime_ns == drafter
    stores = [CheckpointStore(tmp_path / each / "run" / stage / "checkpoints") for each in ("whole", "killed")]
    whole, resumed = (store.latest() for store in stores)
    assert whole is not None and resumed is not None and whole.step == resumed.step == 4
    for name, tensor in whole.tensors.items():
        assert torch.equal(tensor, resumed.tensors[name]), name


def test_a_run_killed_before_its_second_stage_goes_on_there(target: Target, data: Path, tmp_path: Path) -> None:
    config = stages_config(data, "drafter", "router", steps=2)
    run_stages(replace(config, stages=("drafter",)), target, tmp_path, ALONE)
    text = (tmp_path / "run" / "config.toml").read_text().replace('["drafter"]', '["drafter", "router"]')
    (tmp_path / "run" / "config.toml").write_text(text)  # as if it had been started with both
    assert list(run_stages(config, target, tmp_path, ALONE, resume=True)) == ["drafter", "router"]
    with pytest.raises(UsageError, match=r"router\.active \(2 -> 3\)"):
        run_stages(replace(config, router=replace(ROUTER, active=3)), target, tmp_path, ALONE, resume=True)
    with pytest.raises(UsageError, match="exists already"):
        run_stages(config, target, tmp_path, ALONE)


def test_the_router_learns_where_the_target_looks(target: Target, data: Path) -> None:
    config = stages_config(data, "drafter", noise=0.0, align_steps=1, steps=100, optimizer=OptimizerConfig(lr=3e-2))
    weight = target.model.get_output_embeddings().weight  # type: ignore[no-untyped-call]
    grouping = make_grouping("kmeans", 8, 1, torch.arange(259), weight=weight)
    drafter = telling_drafter(target)
    trainer = RouterTrainer(config, target, Answers.read(data), ALONE, drafter, grouping)
    trainer.held_out = [trainer.plan.batch(0)]  # whether it can learn at all
    before = trainer.evaluate()
    for _ in range(60):
        trainer.step()
    after = trainer.evaluate()
    assert after.score > before.score + 0.1
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in drafter.parameters())


def test_masses_are_sums_of_the_targets_probabilities(target: Target, data: Path) -> None:
    config = stages_config(data, "drafter")
    weight = target.model.get_output_embeddings().weight  # type: ignore[no-untyped-call]
    grouping = make_grouping("kmeans", 8, 1, torch.arange(259), weight=weight)  # which 8 does not divide
    drafter = new_drafter(target, "random", 0)
    trainer = RouterTrainer(config, target, Answers.read(data), ALONE, drafter, grouping)
    features = torch.randn(70, 32)  # more than a chunk
    masses, groups = trainer.masses(features)
    probabilities = (features @ weight.T).softmax(-1)
    wanted = torch.zeros(70, 8).index_add(1, grouping.group_of, probabilities)
    assert torch.allclose(masses, wanted, atol=1e-5)
    assert torch.equal(groups, grouping.group_of[probabilities.argmax(-1)])


def test_a_low_rank_head_gets_better_by_training(target: Target, data: Path) -> None:
    optimizer, low_rank = OptimizerConfig(lr=1e-2), LowRankConfig(rank=4)
    config = stages_config(data, "drafter", noise=0.0, align_steps=1, steps=100, low_rank=low_rank, optimizer=optimizer)
    drafter = telling_drafter(target)
    trainer = LowRankTrainer(config, target, Answers.read(data), ALONE, drafter)
    trainer.step()
    first = trainer.take_metrics()["soft_1"]
    for _ in range(40):
        trainer.step()
    assert trainer.take_metrics()["soft_1"] < 0.9 * first


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"stages": ["router"]}, 'stage "router" needs a drafter'),
        ({"stages": ["drafter", "drafter"]}, "name each once"),
        ({"stages": ["data", "drafter"]}, "give either prompts"),
        ({"stages": ["teacher"]}, "teacher"),
        ({"drafter": "somewhere"}, "drafter is given"),
        ({"router.active": 125}, "router.active is 125, but 128 groups, 4 of them always read, leave 124"),
        ({"router.always": 128}, "router.always is 128"),
        ({"csra.weight": float("nan")}, "csra.weight is nan"),
        ({"noise": float("inf")}, "noise is inf"),
        ({"align_steps": 1, "csra.weight": 1.0}, 'csra.anchor = "target"'),
        ({"low_rank.rank": -1}, "low_rank.rank is -1"),
    ],
)
def test_settings_that_do_not_go_together_are_named(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as refused:
        load_config(TrainConfig, None, wrong)
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_missing_inputs_are_told_before_a_model_is_loaded(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no drafter's folder"):
        require_inputs(stages_config(data, "router", drafter=tmp_path))
    with pytest.raises(UsageError, match=r"none\.jsonl"):
        require_inputs(stages_config(data, "data", answers=AnswersConfig(prompts=tmp_path / "none.jsonl")))


def test_too_few_prompts_are_told_before_they_are_answered(data: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    config = stages_config(data, "data", "drafter", answers=AnswersConfig(prompts=prompts))
    with pytest.raises(UsageError, match=f"2 prompts, {config.evaluation.prompts} of them held out"):
        require_inputs(config)


@pytest.mark.parametrize(
    ("cap", "changes", "said"),
    [
        (30.0, {}, "changes its logits"),
        (None, {"router": replace(ROUTER, groups=300)}, "300 groups of 259 head rows"),
        (None, {"low_rank": LowRankConfig(rank=33)}, "low_rank.rank is 33, but the head is 32 wide"),
    ],
)
def test_what_the_target_does_not_allow_is_told_before_any_stage(
    cap: float | None, changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    target = tiny_target("gemma3")
    target.model.config.final_logit_softcapping = cap
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "one"}\n')
    answers = AnswersConfig(prompts=prompts)
    config = stages_config(tmp_path / "answers", "data", "drafter", "router", "low-rank", answers=answers, **changes)
    with pytest.raises(UsageError, match=said):
        run_stages(config, target, tmp_path / "runs", ALONE)
    assert not (tmp_path / "answers").exists() and not (tmp_path / "runs").exists()


def test_a_stage_can_be_added_to_a_run_that_is_done(target: Target, data: Path, tmp_path: Path) -> None:
    config = stages_config(data, "drafter", steps=2)
    run_stages(config, target, tmp_path, ALONE)
    more = replace(config, stages=("drafter", "router"), router=replace(ROUTER, active=3))
    assert list(run_stages(more, target, tmp_path, ALONE, resume=True)) == ["drafter", "router"]
    assert Routing.load(tmp_path / "run" / "drafter", target, 259, 32).active == 3


def test_a_drafter_of_another_model_is_refused_and_nothing_is_left(target: Target, data: Path, tmp_path: Path) -> None:
    other = save_drafter(tiny_target(width=64), tmp_path / "other")
    with pytest.raises(UsageError, match="width is 64"):
        run_stages(stages_config(data, "router", drafter=other), target, tmp_path / "runs", ALONE)
    assert not (tmp_path / "runs" / "run").exists()


def test_more_groups_than_rows_are_refused(target: Target, data: Path, tmp_path: Path) -> None:
    there = save_drafter(target, tmp_path / "there")
    config = stages_config(data, "router", drafter=there, router=replace(ROUTER, groups=300))
    with pytest.raises(UsageError, match="300 groups of 259 head rows"):
        run_stages(config, target, tmp_path, ALONE)


def test_a_second_stage_leaves_the_drafters_weights_alone(target: Target, data: Path, tmp_path: Path) -> None:
    there = save_drafter(target, tmp_path / "there")
    config = stages_config(data, "router", drafter=there)
    before = Drafter.load(there, target).state_dict()
    run_stages(config, target, tmp_path, ALONE)
    for name, tensor in Drafter.load(tmp_path / "run" / "drafter", target).state_dict().items():
        assert torch.equal(tensor, before[name])


def test_another_drafter_than_the_one_that_a_run_has_is_refused(target: Target, data: Path, tmp_path: Path) -> None:
    folders = []
    for seed in (0, 1):
        folder = tmp_path / f"drafter-{seed}"
        new_drafter(target, "random", seed).save(folder, model_card="", ranking=torch.arange(256))
        folders.append(folder)
    run_stages(stages_config(data, "low-rank", drafter=folders[0]), target, tmp_path / "runs", ALONE)
    with pytest.raises(UsageError, match="holds another one"):
        run_stages(stages_config(data, "router", drafter=folders[1]), target, tmp_path / "runs", ALONE)
