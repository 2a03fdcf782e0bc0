"""The commands `bench` and `check` from end to end, on a tiny model in a folder."""

from __future__ import annotations

import json
import queue
from pathlib import Path
from types import SimpleNamespace

import pytest

from coral_spec.bench import workers
from coral_spec.bench.records import PartialFile
from coral_spec.bench.runner import Bench, Settings
from coral_spec.bench.runner import run as measure
from coral_spec.bench.tasks import load_task
from coral_spec.bench.workers import run_workers
from coral_spec.commands import bench, check
from expkit.errors import UsageError
from tiny import tiny_target

EVIDENCE = {"command", "seed", "versions", "hardware", "git", "started"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tiny")
    target = tiny_target(vocab=259)
    target.model.save_pretrained(path)
    target.tokenizer.save_pretrained(path)
    return str(path)


def test_bench_writes_figures_and_a_chart_and_leaves_no_partial_file(folder: str, tmp_path: Path) -> None:
    code = bench.run(
        model=folder,
        tasks="sample",
        limit=2,
        methods="hf,ar,ngram",
        max_new_tokens=8,
        device="cpu",
        dtype="fp32",
        json=tmp_path / "out.json",
        plot=tmp_path / "out.png",
    )
    assert code == 0
    figures = json.loads((tmp_path / "out.json").read_text())
    assert EVIDENCE < figures.keys()
    assert [run["method"] for run in figures["runs"]] == ["hf", "ar", "ngram"]
    first = figures["runs"][0]
    assert {"method", "task", "temperature", "tokens_per_second", "tau", "tau_prompts", "speedup", "identical"} < (
        first.keys()
    )
    assert [sum(run["trees"].values()) for run in figures["runs"]] == [0, 0, first["prompts"]]
    assert first["speedup"].keys() == {"ar", "hf"} and first["identical"] in ("exact", "ties")
    assert {path.name for path in tmp_path.iterdir()} == {"out.json", "out.png", "out-drafting.png"}


def test_a_bench_that_is_refused_leaves_nothing_that_hinders_the_next(folder: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no drafter for"):
        bench.run(model=folder, tasks="sample", limit=1, methods="ar,coral", device="cpu", json=tmp_path / "out.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_worker_process_measures_the_same_acceptance(folder: str) -> None:
    settings = Settings(folder, {"ngram": ""}, device="cpu", dtype="fp32", max_new_tokens=8, workers=2)
    tasks = {"sample": load_task("sample", limit=1)}  # one prompt, so one process: each takes long to start
    together, alone = PartialFile(None, {}), PartialFile(None, {})
    run_workers(settings, tasks, together)
    measure(Bench.load(settings), tasks, alone)
    assert together.records.keys() == alone.records.keys()
    for key, record in alone.records.items():
        assert together.records[key].accept_lengths == record.accept_lengths


def test_what_goes_wrong_in_a_worker_is_told_by_the_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: queue.Queue[object] = queue.Queue()
    workers._work(Settings("no/such/model", {"ngram": ""}, device="cpu"), [], frozenset(), 2, answers)
    with pytest.raises(UsageError, match="no/such/model"):
        workers._next(answers, [])
    monkeypatch.setattr(workers, "_POLL_SECONDS", 0.01)
    with pytest.raises(RuntimeError, match="ended with code -9; try fewer --workers"):
        workers._next(answers, [SimpleNamespace(exitcode=-9)])


def test_check_passes_a_right_model_and_writes_its_figures(folder: str, tmp_path: Path) -> None:
    path = tmp_path / "check.json"
    code = check.run(
        model=folder, draft="ngram", limit=1, max_new_tokens=8, device="cpu", dtype="fp32", top_k=4, json=path
    )
    figures = json.loads(path.read_text())
    assert code == 0 and figures["passed"] is True
    assert figures.keys() > EVIDENCE
    assert [level["token"] for level in figures["sampled"]["levels"]] == [2, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": "mmlu"}, "unknown task 'mmlu'"),
        ({"methods": "warp"}, "unknown method 'warp'"),
        ({"limit": -1}, "limit is -1"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"prompts": Path("nowhere.jsonl")}, "no such file: nowhere.jsonl"),
        ({"json": Path("no/folder/x.json")}, "there is no folder"),
        ({"json": Path("/proc/x.json")}, "cannot be written"),
        ({"plot": Path("x.pdf")}, "ends in .png"),
    ],
)
def test_wrong_use_of_bench_is_told_before_a_model_is_loaded(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        bench.run(model="no/such/model", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draws": 100}, "draws is 100, needed at least 2000"),
        ({"temperature": 0.0}, "temperature is 0.0, needed above 0"),
        ({"draft": "none"}, "draft is 'none'"),
        ({"limit": 0}, "limit is 0"),
        ({"prompts": Path("nowhere.jsonl")}, "no such file"),
    ],
)
def test_wrong_use_of_check_is_told_before_a_model_is_loaded(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check.run(model="no/such/model", **options)  # type: ignore[arg-type]
