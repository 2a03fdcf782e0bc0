"""Every command of the study is one that the command line takes, before a GPU is spent on it."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from coral_spec.bench.methods import parse_methods
from coral_spec.heads.choose import HeadChoice
from coral_spec.training.config import TrainConfig
from expkit.config import load_config, parse_setting


def load_study() -> ModuleType:
    """Under a name of its own: other packages have studies too."""
    path = Path(__file__).parents[1] / "benchmarks" / "study.py"
    spec = importlib.util.spec_from_file_location("coral_spec_study", path)
    assert spec is not None and spec.loader is not None
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def values(options: list[str], name: str) -> list[str]:
    return [options[at + 1] for at, each in enumerate(options) if each == name]


def made(work: Path, gpus: tuple[str, ...] = ("0",), prompts: Path | None = None) -> Any:
    """The study in a folder."""
    module = load_study()
    return module.Study(module.Plan(work, prompts), gpus)


@pytest.fixture
def commands(tmp_path: Path) -> list[list[str]]:
    found = [list(job.options) for job in made(tmp_path, prompts=tmp_path / "prompts.jsonl").all]
    for options in found:
        for each in [*values(options, "--draft"), *",".join(values(options, "--methods")).split(",")]:
            if "=" in each:
                Path(each.partition("=")[2]).mkdir(parents=True, exist_ok=True)
    return found


def test_methods_and_heads_are_known(commands: list[list[str]]) -> None:
    measured = [options for options in commands if options[0] in ("eval", "bench")]
    assert len(measured) > 20
    for options in measured:
        assert parse_methods(",".join(values(options, "--draft") or values(options, "--methods")))
        for head in values(options, "--head"):
            HeadChoice.parse(head)


def test_settings_of_trainings_are_known(commands: list[list[str]]) -> None:
    trainings = [options for options in commands if options[0] == "train"]
    assert len(trainings) > 30
    for options in trainings:
        settings = dict(parse_setting(each) for each in values(options, "--set"))
        drafter = next(map(Path, values(options, "--drafter")), None)
        flags = {"stages": values(options, "--stages")[0].split(","), "drafter": drafter}
        load_config(TrainConfig, Path(values(options, "--config")[0]), {**settings, **flags})


def test_what_was_measured_does_not_follow_the_presets_weight(tmp_path: Path) -> None:
    jobs = {job.out: values(job.options, "--set") for job in made(tmp_path).all}
    for name in ("csra-0/result.json", "bundled-0/router/result.json", "sweep-pool-sequence/result.json"):
        weights = [each for each in jobs[f"runs/smollm2-{name}"] if each.startswith("csra.weight=")]
        assert weights == ["csra.weight=3.0"], name


def test_nothing_that_a_command_names_is_missing_and_all_leave_different_files(tmp_path: Path) -> None:
    study = made(tmp_path)
    assert len({job.out for job in study.all}) == len(study.all) > 100
    kept = {f"keep/{name}" for job in study.all for name in job.keep.values()}
    for job in study.all:
        asked = {name for name in job.names(tmp_path) if name.startswith("keep/") and name not in job.makes()}
        answers = {name for name in asked if name.startswith("keep/answers")}
        assert asked - answers <= kept, job.out
        assert len(study.needs[job]) == len(asked), job.out


def test_evaluations_wait_for_trainings_and_these_for_answers(tmp_path: Path) -> None:
    study = made(tmp_path)
    jobs = {job.out: job for job in study.all}
    first = jobs["runs/smollm2-hass-0/result.json"]
    assert [each.out for each in study.lacks(first)] == [f"keep/answers/smollm2-t0{n}/complete" for n in (0, 8)]
    speed = jobs["results/smollm2-speed-t1-full.json"]
    recipes = [f"runs/smollm2-{recipe}-0/result.json" for recipe in ("csra", "eagle2")]
    assert [each.out for each in study.lacks(speed)] == recipes
    (tmp_path / "keep/drafters/smollm2-eagle2-0").mkdir(parents=True)  # from elsewhere
    assert [each.out for each in study.lacks(speed)] == recipes[:1]


def test_a_training_of_an_earlier_lease_needs_no_run_here(tmp_path: Path) -> None:
    study = made(tmp_path)
    jobs = study.chosen((), ["runs/smollm2-lowrank*", "runs/smollm2-coral*"])
    assert len(jobs) == 3
    for job in jobs:
        kept = tmp_path / "results/training" / Path(job.out).relative_to("runs")
        kept.parent.mkdir(parents=True)
        kept.touch()
    assert study.run(jobs, ends=0.0)
    assert not (tmp_path / "runs").exists() and not (tmp_path / "logs").exists()


def test_nothing_is_begun_that_would_not_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = made(tmp_path)
    jobs = study.chosen(["smollm2-data", "smollm2-seed0"])
    assert not study.run(jobs, ends=0.0)
    out = capsys.readouterr().out
    assert out.count("left: ") == len(jobs) == 6
    assert "left: keep/answers/smollm2-t00/complete (3.5 minutes)" in out
    assert "runs/smollm2-hass-0/result.json (needs keep/answers/smollm2-t00/complete, keep/answers/smollm2-t08" in out
    assert not (tmp_path / "logs").exists()


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands in for a command: notes its arguments, fails where it is told to, leaves its file and then works on."""
    file = tmp_path / "python"
    file.write_text(
        f'#!/bin/sh\necho "$CUDA_VISIBLE_DEVICES $@" >> {tmp_path}/begun\necho "gpu $CUDA_VISIBLE_DEVICES"\n'
        '[ "$4" = bad ] && exit 3\nfor each; do last=$each; done\n'
        '[ "$last" = --resume ] || { mkdir -p "$(dirname "$last")/drafter"; touch "$last"; }\n'
        f'sleep 0.5\necho "$4 ended" >> {tmp_path}/begun\n'
    )
    file.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(file))
    return file


