"""The command `eval` from end to end: acceptance of drafters by head, on a tiny model in a folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from coral_spec.bench import acceptance
from coral_spec.bench.runner import Bench
from coral_spec.bench.summary import looped
from coral_spec.commands import eval as command
from coral_spec.grouping import make_grouping
from coral_spec.router import Router, Routing
from drafting import save_drafter
from expkit.errors import UsageError
from tiny import tiny_target

EVIDENCE = {"command", "seed", "versions", "hardware", "git", "started"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tiny")
    target = tiny_target()
    target.model.save_pretrained(path)
    target.tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def drafter(tmp_path_factory: pytest.TempPathFactory) -> str:
    target = tiny_target()
    folder = save_drafter(target, tmp_path_factory.mktemp("run") / "drafter")
    grouping = make_grouping("contiguous", 8, 1, torch.arange(259))
    Routing(Router(32, 8), grouping, 3, "hierarchical").save(folder, target.tokenizer_hash)
    return str(folder)


def evaluate(model: str, drafter: str, folder: Path, **changes: object) -> dict:
    options = {"limit": 2, "max_new_tokens": 12, "device": "cpu", "dtype": "fp32", "tree": "3,3,8", **changes}
    command.run(model=model, drafters=[drafter], json=folder / "out.json", **options)  # type: ignore[arg-type]
    return json.loads((folder / "out.json").read_text())


def test_every_head_is_evaluated_and_no_speed_is_told(model: str, drafter: str, tmp_path: Path) -> None:
    found = evaluate(model, drafter, tmp_path, head=["full", "routed:2", "128"], plot=tmp_path / "out.png")
    assert EVIDENCE < found.keys()
    assert [run["head"] for run in found["runs"]] == ["full", "routed:2", "128"]
    assert [run["rows_per_round"] for run in found["runs"]] == [3 * 259, 3 * (3 * 33 + 42), 3 * 128]  # 42: the router
    full, routed, _ = found["runs"]
    assert full["router_recall"] is None and 0 <= routed["router_recall"] <= 1
    assert full["tau"] >= 1 and full["depth_acceptance"] and 0 <= full["looped"] <= 1
    assert not {"tokens_per_second", "speedup", "seconds", "time_split"} & full.keys()
    assert full["method"] == Path(drafter).parent.name  # of the run, whose folder is always called drafter
    assert {path.name for path in tmp_path.iterdir()} == {"out.json", "out.png"}


def test_a_killed_evaluation_goes_on(model: str, drafter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, asked = Bench.measure, []

    def counted(self: Bench, *arguments: object, **options: object) -> object:
        asked.append(self.settings.head)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return original(self, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(acceptance.Bench, "measure", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, drafter, tmp_path, head=["full", "routed"])
    assert {path.name for path in tmp_path.iterdir()} == {"out-full.partial.jsonl", "out-routed.partial.jsonl"}
    found = evaluate(model, drafter, tmp_path, head=["full", "routed"])
    assert asked == ["full", "full", "routed", "routed", "routed"]
    (tmp_path / "whole").mkdir()
    whole = evaluate(model, drafter, tmp_path / "whole", head=["full", "routed"])
    assert found["runs"] == whole["runs"]


@pytest.mark.slow
def test_workers_find_the_same(model: str, drafter: str, tmp_path: Path) -> None:
    alone = evaluate(model, drafter, tmp_path, head=["routed"])
    together = evaluate(model, drafter, tmp_path, head=["routed"], workers=2)
    assert alone["runs"] == together["runs"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"head": ["routed:x"]}, "head is 'routed:x'"),
        ({"tree": "auto"}, "DEPTH,WIDTH,BUDGET"),
        ({"workers": 0}, "workers is 0"),
        ({"tasks": "poems"}, "poems"),
        ({"plot": Path("out.gif")}, "ends in .png"),
    ],
)
def test_wrong_use_is_told_before_anything_is_loaded(
    drafter: str, tmp_path: Path, wrong: dict[str, object], said: str
) -> None:
    with pytest.raises(UsageError) as refused:
        evaluate("no-such-model-anywhere/at-all", drafter, tmp_path, **wrong)
    assert said in str(refused.value)


def test_an_answer_that_goes_round_in_circles_is_seen() -> None:
    assert looped([1, 2, 3, 9, 8, 9, 8, 9, 8]) and looped([5, 5, 5])
    assert not looped([9, 8, 9, 8, 9]) and not looped([5, 5]) and not looped([])
    assert looped(list(range(32)) * 3) and not looped(list(range(33)) * 3)
