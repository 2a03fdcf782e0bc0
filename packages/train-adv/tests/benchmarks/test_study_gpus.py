"""The study on several GPUs: one arm at a time on each, sweeps first; neither a cut nor a failure loses the rest."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

# What stands for an arm: it says where it is, makes its run's folder, takes its time, fails where it is told to.
ARM = """
import argparse, json, os, sys, time
from pathlib import Path
import study_gpus

study_gpus.end_with_parent()
parser = argparse.ArgumentParser()
for name in ("out", "work", "only", "seeds", "gpus", "end", "seconds", "failing"):
    parser.add_argument(f"--{name}")
given = parser.parse_args()
name = f"{given.only}-{given.seeds}"
events = Path(given.out) / "events"
events.mkdir(parents=True, exist_ok=True)
event = vars(given) | {"gpu": os.environ["CUDA_VISIBLE_DEVICES"], "pid": os.getpid(), "began": time.time()}
(Path(given.work) / name).mkdir(exist_ok=True)
(events / f"{time.time_ns()}.json").write_text(json.dumps(event))
time.sleep(float(given.seconds))
if name == given.failing:
    sys.exit("the loss is no number")
text = json.dumps({"complete": True, "ended": time.time()})
temporary = Path(given.out) / f"tmp-{os.getpid()}"
temporary.write_text(text)
temporary.rename(Path(given.out) / f"{name}.json")
"""

# What stands for the call that is killed.
CALL = """
import sys, time
from pathlib import Path
from study_arms import Arm, Job
from study_gpus import run_on

