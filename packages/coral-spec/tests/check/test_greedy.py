"""The greedy check passes the engine as it is, and names planted errors."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from coral_spec import engine, layers, masks, tree
from coral_spec.answer import Generation
from coral_spec.check.greedy import GreedyReport, check_greedy
from coral_spec.check.report import in_fp32
from coral_spec.model import Model, load
from coral_spec.tree import Acceptance, Tree
from drafting import OracleDraft, drafting_model
from tiny import tiny_target

PROMPTS = [list(range(20, 40)), list(range(100, 112))]
TOKENS = 40


def oracle_check(model: Model, prompt: list[int]) -> GreedyReport:
    """Check one prompt with a draft that knows the right answer, among wrong siblings."""
    plain = model.with_draft("none")
    text = prompt + plain.generate(prompt, max_new_tokens=TOKENS, ignore_eos=True).token_ids
    model._make_draft = lambda _: OracleDraft(text, 4)
    return check_greedy(model, model.target.model, [prompt], max_new_tokens=TOKENS)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_right_engine_is_exact_in_fp32(architecture: str, tmp_path: Path) -> None:
    model = drafting_model(tiny_target(architecture), tmp_path / "drafter")
    report = check_greedy(model, model.target.model, PROMPTS, max_new_tokens=TOKENS)
    assert report.identical in ("exact", "ties") and report.passed
    assert report.distance < 1e-3
    assert 0 < report.rounds < report.tokens <= 2 * TOKENS


def test_a_right_engine_that_accepts_much_passes_in_fp32_and_in_bf16() -> None:
    model = load(tiny_target(), draft="ngram")
    report = oracle_check(model, PROMPTS[0])
    assert report.passed and report.rounds < TOKENS / 2

    half = load(tiny_target(dtype=torch.bfloat16), draft="ngram")
    report = check_greedy(half, in_fp32(half).target.model, PROMPTS, max_new_tokens=TOKENS)
    assert report.passed and report.dtype == "bfloat16"
    assert 0 < report.noise and 0 < report.baseline_distance


def test_a_mask_that_leaks_one_sibling_is_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaking(ancestors: Tensor, lengths: Tensor, keys: int) -> Tensor:
        ancestors = ancestors.clone()
        if ancestors.shape[1] > 2:
            ancestors[:, 2, 1] = True  # the second child of the root sees the first
        return masks.visibility(ancestors, lengths, keys)

    monkeypatch.setattr(layers, "visibility", leaking)
    report = oracle_check(load(tiny_target(), draft="ngram"), PROMPTS[0])
    assert report.identical == "bug"
    assert report.distance > 1e-2


def test_logits_that_rounding_cannot_explain_are_a_bug_though_all_tokens_are_right(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    half = load(tiny_target(dtype=torch.bfloat16), draft="ngram")
    reference = in_fp32(half).target.model
    drafted = half.generate

    def wrong(prompt: list[int], **options: object) -> Generation:
        found = drafted(prompt, **options)  # type: ignore[arg-type]
        if found.logits is not None:
            found.logits[5] += 8 * fine.baseline_distance
        return found

    fine = check_greedy(half, reference, PROMPTS[:1], max_new_tokens=TOKENS)
    monkeypatch.setattr(half, "generate", wrong)
    report = check_greedy(half, reference, PROMPTS[:1], max_new_tokens=TOKENS)
    assert fine.passed and not report.passed
    assert report.judgements[0].forward_distance is not None and report.judgements[0].verdict == "bug"


def test_an_acceptance_that_once_keeps_a_wrong_child_is_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = itertools.count()

    def careless(candidates: Tree, draws: Tensor, depth: int) -> Acceptance:
        if candidates.tokens.shape[1] > 1 and next(calls) == 2:
            draws = draws.clone()
            draws[0, 0] = candidates.tokens[0, 1:4][candidates.tokens[0, 1:4] != draws[0, 0]][0]
        return tree.accept(candidates, draws, depth)

    monkeypatch.setattr(engine, "accept", careless)
    report = oracle_check(load(tiny_target(), draft="ngram"), PROMPTS[0])
    assert report.identical == "bug"
    [judgement] = report.judgements
    assert judgement.gap is not None and judgement.gap > 1e-3