def study_of(work: Path, jobs: list[tuple[str, str, float, tuple[str, ...]]], gpus: tuple[str, ...]) -> Any:
    """Jobs of a name, a file, minutes, and the folders below WORK that they name; runs have a drafter to be kept."""
    module = load_study()
    found = []
    for name, out, minutes, named in jobs:
        keep = {f"{Path(out).parent}/drafter": f"drafters/{name}"} if out.startswith("runs/") else {}
        kind = "train" if keep else "eval"
        options = (kind, name, *(str(work / each) for each in named), "--name", name, str(work / out))
        found.append(module.Job("lease", out, options, minutes, keep))
    plan = module.Plan(work, None)
    plan.jobs = lambda: found
    return module.Study(plan, gpus)


def events(work: Path) -> list[list[str]]:
    """Lines of GPU and arguments of what begins, and of what has ended."""
    return [line.split() for line in (work / "begun").read_text().splitlines()]


@pytest.mark.usefixtures("python")
def test_what_most_waits_for_begins_first_and_each_has_a_gpu_for_itself(tmp_path: Path) -> None:
    jobs = [
        ("short", "a/1", 1.0, ()),
        ("before", "b/1", 1.0, ()),
        ("long", "c/1", 2.0, ()),
        ("after", "d/1", 5.0, ("b",)),
    ]
    study = study_of(tmp_path, jobs, ("5", "7"))
    assert study.run(study.all, time.monotonic() + 600)
    begun = [line for line in events(tmp_path) if line[-1] != "ended"]
    assert {each[4] for each in begun[:2]} == {"before", "long"} and {each[0] for each in begun[:2]} == {"5", "7"}
    assert {each[4] for each in begun[2:]} == {"after", "short"}


@pytest.mark.usefixtures("python")
def test_what_has_left_its_file_and_runs_on_is_waited_for(tmp_path: Path) -> None:
    jobs = [("drafter", "runs/drafter/result.json", 1.0, ()), ("after", "b/1", 1.0, ("keep/drafters/drafter",))]
    study = study_of(tmp_path, jobs, ("5", "7"))
    assert study.run(study.all, time.monotonic() + 600)
    assert [line[0] if line[-1] == "ended" else line[4] for line in events(tmp_path)] == [
        *("drafter", "drafter", "after", "after"),
    ]
    assert (tmp_path / "keep/drafters/drafter").is_dir()


@pytest.mark.usefixtures("python")
def test_a_run_that_was_killed_goes_on_and_a_drafter_from_elsewhere_stays(tmp_path: Path) -> None:
    jobs = [("killed", "runs/killed/result.json", 1.0, ()), ("after", "b/1", 1.0, ("keep/drafters/other",))]
    study = study_of(tmp_path, [*jobs, ("other", "runs/other/result.json", 1.0, ())], ("5",))
    (tmp_path / "runs/killed/checkpoints").mkdir(parents=True)
    (tmp_path / "keep/drafters/other").mkdir(parents=True)
    (tmp_path / "keep/drafters/other/mine").touch()
    assert study.run(study.all[:2], time.monotonic() + 600)
    begun = {line[4]: line for line in events(tmp_path) if line[-1] != "ended"}
    assert begun["killed"][-1] == "--resume" and set(begun) == {"killed", "after"}
    (tmp_path / "runs/other/drafter").mkdir(parents=True)
    (tmp_path / "runs/other/result.json").touch()
    assert study.run(study.all[2:], time.monotonic() + 600)
    assert (tmp_path / "keep/drafters/other/mine").exists()


def test_an_old_folder_of_results_without_its_drafters_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = [("drafter", "runs/drafter/result.json", 1.0, ()), ("after", "b/1", 1.0, ("keep/drafters/drafter",))]
    study = study_of(tmp_path, jobs, ("5",))
    (tmp_path / "results/training/drafter").mkdir(parents=True)
    (tmp_path / "results/training/drafter/result.json").touch()
    assert not study.run(study.all, time.monotonic() + 600)
    assert "left: b/1 (needs runs/drafter/result.json)" in capsys.readouterr().out


