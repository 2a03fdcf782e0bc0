"""The study's tables: methods in one, rows that are parts of longer runs, and what was aimed at."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import study_jobs as study
import study_tables as tables


def test_the_ablations_full_row_is_the_long_run_after_its_rounds_and_clean_images_are_no_corruption():
    history = [{"round": number, "last": {"average": number / 100}} for number in range(21)]
    made = tables.after_round({"name": "pden-paper-seed1", "seed": 1, "history": history}, 10)
    assert made["name"] == "full-seed1" and made["selections"] == {"last": {"average": 0.1, "round": 10}}
    targets = {"cifar10-test": 0.9, "C fog/4": 0.8, "C snow/4": 0.6, "C fog/5": 0.5, "C snow/5": 0.7}
    found = {"name": "erm-seed0", "selections": {"last": {"targets": targets, "average": 0.7}}}
    last = tables.hardest(found)["selections"]["last"]
    assert last == {"targets": {"C fog/5": 0.5, "C snow/5": 0.7}, "average": pytest.approx(0.6)}
    (row,) = tables.by_level([found]).values()
    expected = {"cifar10-test": 0.9, "level 4": 0.7, "level 5": 0.6, "average": 0.65}
    assert {name: mean for name, (mean, _) in row.items()} == pytest.approx(expected)


def test_the_report_has_all_methods_in_one_table_and_says_what_was_met(tmp_path, capsys):
    out, to = tmp_path / "out", tmp_path / "results"
    to.mkdir()
    for job in [*study.jobs_of("baselines")[-5:], *study.jobs_of("paper"), *study.jobs_of("ours")]:
        share = {"erm": 0.55, "pden-paper": 0.82, "pden-ours": 0.83}[job.label]
        figures = {"validation": 0.9, "average": share, "targets": {"usps": share, "mnist-m": share}, "round": 20}
        found = {"name": job.name, "method": "pden", "seed": job.seed, "hardware": {"gpu": ["H100"]}, "seconds": 540.0}
        found |= {
            "reserved_memory_bytes": 1.5e9,
            "gate_share": 0.02,
            "selections": {"last": figures, "averaged": figures},
        }
        command = (
            "python -m pden train --config /there/packages/pden/configs/a.toml --runs /w/paper --data-dir /d --set b=1"
        )
        found["command"] = command
        rest = ("versions", "git", "started", "domains", "history", "reports", "notes", "steps", "config")
        file = out / job.part / job.name / "result.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps({**dict.fromkeys(rest), **found}))
    (out / "chosen.json").write_text(json.dumps({"command": "study.py run --work /dev/w --out /o --to /t"}))
    tables.report(out, to)
    aims = json.loads((to / "digits.json").read_text())["aims"]
    assert "the paper's settings, mnist-m, last (%): 82.00, aimed at >= 80: met" in aims
    assert "ours, mnist-m, averaged (%): 83.00, aimed at >= 84: missed" in aims
    assert any(line.startswith("ours, averaged, above the best baseline") and ": 28.00" in line for line in aims)
    assert any("(minutes): 9.00, aimed at <= 8: missed" in line for line in aims)
    published = json.loads((to / "paper.json").read_text())["runs"]
    assert {each["command"] for each in published} == {
        "python -m pden train --config packages/pden/configs/a.toml --runs WORK --data-dir DATA --set b=1"
    }
    again = tmp_path / "again"
    assert tables.restore(to, again) == 15 and tables.restore(to, again) == 0
    one = again / "paper" / "pden-paper-seed1" / "result.json"
    one.write_text(json.dumps({**json.loads(one.read_text()), "seconds": 1.0}))
    tables.restore(to, again)
    assert json.loads(one.read_text())["seconds"] == 1.0  # what is there is newer
    # A report of fewer trainings takes none out of what was published.
    tables.report(tmp_path / "empty", to)
    assert len(json.loads((to / "paper.json").read_text())["runs"]) == 5
    assert json.loads((again / "chosen.json").read_text()) == json.loads((to / "chosen.json").read_text())
    assert json.loads((to / "chosen.json").read_text())["command"] == "study.py run --work WORK --out OUT --to RESULTS"
    tables.report(again, tmp_path / "more")
    assert (
        json.loads((tmp_path / "more" / "digits.json").read_text())["selections"]
        == json.loads((to / "digits.json").read_text())["selections"]
    )
    text = (to / "digits-averaged.md").read_text()
    assert all(label in text for label in ("erm", "pden-paper", "pden-ours")) and (to / "digits.png").is_file()
