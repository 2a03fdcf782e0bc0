from __future__ import annotations

import pytest
import torch

from coral_spec.targets.target import hash_tokenizer
from expkit.errors import UsageError
from tiny import ARCHITECTURES, tiny_target, tiny_tokenizer


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_target_is_frozen_and_in_evaluation_mode(architecture: str) -> None:
    target = tiny_target(architecture)
    assert not target.model.training
    assert not any(parameter.requires_grad for parameter in target.model.parameters())
    assert (target.context_length, target.eos_token_ids) == (512, (2,))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tiny_targets_of_one_seed_are_alike_and_write_varied_text(architecture: str) -> None:
    prompt = torch.tensor([tiny_target(architecture).encode("once upon a time")])
    texts = [
        tiny_target(architecture, seed).model.generate(prompt, max_new_tokens=24, do_sample=False, eos_token_id=None)
        for seed in (0, 0, 1)
    ]
    answers = [text[0, prompt.shape[1] :].tolist() for text in texts]
    assert answers[0] == answers[1] != answers[2]
    assert len(set(answers[0])) > 5


def test_a_text_becomes_one_user_message() -> None:
    target = tiny_target()
    assert target.encode("hi") == target.encode([{"role": "user", "content": "hi"}])
    assert target.tokenizer.decode(target.encode("hi")).endswith("<|im_start|>assistant\n")


def test_a_text_without_chat_or_template_stays_plain() -> None:
    assert tiny_target().encode("hi", chat=False) == tiny_target(chat=False).encode("hi")
    assert tiny_target().tokenizer.decode(tiny_target().encode("hi", chat=False)) == "hi"


def test_messages_for_a_base_model_are_refused() -> None:
    with pytest.raises(UsageError, match="base model"):
        tiny_target(chat=False).encode([{"role": "user", "content": "hi"}])


def test_a_message_without_content_is_refused() -> None:
    with pytest.raises(UsageError, match='"role" and "content"'):
        tiny_target().encode([{"role": "user"}])


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(UsageError, match="no tokens"):
        tiny_target(chat=False).encode("")


def test_the_tokenizer_hash_follows_vocabulary_and_special_ids() -> None:
    tokenizer = tiny_tokenizer(64)
    first = hash_tokenizer(tokenizer)
    assert first == hash_tokenizer(tiny_tokenizer(64, chat=False))
    assert first != hash_tokenizer(tiny_tokenizer(65))
    tokenizer.add_special_tokens({"bos_token": "e"})
    assert first != hash_tokenizer(tokenizer)
