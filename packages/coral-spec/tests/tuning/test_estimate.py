"""`coral-spec estimate`: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json

import pytest

from coral_spec.cli import build
from coral_spec.commands.estimate import verdict
from coral_spec.model import acceptance_profile
from coral_spec.tuning.costs import StepCosts
from coral_spec.tuning.estimate import REFERENCE, Estimate, HeadEstimate
from expkit.cli import main
from tiny import tiny_target


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(build(), ["estimate", *arguments])
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def planted(verify: dict[int, float], level: dict[int, float]) -> Estimate:
    costs = StepCosts(10.0, verify, level)
    return Estimate({"full": HeadEstimate(49152, {}, costs, acceptance_profile(None, 49152))})


def test_it_prints_costs_gains_and_one_sentence_and_writes_the_same_figures(tmp_path, capsys):
    target = tiny_target()
    target.model.save_pretrained(tmp_path / "model")
    target.tokenizer.save_pretrained(tmp_path / "model")
    out = tmp_path / "out.json"
    assert run("--model", str(tmp_path / "model"), "--rows", "128", "--json", str(out)) == 0
    shown = capsys.readouterr().out
    record = json.loads(out.read_text())
    assert {"command", "versions", "hardware", "git", "started"} < record.keys()
    assert [row["tau"] for row in record["gains"]] == [1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0]
    assert set(record["milliseconds"]) == {"full", "reduced"}
    assert record["milliseconds"]["reduced"]["rows"] == 128
    assert f"{record['gains'][-1]['full']['speedup']:.2f}x" in shown
    assert "pay" in shown.splitlines()[-1] or "pay" in shown.splitlines()[-2]


def test_more_tau_never_means_less_speed():
    gains = [planted({2: 11.0, 4: 12.0, 61: 40.0}, {1: 1.0, 10: 2.0}).gain(tau) for tau in (1.5, 2.5, 3.5, 4.5)]
    assert gains == sorted(gains)


def test_the_reference_tree_gets_the_tau_of_the_row():
    found = planted({2: 10.0, 61: 10.0}, {1: 0.0, 10: 0.0})
    hardness = found.hardness(3.0)
    assert found.heads["full"].acceptance.tau(REFERENCE, hardness) == pytest.approx(3.0, abs=1e-3)


def test_it_says_plainly_when_a_drafter_will_not_pay():
    found = planted({2: 60.0, 61: 900.0}, {1: 30.0, 10: 90.0})
    assert found.break_even() is None
    assert verdict(found, None).startswith("It will not pay here")


def test_it_says_from_where_on_a_drafter_pays():
    found = planted({2: 11.0, 4: 12.0, 61: 40.0}, {1: 1.0, 10: 2.0})
    least = found.break_even()
    assert least is not None and found.gain(least) > 1.0 >= found.gain(least - 0.05)
    assert f"from {least:.2f} tokens per round" in verdict(found, None)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rows", "8"], "rows is 8"),
        (["--model", "no/such/folder/at/all"], "no/such/folder/at/all"),
        (["--json", "no/such/folder/out.json"], "no folder"),
        (["--dtype", "int3"], "int3"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(arguments, said, capsys):
    assert run(*arguments) == 2
    message = capsys.readouterr().err.strip()
    assert said in message and message.count("\n") == 0
