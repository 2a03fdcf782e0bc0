"""Every method answers the same question; the greedy ones with the same words."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from coral_spec.bench.methods import METHODS, Request, make_method, parse_methods
from coral_spec.model import Model, load
from drafting import drafting_model, save_drafter
from expkit.errors import UsageError
from tiny import tiny_target

PROMPT = list(range(20, 40))


@pytest.fixture(scope="module")
def model() -> Model:
    return load(tiny_target(), draft="none")


@pytest.mark.parametrize("name", ["hf", "prompt-lookup", "ngram", "auto", "mine"])
def test_greedy_ids_are_those_of_plain_decoding(name: str, model: Model, tmp_path: Path) -> None:
    folder = str(save_drafter(model.target, tmp_path)) if name == "mine" else ""
    request = Request(max_new_tokens=40, ignore_eos=True)
    plain = make_method("ar", "", model).answer(PROMPT, request)
    other = make_method(name, folder, model).answer(PROMPT, request)
    assert other.ids == plain.ids and len(plain.ids) == 40
    assert other.seconds > 0


@pytest.mark.parametrize("name", ["hf", "prompt-lookup", "ar"])
def test_recorded_logits_are_what_each_token_was_drawn_from(name: str, model: Model) -> None:
    answer = make_method(name, "", model).answer(PROMPT, Request(max_new_tokens=12, record_logits=True))
    assert answer.logits is not None
    assert answer.logits.argmax(dim=-1).tolist() == answer.ids


def test_rounds_of_prompt_lookup_add_up_to_its_tokens(model: Model) -> None:
    answer = make_method("prompt-lookup", "", model).answer(PROMPT, Request(max_new_tokens=40, ignore_eos=True))
    assert answer.accept_lengths is not None
    first = len(answer.ids) - sum(length + 1 for length in answer.accept_lengths)
    assert first >= 1


def test_plain_generate_has_no_acceptance(model: Model) -> None:
    assert make_method("hf", "", model).answer(PROMPT, Request(max_new_tokens=4)).accept_lengths is None


def test_transformers_draws_by_the_seed_alone_and_leaves_the_global_generator_and_the_model_as_they_were(
    model: Model,
) -> None:
    hf = make_method("hf", "", model)
    before, settings = torch.random.get_rng_state(), model.target.model.generation_config
    answers = [hf.answer(PROMPT, Request(max_new_tokens=12, temperature=1.0, seed=seed)).ids for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert model.target.model.generation_config is settings


def test_a_models_own_sampling_settings_do_not_reach_transformers_generate() -> None:
    target = tiny_target()
    neutral = make_method("hf", "", load(target, draft="none")).answer(PROMPT, Request(max_new_tokens=30))
    target.model.generation_config.repetition_penalty = 5.0
    assert make_method("hf", "", load(target, draft="none")).answer(PROMPT, Request(max_new_tokens=30)).ids == (
        neutral.ids
    )


def test_the_end_of_the_text_ends_every_method_alike() -> None:
    target = tiny_target()
    plain = load(target, draft="none")
    ids = plain.generate(PROMPT, max_new_tokens=20, ignore_eos=True).token_ids
    ended = type(target)(**{**vars(target), "eos_token_ids": (ids[9],)})
    expected = ids[: ids.index(ids[9]) + 1]
    for name in ("hf", "ar", "prompt-lookup", "ngram"):
        answer = make_method(name, "", load(ended, draft="none")).answer(PROMPT, Request(max_new_tokens=20))
        assert answer.ids == expected, name


def test_methods_are_parsed_with_their_folders(tmp_path: Path) -> None:
    assert parse_methods(f"hf, ar,one={tmp_path}") == {"hf": "", "ar": "", "one": str(tmp_path)}
    for text, message in {
        "fast": f"unknown method 'fast', expected one of {', '.join(METHODS)}",
        "": "no method given",
        "hf,hf": "'hf' is given twice",
        "one=/no/such": "no such drafter folder: /no/such",
        f"hf={tmp_path}": "needs a name of its own",
    }.items():
        with pytest.raises(UsageError, match=message):
            parse_methods(text)


def test_coral_without_a_bundled_drafter_is_refused(model: Model) -> None:
    with pytest.raises(UsageError, match="there is no drafter for tiny-llama"):
        make_method("coral", "", model)


def test_another_models_drafter_is_refused(tmp_path: Path, model: Model) -> None:
    drafting_model(tiny_target(width=64), tmp_path)
    with pytest.raises(UsageError, match="64"):
        make_method("mine", str(tmp_path), model)
