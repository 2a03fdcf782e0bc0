"""What rounds are expected to accept."""

from __future__ import annotations

import json
import random

import pytest
import torch

from coral_spec.tree import TreeShape
from coral_spec.tuning.acceptance import Acceptance, replay, survival
from drafting import PROMPT, clear_target, drafting_model
from expkit.errors import UsageError

CHAIN, TREE = TreeShape(4, 1, 4), TreeShape(3, 3, 9)


def random_model(tmp_path, tree):
    """A model with a random drafter, whose wide trees are sometimes right."""
    return drafting_model(clear_target("llama"), tmp_path, tree)


@pytest.mark.parametrize("shape", [TreeShape(1, 30, 30), TreeShape(3, 12, 60), CHAIN])
def test_a_replay_accepts_what_the_engine_accepted(shape, tmp_path):
    model = random_model(tmp_path, shape)
    answer = model.generate(PROMPT, max_new_tokens=60, ignore_eos=True)
    text = [*PROMPT, *answer.token_ids]
    with torch.inference_mode():
        _, features = model.with_draft("none").session(len(text)).prefill(text)
    found = replay(model.session(1).draft, features, text, len(PROMPT))
    assert len(found) > 10
    assert found == answer.statistics.accept_lengths[: len(found)]


def test_expected_tau_is_that_of_simulated_rounds():
    """Each level is accepted independently with its own rate."""
    rates, dice = [0.8, 0.5, 0.6, 0.3], random.Random(0)
    rounds = []
    for _ in range(20_000):
        length = 0
        while length < 4 and dice.random() < rates[length]:
            length += 1
        rounds.append(length)
    shares = [0.8, 0.8 * 0.5, 0.8 * 0.5 * 0.6, 0.8 * 0.5 * 0.6 * 0.3]
    acceptance = Acceptance({CHAIN: shares})
    assert acceptance.tau(CHAIN) == pytest.approx(1 + sum(rounds) / len(rounds), rel=0.01)
    assert survival(rounds, 4) == pytest.approx(shares, abs=0.02)


def test_hardness_raises_every_rate_to_its_power():
    rates, hardness = [0.8, 0.5, 0.6], 1.7
    shares = [rates[0], rates[0] * rates[1], rates[0] * rates[1] * rates[2]]
    harder = [rate**hardness for rate in rates]
    wanted = 1 + harder[0] * (1 + harder[1] * (1 + harder[2]))
    assert Acceptance({TREE: shares}).tau(TREE, hardness) == pytest.approx(wanted)


@pytest.mark.parametrize("hardness", [0.3, 1.0, 4.0])
def test_hardness_is_found_from_tau(hardness):
    acceptance = Acceptance({TREE: [0.7, 0.4, 0.2]})
    assert acceptance.hardness(TREE, acceptance.tau(TREE, hardness)) == pytest.approx(hardness, rel=1e-4)


def test_plain_decoding_gives_one_token():
    assert Acceptance({}).tau(None) == 1.0


def test_the_profile_of_the_nearest_head_is_taken(tmp_path):
    path = tmp_path / "acceptance.json"
    path.write_text(
        '{"profiles": [{"rows": 8000, "survival": {"1,1,1": [0.4]}}, {"rows": 50000, "survival": {"1,1,1": [0.6]}}]}'
    )
    shape = TreeShape(1, 1, 1)
    assert Acceptance.load(path, 4000).tau(shape) == 1.4
    assert Acceptance.load(path, 128_000).tau(shape) == 1.6
    other = TreeShape(1, 2, 2)  # known for one of them only
    profiles = json.loads(path.read_text())["profiles"]
    profiles[1]["survival"][str(other)] = [0.3]
    path.write_text(json.dumps({"profiles": profiles}))
    assert {Acceptance.load(path, rows).tau(other) for rows in (4000, 128_000)} == {1.3}


@pytest.mark.parametrize(
    "text", ["", "{}", '{"profiles": [{"rows": 1, "survival": {"big": [1]}}]}', '{"profiles": []}']
)
def test_a_damaged_profile_is_refused(text, tmp_path):
    path = tmp_path / "acceptance.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"acceptance\.json"):
        Acceptance.load(path, 8192)