@pytest.mark.usefixtures("python")
def test_a_job_that_fails_is_told_and_keeps_back_only_what_waits_for_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = [("bad", "a/1", 1.0, ()), ("never", "b/1", 1.0, ("a",)), ("good", "c/1", 1.0, ())]
    study = study_of(tmp_path, jobs, ("5",))
    assert not study.run(study.all, time.monotonic() + 600)
    out = capsys.readouterr().out
    assert "a_1.log: exit code 3\ngpu 5" in out and "left: b/1 (needs a/1)" in out and "done: c/1" in out
    assert "never" not in (tmp_path / "begun").read_text()


def test_only_what_the_host_bounds_has_the_machine_for_itself(tmp_path: Path) -> None:
    alone = {job.out for job in made(tmp_path).all if job.alone}
    assert {"results/smollm2-speed-full.json", "results/gemma3-speed-full.json"} <= alone
    assert len([out for out in alone if "-cpu-" in out]) == len(alone) - 2 == 36


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--lease", "smollm2-dat"], "there is no 'smollm2-dat'"),
        (["--only", "results/nothing-*"], "nothing leaves 'results/nothing-*'"),
        ([], "nothing is asked for"),
        (["--lease", "smollm2-data"], "answers need --prompts"),
        (["--gpus", "99", "--plan"], "99 GPUs"),
    ],
)
def test_what_cannot_be_done_is_told(
    options: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(sys, "argv", ["study.py", "--work", str(tmp_path), *options])
    with pytest.raises(SystemExit) as ended:
        load_study().main()
    assert ended.value.code == 2 and told in capsys.readouterr().err


def test_the_report_pairs_heads_of_equal_weights_and_keeps_what_an_earlier_one_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    import study_report

    taus = {"full": [4.0, 5.0, 3.0], "routed:4": [3.9, 4.8, 3.0], "640": [3.7, 4.7, 3.1], "900": [3.8, 4.8, 3.1]}
    rows = {"full": 9000.0, "routed:4": 640.0, "640": 640.0, "900": 900.0}
    same = {"router_recall": None, "tau": 4.0}
    runs = [
        {
            "task": task,
            "head": head,
            "rows_per_round": rows[head],
            "prompt_records": [{"prompt": str(at), "tau": x + y} for at, x in enumerate(each)],
            **same,
        }
        for task, y in (("a", 0.0), ("b", 1.0))
        for head, each in taus.items()
    ]
    (tmp_path / "smollm2-heads.json").write_text(json.dumps({"runs": runs}))
    low = [
        {**run, "head": "low-rank", "method": "rank8", "rows_per_round": 637.0} for run in runs if run["head"] == "900"
    ]
    (tmp_path / "smollm2-heads-rank8.json").write_text(json.dumps({"runs": low}))
    found = study_report.head_differences(tmp_path, "smollm2")["differences"]
    own = {"routed:4 - full", "640 - full", "900 - full", "rank8 - full"}
    assert set(found) == {"routed:4 - 640", "routed:4 - rank8", *own}
    assert found["routed:4 - rank8"]["mean"] == pytest.approx(0)
    assert found["routed:4 - 640"]["mean"] == pytest.approx((0.2 + 0.1 - 0.1) / 3)
    low, high = found["routed:4 - 640"]["interval_95_prompts"]
    assert -0.1 <= low < found["routed:4 - 640"]["mean"] < high <= 0.2
    assert study_report.weights_on_equal_answers(tmp_path, "smollm2") is None  # not all of its files are there
    for name, methods in (
        ("heads", ("csra+router",)),
        ("weight1-seed0-t0", ("weight1",)),
        ("recipes-seed0-t0", ("csra", "hass")),
    ):
        full = [{**run, "method": method} for run in runs if run["head"] == "full" for method in methods]
        records = [{"prompt": str(at), "tau": 4.5} for at in range(5)]
        own = full if name == "heads" else [{**run, "prompt_records": records} for run in full]
        (tmp_path / f"smollm2-{name}.json").write_text(json.dumps({"runs": own}))
    weights = study_report.weights_on_equal_answers(tmp_path, "smollm2")["differences"]
    assert weights["weight1 - csra again"]["mean"] == pytest.approx(0)  # 4.5 is the mean over both sets' first three
    assert weights["csra again - hass"]["mean"] == pytest.approx(0)
    for path in tmp_path.glob("smollm2-*-seed0-t0.json"):
        path.unlink()
    with pytest.raises(ValueError, match="a was not measured on the same prompts everywhere"):
        study_report.require_same_prompts([*runs, {**runs[0], "prompt_records": runs[0]["prompt_records"][:2]}])
    before = {"trainings": {"smollm2-hass-0": {"tau_sim": 3.0}, "smollm2-eagle2-0": {"tau_sim": 2.5}}}
    (tmp_path / "before.json").write_text(json.dumps(before))
    out = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path), "--json", str(out), "--before", str(tmp_path / "before.json")])
    study_report.main()
    report = json.loads(out.read_text())
    assert report["trainings"] == before["trainings"]
    assert report["smollm2"]["simulated"]["hass - eagle2"]["mean"] == pytest.approx(0.5)