job = Job(Arm("at", {"host": "at"}), 0, 1.0, "main")
run_on(["5", "7"], sys.argv[2:], Path(sys.argv[1]), time.time() + 9999, lambda: [job])
"""


@pytest.fixture
def modules(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import study_arms
    import study_gpus

    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS))  # for the arms
    monkeypatch.setattr(study_gpus, "POLL", 0.02)
    return study_arms, study_gpus


def command(folder: Path, seconds: float, failing: str = "") -> list[str]:
    (folder / "arm.py").write_text(ARM)
    options = ["--out", str(folder / "out"), "--seconds", str(seconds), "--failing", failing]
    return [sys.executable, str(folder / "arm.py"), *options]


def run(modules, folder: Path, wanted: dict[str, str], minutes: float = 99.0, failing: str = "") -> list[str]:
    """Do arms of a minute on paper (name: part) on GPUs 5 and 7."""
    arms, gpus = modules

    def left():
        made = [arms.Job(arms.Arm(name, {"host": "at"}), 0, 60.0, part) for name, part in wanted.items()]
        return [job for job in made if not arms.is_done(folder / "out", job.arm, 0)]

    end = time.time() + 60 * minutes
    return gpus.run_on(["5", "7"], command(folder, 0.3, failing), folder / "work", end, left)


def events(folder: Path) -> list[dict]:
    """What was begun, in order; `ended` where it came to its figures."""
    found = [json.loads(path.read_text()) for path in sorted((folder / "out" / "events").glob("*.json"))]
    for event in found:
        path = folder / "out" / f"{event['only']}-{event['seeds']}.json"
        event |= json.loads(path.read_text()) if path.is_file() else {}
    return found


def test_every_gpu_has_one_arm_at_a_time_and_a_folder_of_its_own(modules, tmp_path):
    names = ["a", "b", "c", "d", "e"]
    assert run(modules, tmp_path, dict.fromkeys(names, "main")) == []
    found = events(tmp_path)
    assert sorted(event["only"] for event in found) == names and {event["gpus"] for event in found} == {"1"}
    assert {(event["gpu"], Path(event["work"]).name) for event in found} == {("5", "gpu0"), ("7", "gpu1")}
    for gpu in ("5", "7"):
        own = [event for event in found if event["gpu"] == gpu]
        assert all(before["ended"] < after["began"] for before, after in pairwise(own))
    assert found[1]["began"] < found[0]["ended"]  # and the two GPUs work at the same time
    assert len({event["end"] for event in found}) == 1


def test_speeds_are_measured_on_one_gpu(modules, tmp_path):
    wanted = {"a": "speed", "b": "speed", "c": "speed", "d": "lambda"}
    assert run(modules, tmp_path, wanted) == []
    assert {event["only"]: event["gpu"] for event in events(tmp_path)} == {"a": "5", "b": "5", "c": "5", "d": "7"}


def test_what_needs_the_sweeps_waits_for_all_of_them(modules, tmp_path):
    wanted = {"at": "main", "a": "lambda", "speed": "speed", "b": "beta", "c": "lambda", "epsilon": "epsilons"}
    assert run(modules, tmp_path, wanted) == []
    found = {event["only"]: event for event in events(tmp_path)}
    swept = max(found[name]["ended"] for name in "abc")
    assert found["speed"]["began"] < swept < min(found["at"]["began"], found["epsilon"]["began"])


def test_an_arm_that_was_cut_off_goes_back_to_its_gpu(modules, tmp_path):
    (tmp_path / "work" / "gpu1" / "a-0").mkdir(parents=True)
    (tmp_path / "work" / "gpu1" / "b-0").mkdir()
    run(modules, tmp_path, {"a": "main", "b": "main", "c": "main"})
    assert {event["only"]: event["gpu"] for event in events(tmp_path)} == {"a": "7", "b": "7", "c": "5"}


def test_an_arm_that_fails_shows_its_log_and_stops_no_other(modules, tmp_path, capsys):
    assert run(modules, tmp_path, {"a": "main", "b": "main", "c": "main", "d": "main"}, failing="a-0") == ["a-0"]
    assert {event["only"] for event in events(tmp_path) if "ended" in event} == {"b", "c", "d"}
    text = capsys.readouterr().out
    assert "gpu0: a-0 FAILED (exit code 1)" in text and "    the loss is no number" in text
    assert text.count(" begins, ") == 4  # it is not tried again
    assert run(modules, tmp_path, {"a": "main"}) == []


def test_what_needs_a_sweep_that_failed_is_not_begun(modules, tmp_path):
    assert run(modules, tmp_path, {"a": "lambda", "b": "beta", "at": "main"}, failing="a-0") == ["a-0"]
    assert {event["only"] for event in events(tmp_path)} == {"a", "b"}


def test_no_arm_is_begun_that_would_not_end_in_time(modules, tmp_path):
    arms, _ = modules
    minutes = arms.seconds_on(arms.Job(arms.Arm("a", {"host": "at"}), 0, 60.0, "main")) / 60
    assert run(modules, tmp_path, {"a": "main"}, minutes=minutes - 0.01) == []
    assert not (tmp_path / "out").exists()
    (tmp_path / "work" / "gpu1" / "standard-0").mkdir(parents=True)
    (tmp_path / "work" / "gpu1" / "standard-0" / "result.json").touch()  # so that only the first one trains it
    run(modules, tmp_path, {"a": "main"}, minutes=minutes - 0.01)
    assert [event["gpu"] for event in events(tmp_path)] == ["7"]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_arms_end_with_the_call_that_began_them_and_a_repeated_one_goes_on(modules, tmp_path, how):
    (tmp_path / "call.py").write_text(CALL)
    call = [sys.executable, str(tmp_path / "call.py"), str(tmp_path / "work"), *command(tmp_path, 600)]
    parent = subprocess.Popen(call)
    wait_until(lambda: (tmp_path / "out" / "events").is_dir() and events_or_none(tmp_path))
    parent.send_signal(how)
    assert parent.wait(30) == -how
    wait_until(lambda: not alive(events(tmp_path)[0]["pid"]))
    assert run(modules, tmp_path, {"at": "main"}) == []
    first, second = events(tmp_path)
    assert first["work"] == second["work"]


def wait_until(holds) -> None:
    end = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def events_or_none(folder: Path) -> list[dict]:
    try:
        return events(folder)
    except json.JSONDecodeError:  # it is being written
        return []


def alive(pid: int) -> bool:
    """Whether it runs; one that ended may be left as a zombie where nobody asks for it."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_figures_that_another_process_is_writing_are_not_read(modules, tmp_path):
    arms, _ = modules
    (tmp_path / "at-0.json").write_text('{"arm": "at"}')
    (tmp_path / ".tmp-0a1b2c3d-at-1.json").write_text('{"arm": ')
    assert arms.read_results(tmp_path) == [{"arm": "at"}]


def test_shared_leases_fit_hold_every_arm_once_and_have_the_sweeps_first(modules):
    arms, _ = modules
    choice = arms.Choice(0.1, "cosine", 100.0)
    parts = arms.parts(*[choice] * 4)
    jobs = [arms.Job(arm, 0, arms.Costs().of(arm), part) for part, found in parts.items() for arm in found]
    found = list(arms.shared_leases(jobs, 24 * 60, 4))
    done = [job.name for lanes, _ in found for lane in lanes for job in lane]
    assert sorted(done) == sorted(job.name for job in jobs) and len(set(done)) == len(done)
    assert all(length <= 24 * 60 or max(map(len, lanes)) == 1 for lanes, length in found)
    assert all(arms.cost(lane) + arms.WORKER_START * len(lane) <= length + 1e-6 for lanes, length in found
               for lane in lanes if lane)  # fmt: skip
    for stage in (1, 2):
        earlier = [part for part, number in arms.STAGES.items() if number == stage]
        later = [part for part, number in arms.STAGES.items() if number > stage]
        last = max(number for number, (lanes, _) in enumerate(found) if has(lanes, earlier))
        assert last <= min(number for number, (lanes, _) in enumerate(found) if has(lanes, later))
    text = arms.plan(jobs, 24, 4)
    assert f"lease {len(found)}:" in text and "gpu3" in text and "DOES NOT FIT 24 min" in text


def has(lanes, parts) -> bool:
    return any(job.part in parts for lane in lanes for job in lane)
