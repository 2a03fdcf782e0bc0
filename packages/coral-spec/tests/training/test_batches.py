"""Batches: answers only count, every row comes once an epoch, and batch k is always the same."""

from __future__ import annotations

import torch

from coral_spec.training.batches import BatchPlan, group_by_length, make_batch, split_rows
from making_answers import made_rows


def test_rows_are_padded_on_the_right() -> None:
    answers = made_rows([(2, 3, False), (4, 14, False)])
    batch = make_batch(answers, torch.tensor([1, 0]), 64)
    assert batch.tokens.shape == (2, 32)
    assert batch.tokens[1].tolist() == [1, 2, 3, 4, 5, *([0] * 27)]
    assert batch.tokens[0, :18].tolist() == list(range(6, 24))


def test_only_answer_positions_count_and_each_step_starts_one_later() -> None:
    # prompt 0..3, answer 4..9: drafting starts at index 3, and the last feature that is wanted is that at index 9
    batch = make_batch(made_rows([(4, 6, False)]), torch.tensor([0]), 64)
    assert batch.positions(1).tolist() == [3, 4, 5, 6, 7, 8]
    assert batch.positions(3).tolist() == [5, 6, 7, 8]
    assert [batch.count(step) for step in (1, 3, 7, 20)] == [6, 4, 0, 0]


def test_nothing_is_drafted_from_the_end_of_text() -> None:
    batch = make_batch(made_rows([(4, 6, True)]), torch.tensor([0]), 64)
    assert batch.positions(1).tolist() == [3, 4, 5, 6, 7]


def test_a_row_that_is_cut_counts_to_the_cut() -> None:
    batch = make_batch(made_rows([(4, 40, True)]), torch.tensor([0]), 16)
    assert batch.tokens.shape == (1, 16)
    assert batch.positions(1).tolist() == list(range(3, 15))


def test_padding_never_counts() -> None:
    batch = make_batch(made_rows([(4, 6, False), (2, 30, False)]), torch.tensor([0, 1]), 64)
    width = batch.tokens.shape[1]
    assert [at for at in batch.positions(1).tolist() if at < width] == [3, 4, 5, 6, 7, 8]
    assert batch.count(1) == len(batch.positions(1))


def test_groups_stay_below_the_token_limit() -> None:
    lengths = torch.tensor([3, 30, 17, 16, 100, 5])
    groups = group_by_length(lengths, torch.arange(6), 64)
    assert sorted(row for group in groups for row in group.tolist()) == list(range(6))
    for group in groups:
        padded = -(-int(lengths[group].max()) // 16) * 16
        assert len(group) == 1 or len(group) * padded <= 64


def test_an_epoch_has_every_row_once_and_batches_do_not_depend_on_the_way_there() -> None:
    answers = made_rows([(2, 3 + row % 5, False) for row in range(50)])
    rows = torch.arange(5, 50)
    first = BatchPlan(answers, rows, tokens=64, max_length=64, seed=1)
    walked = [first.batch(number) for number in range(40)]
    assert first.epoch_of(39) >= 2
    per_epoch = first._starts[1]
    starts = answers.tokens[answers.offsets[:-1]]
    seen = sorted(int(token) for batch in walked[:per_epoch] for token in batch.tokens[:, 0])
    assert seen == starts[rows].tolist()
    again = BatchPlan(answers, rows, tokens=64, max_length=64, seed=1)
    for number in (39, 3, 25):
        assert torch.equal(again.batch(number).tokens, walked[number].tokens)


def test_no_prompt_is_both_trained_on_and_held_out() -> None:
    answers = made_rows([(2, 6, False)] * 20)
    prompts = torch.arange(20) // 2
    answers = type(answers)(answers.tokens, answers.offsets, answers.prompt_lengths, answers.ended, prompts)
    training, held = split_rows(answers, 3, 64)
    assert len(held) == 6 and len(training) == 14
    assert not set(prompts[training].tolist()) & set(prompts[held].tolist())
