"""What `coral_spec.load` and `generate` promise, and what they refuse."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from coral_spec import load
from coral_spec.bundled import bundled_drafter
from coral_spec.drafter import Drafter
from drafting import drafting_model, save_drafter
from expkit.errors import UsageError
from tiny import tiny_target

PROMPT = [5, 9, 40, 7]


@pytest.fixture(scope="module")
def plain():
    return load(tiny_target("llama"), draft="none")


def test_pieces_add_up_to_the_text(plain):
    pieces: list[str] = []
    answer = plain.generate("hello there", max_new_tokens=40, on_text=pieces.append)
    assert "".join(pieces) == answer.text
    assert answer.text == plain.target.tokenizer.decode(answer.token_ids, skip_special_tokens=True)


def test_a_stream_has_a_result(plain):
    stream = plain.stream("hello there", max_new_tokens=20)
    text = "".join(stream)
    assert stream.result().text == text
    assert stream.result().finish_reason in ("length", "stop")


def test_the_end_of_text_ends_the_answer(plain):
    free = plain.generate(PROMPT, max_new_tokens=40, ignore_eos=True)
    target = tiny_target("llama")
    object.__setattr__(target, "eos_token_ids", (free.token_ids[6],))
    ended = load(target, draft="none").generate(PROMPT, max_new_tokens=40)
    assert ended.finish_reason == "stop"
    assert ended.token_ids == free.token_ids[: free.token_ids.index(free.token_ids[6]) + 1]


def test_a_stop_string_ends_the_answer_before_it(plain):
    free = plain.generate(PROMPT, max_new_tokens=40, ignore_eos=True)
    stop = free.text[10:13]
    ended = plain.generate(PROMPT, max_new_tokens=40, ignore_eos=True, stop=stop)
    assert ended.finish_reason == "stop"
    assert ended.text == free.text[: free.text.index(stop)]


def test_the_limit_holds_although_rounds_are_longer(tmp_path):
    model = drafting_model(tiny_target("llama"), tmp_path)
    for limit in (1, 2, 7):
        answer = model.generate(PROMPT, max_new_tokens=limit, ignore_eos=True)
        assert len(answer.token_ids) == limit
        assert answer.finish_reason == "length"


def test_an_answer_ends_with_the_context(plain):
    model = load(plain.target, draft="ngram", max_length=30)
    answer = model.generate(PROMPT, max_new_tokens=500, ignore_eos=True)
    assert len(answer.token_ids) == 30 - len(PROMPT)
    assert answer.token_ids == plain.generate(PROMPT, max_new_tokens=26, ignore_eos=True).token_ids


def test_a_prompt_longer_than_the_context_is_refused_with_both_lengths(plain):
    with pytest.raises(UsageError, match=r"600 tokens.*512"):
        plain.generate([5] * 600)


def test_an_answer_can_be_interrupted(plain):
    asked = iter([False, False, True])
    answer = plain.generate(PROMPT, max_new_tokens=40, ignore_eos=True, should_stop=lambda: next(asked))
    assert answer.finish_reason == "interrupted"
    assert len(answer.token_ids) == 3
    assert answer.statistics.rounds == 2


def test_statistics_add_up(tmp_path):
    model = drafting_model(tiny_target("llama"), tmp_path)
    statistics = model.generate(PROMPT, max_new_tokens=40, ignore_eos=True).statistics
    assert 1 + sum(length + 1 for length in statistics.accept_lengths) >= statistics.new_tokens == 40
    assert statistics.tau == 1 + sum(statistics.accept_lengths) / statistics.rounds
    assert sum(statistics.time_split.values()) == pytest.approx(statistics.seconds, rel=0.2)
    assert all(statistics.time_split[part] > 0 for part in ("target", "drafter", "head", "rest"))
    assert json.loads(json.dumps(statistics.to_dict()))["tau"] == statistics.tau


@pytest.mark.parametrize(
    "limits",
    [
        *[{"max_new_tokens": 0}, {"temperature": -0.1}, {"top_p": 0}, {"top_k": -2}, {"seed": 2**70}],
        *[{"max_new_tokens": 2.5}, {"temperature": "a"}, {"top_p": None}, {"top_k": 1.0}, {"seed": "0"}],
    ],
)
def test_limits_out_of_range_are_refused(plain, limits):
    with pytest.raises(UsageError):
        plain.generate(PROMPT, **limits)


def test_numbers_of_numpy_are_numbers(plain):
    limits = {"max_new_tokens": np.int64(3), "temperature": np.float32(0.5), "seed": np.int32(1)}
    assert len(plain.generate(PROMPT, ignore_eos=True, **limits).token_ids) == 3


@pytest.mark.parametrize("prompt", [[], [5, 999], [-1]])
def test_prompts_that_are_none_are_refused(plain, prompt):
    with pytest.raises(UsageError):
        plain.generate(prompt)


def test_an_unknown_draft_is_refused(plain):
    with pytest.raises(UsageError, match="nowhere"):
        load(plain.target, draft="nowhere")


def test_a_model_without_its_own_drafter_looks_back(plain):
    assert bundled_drafter(plain.target) is None
    assert load(plain.target).draft_name == "ngram"


def test_a_drafter_keeps_neither_embeddings_nor_head(tmp_path):
    target = tiny_target("qwen2")
    folder = save_drafter(target, tmp_path)
    names = {name.split(".")[0] for name in Drafter.load(folder, target).state_dict()}
    assert names == {"fc", "layers"}
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["coral_spec"]["target"] == "tiny-qwen2"


@pytest.mark.parametrize("other", [{"width": 64}, {"vocab": 300}])
def test_a_drafter_for_another_model_is_refused_with_both_values(other, tmp_path):
    folder = save_drafter(tiny_target("llama"), tmp_path)
    with pytest.raises(UsageError, match=r"(32.*64|259.*300)"):
        load(tiny_target("llama", **other), draft=str(folder))


def test_a_drafter_for_another_tokenizer_is_refused(tmp_path):
    target = tiny_target("llama")
    folder = save_drafter(target, tmp_path)
    object.__setattr__(target, "tokenizer_hash", "0" * 64)
    with pytest.raises(UsageError, match="tokenizer hash"):
        load(target, draft=str(folder))


def test_damaged_weights_are_refused(tmp_path):
    target = tiny_target("llama")
    folder = save_drafter(target, tmp_path)
    path = folder / "drafter.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UsageError, match=r"drafter\.safetensors"):
        load(target, draft=str(folder))


def test_few_rows_need_a_ranking(tmp_path):
    target = tiny_target("llama")
    folder = save_drafter(target, tmp_path)
    (folder / "frequency.safetensors").unlink()
    with pytest.raises(UsageError, match="frequency"):
        load(target, draft=str(folder), head=64)


def test_eager_attention_gives_the_same_text(tmp_path):
    ids = drafting_model(tiny_target("llama"), tmp_path).generate(PROMPT, max_new_tokens=30).token_ids
    eager = drafting_model(tiny_target("llama", attention="eager"), tmp_path)
    assert eager.generate(PROMPT, max_new_tokens=30).token_ids == ids


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_gives_plain_decodings_text(tmp_path):
    target = tiny_target("gemma3", device="cuda")
    wanted = load(target, draft="none").generate(PROMPT, max_new_tokens=60, ignore_eos=True)
    assert drafting_model(target, tmp_path).generate(PROMPT, max_new_tokens=60, ignore_eos=True).token_ids == (
        wanted.token_ids
    )


def test_an_answer_is_iterated_once(plain):
    stream = plain.stream(PROMPT, max_new_tokens=20, ignore_eos=True)
    first = next(iter(stream))
    assert first + "".join(stream) == stream.result().text
    assert len(stream.result().token_ids) == 20


def test_an_answer_that_has_not_begun_has_no_result(plain):
    with pytest.raises(UsageError, match="not begun"):
        plain.stream(PROMPT).result()


def test_longrope_ends_where_its_frequencies_change():
    target = tiny_target("llama")
    target.model.config.rope_parameters = {"rope_type": "longrope", "original_max_position_embeddings": 64}
    assert load(target, draft="none").context_length == 64


@pytest.mark.parametrize("options", [{"head": "banana"}, {"head": 8}])
def test_a_head_that_is_none_is_refused(options, plain, tmp_path):
    folder = save_drafter(plain.target, tmp_path)
    with pytest.raises(UsageError, match="head is"):
        load(plain.target, draft=str(folder), **options)


@pytest.mark.parametrize("prompt", ["", []])
def test_an_empty_prompt_is_refused(prompt, plain):
    with pytest.raises(UsageError, match="the prompt is empty"):
        plain.generate(prompt, max_new_tokens=2)
