"""The whole engine on its kernels gives the text that it gives without them."""

from __future__ import annotations

import pytest
import torch

from coral_spec import kernels
from coral_spec.layers import Projection
from coral_spec.model import load
from coral_spec.sampling import Sampling
from coral_spec.tree import TreeShape
from drafting import CLEAR_SEEDS, PROMPT, clear_target, save_drafter
from tiny import tiny_target

pytest.importorskip("triton")


@pytest.fixture
def on_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels serve tensors of the CPU too, by Triton's interpreter."""
    made = Projection.__init__

    def with_weight(self: Projection, *args: object) -> None:
        made(self, *args)  # type: ignore[arg-type]
        self.weight, self._packed = torch.cat([part.weight for part in self._parts]), None

    monkeypatch.setattr(Projection, "__init__", with_weight)
    monkeypatch.setattr(
        kernels, "serve", lambda states: states.dim() == 3 and states.shape[0] == 1 and states.shape[1] <= 64
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU all tests run on kernels")
@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "temperature"), [("llama", 0.0), ("gemma3", 0.8)])
def test_text_is_the_same(architecture, temperature, tmp_path, request):
    target = clear_target(architecture)
    limits = {"max_new_tokens": 7, "temperature": temperature, "seed": 5, "ignore_eos": True}
    expected = load(target, draft="none").generate(PROMPT, **limits).token_ids
    request.getfixturevalue("on_kernels")
    for draft in ("none", "ngram", str(save_drafter(target, tmp_path / "drafter"))):
        model = load(target, draft=draft, tree=TreeShape(2, 2, 4), head="full" if "drafter" in draft else "auto")
        assert model.generate(PROMPT, **limits).token_ids == expected, draft


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU all tests run on kernels")
@pytest.mark.slow
def test_a_deep_trees_levels_stand_behind_more_nodes_than_a_forward_has(tmp_path, on_kernels):
    target = clear_target("llama")
    limits = {"max_new_tokens": 3, "ignore_eos": True}
    expected = load(target, draft="none").generate(PROMPT, **limits).token_ids
    model = load(target, draft=str(save_drafter(target, tmp_path)), tree=TreeShape(9, 8, 12), head="full")
    session = model.session(40)
    assert session.draft.rows == 13 and session.draft.slack == 65 > kernels.MAX_ROWS
    assert model.generate(PROMPT, **limits).token_ids == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_deep_tree_is_captured(tmp_path):
    target = tiny_target("llama", seed=CLEAR_SEEDS["llama"], device="cuda")
    expected = load(target, draft="none").generate(PROMPT, max_new_tokens=60, ignore_eos=True).token_ids
    model = load(target, draft=str(save_drafter(target, tmp_path)), tree=TreeShape(8, 10, 60), head="full")
    assert model.generate(PROMPT, max_new_tokens=60, ignore_eos=True).token_ids == expected
    graphs = model.session(100).graphs
    assert graphs is not None and graphs._rounds


@pytest.fixture
def failures(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What kernels were given up for, forgotten after the test."""
    found: list[str] = []
    monkeypatch.setattr(kernels, "_FAILED", found)
    return found


def test_kernels_are_given_up_when_triton_fails(failures, monkeypatch):
    import triton.language

    monkeypatch.setattr(kernels, "_served", lambda device: True)
    assert kernels.available(torch.device("cuda"))
    with pytest.raises(Exception) as raised:
        triton.language.arange(0, 3)  # outside a kernel
    with pytest.warns(UserWarning, match="torch path"):
        assert kernels.give_up(raised.value)
    assert failures and not kernels.available(torch.device("cuda"))


def test_other_errors_are_not_tritons(failures):
    with pytest.raises(ValueError) as raised:
        raise ValueError("not Triton's")
    assert not kernels.give_up(raised.value) and not failures


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_kernel_that_does_not_compile_ends_in_the_torch_path(failures, monkeypatch, tmp_path):
    target = tiny_target("llama", seed=CLEAR_SEEDS["llama"], device="cuda")
    drafter = str(save_drafter(target, tmp_path))
    expected = load(target, draft="none").generate(PROMPT, max_new_tokens=30, ignore_eos=True).token_ids
    monkeypatch.setattr("coral_spec.kernels.top.CHUNK", 1000)  # Triton wants powers of two
    model = load(target, draft=drafter, tree=TreeShape(2, 2, 4))
    with pytest.warns(UserWarning, match="torch path"):
        assert model.generate(PROMPT, max_new_tokens=30, ignore_eos=True).token_ids == expected
    assert failures
    assert model.generate(PROMPT, max_new_tokens=30, ignore_eos=True).token_ids == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_session_grows_and_goes_on_with_captured_rounds(tmp_path):
    target = tiny_target("llama", seed=CLEAR_SEEDS["llama"], device="cuda")
    model = load(target, draft=str(save_drafter(target, tmp_path)), tree=TreeShape(2, 2, 4))
    plain = load(target, draft="none")
    session = model.session(64)
    for reserve in (64, 3000, 3000):
        session.reserve(reserve)
        answer = model.stream(PROMPT, max_new_tokens=40, ignore_eos=True)
        answer._session = session
        list(answer)
        expected = plain.generate(PROMPT, max_new_tokens=40, ignore_eos=True).token_ids
        assert answer.result().token_ids == expected
        assert session.graphs is not None and not session.graphs._refused


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_rounds_without_drafting_need_nothing_compiled_anew(tmp_path):
    """Where plain decoding has run, a session that stops drafting begins its plain rounds at once."""
    hooks = pytest.importorskip("triton.knobs").runtime
    target = tiny_target("llama", seed=CLEAR_SEEDS["llama"], device="cuda")
    model = load(target, draft=str(save_drafter(target, tmp_path)), head="full")
    plain = model.with_draft("none")
    expected = plain.generate(PROMPT, max_new_tokens=40, ignore_eos=True).token_ids
    model.tuner.shape = TreeShape(6, 10, 60)  # needs 75 slots behind the last token
    model.generate(PROMPT, max_new_tokens=40, ignore_eos=True)
    assert model._idle is not None and model._idle.capacity % 16 == 0
    model.tuner.shape, compiled = None, []
    hooks.jit_post_compile_hook = lambda *, fn, **_: compiled.append(fn.name)
    try:
        assert model.generate(PROMPT, max_new_tokens=40, ignore_eos=True).token_ids == expected
    finally:
        hooks.jit_post_compile_hook = None
    assert compiled == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_captured_rounds_tell_where_their_time_goes(tmp_path):
    target = tiny_target("llama", seed=CLEAR_SEEDS["llama"], device="cuda")
    model = load(target, draft=str(save_drafter(target, tmp_path)), tree=TreeShape(2, 2, 4))
    split = model.generate(PROMPT, max_new_tokens=90, ignore_eos=True).statistics.time_split
    assert set(split) == {"target", "drafter", "head", "rest"}
    assert all(seconds > 0 for seconds in split.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("limit", range(18, 26))
def test_rounds_that_are_under_way_at_the_end_of_the_room_stay_inside(limit):
    target = tiny_target("llama", seed=CLEAR_SEEDS["llama"], device="cuda")
    model = load(target, draft="ngram", tree=TreeShape(6, 3, 18))
    session = model.session(len(PROMPT) + limit)
    session.capacity -= session.room - len(PROMPT) - limit  # no larger than it must be
    answer = model.stream(PROMPT, max_new_tokens=limit, ignore_eos=True)
    answer._session = session
    list(answer)
    torch.cuda.synchronize()
    expected = load(target, draft="none").generate(PROMPT, max_new_tokens=limit, ignore_eos=True).token_ids
    assert answer.result().token_ids == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_without_memory_for_a_graph_rounds_are_launched_and_a_warning_says_so(monkeypatch, tmp_path):
    target = tiny_target("llama", seed=CLEAR_SEEDS["llama"], device="cuda")
    drafter = str(save_drafter(target, tmp_path))
    model = load(target, draft=drafter, tree=TreeShape(2, 2, 4))
    expected = load(target, draft="none").generate(PROMPT, max_new_tokens=30, ignore_eos=True).token_ids

    def refuse(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    with pytest.warns(UserWarning, match="not captured.*no memory"):
        assert model.generate(PROMPT, max_new_tokens=30, ignore_eos=True).token_ids == expected
    assert model.generate(PROMPT, max_new_tokens=30, ignore_eos=True).token_ids == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_tree_too_large_for_kernels_is_said():
    target = tiny_target("llama", seed=CLEAR_SEEDS["llama"], device="cuda")
    with pytest.warns(UserWarning, match="a tree of 64 tokens is larger than 63"):
        load(target, draft="ngram", tree=TreeShape(8, 8, 64)).session(64)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_trees_share_a_session_and_what_it_has_captured(tmp_path):
    target = tiny_target("llama", seed=CLEAR_SEEDS["llama"], device="cuda")
    model = load(target, draft=str(save_drafter(target, tmp_path)), tree=TreeShape(2, 2, 4))
    expected = load(target, draft="none").generate(PROMPT, max_new_tokens=80, ignore_eos=True).token_ids
    shapes, graphs = [TreeShape(2, 2, 4), TreeShape(5, 3, 15), TreeShape(3, 2, 6)], set()
    for shape in [*shapes, *shapes]:
        model._tree = shape
        answer = model.generate(PROMPT, max_new_tokens=80, ignore_eos=True)
        assert answer.token_ids == expected and answer.statistics.tree == str(shape)
        assert model._idle is not None and shape in model._idle.captured(Sampling())
        graphs.add(id(model._idle.graphs))
    assert len(graphs) == 1 and model._idle.captured(Sampling()) == set(shapes)


LIKELY = [TreeShape(3, 10, 60), TreeShape(8, 10, 60)]


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    """A model that chooses its tree, begins with one and expects two others."""
    monkeypatch.setenv("CORAL_SPEC_HOME", str(tmp_path / "home"))
    target = tiny_target("llama", seed=CLEAR_SEEDS["llama"], device="cuda")
    model = load(target, draft=str(save_drafter(target, tmp_path / "drafter")), head="full")
    assert model.tuner is not None
    monkeypatch.setattr(type(model.tuner), "likely", LIKELY)
    model.tuner.shape = TreeShape(5, 10, 60)
    return model


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_trees_that_text_may_ask_for_are_captured_after_the_first_token(temperature, tuned):
    limits = {"max_new_tokens": 40, "temperature": temperature, "seed": 1, "ignore_eos": True}
    expected = load(tuned.target, draft="none").generate(PROMPT, **limits).token_ids
    assert tuned.generate(PROMPT, max_new_tokens=1).statistics.capture_seconds < 1e-3  # no round, no need
    answer = tuned.generate(PROMPT, **limits)
    assert answer.token_ids == expected and answer.statistics.capture_seconds > 1e-2
    rounds = dict(tuned._idle.graphs._rounds)
    assert {key[0] for key in rounds} == {TreeShape(5, 10, 60), *LIKELY}
    for other in LIKELY:
        tuned.tuner.shape = other
        answer = tuned.generate(PROMPT, **limits)
        assert answer.token_ids == expected and answer.statistics.capture_seconds < 1e-3
        assert tuned._idle.graphs._rounds == rounds  # nothing was captured for the change
    other = Sampling(temperature=0.5)
    assert tuned._idle.captured(other) == tuned._idle.captured(Sampling(temperature), keep_logits=True) == set()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_tree_that_there_is_no_memory_for_costs_no_other_one_its_graph(tuned, monkeypatch, recwarn):
    captures, graph = [], torch.cuda.graph

    def refuse_the_second_tree(*arguments, **options):
        captures.append(arguments)
        if len(captures) > 4:  # the prompt's two, and the first tree's two
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return graph(*arguments, **options)

    monkeypatch.setattr(torch.cuda, "graph", refuse_the_second_tree)
    expected = load(tuned.target, draft="none").generate(PROMPT, max_new_tokens=40, ignore_eos=True).token_ids
    captures.clear()
    assert tuned.generate(PROMPT, max_new_tokens=40, ignore_eos=True).token_ids == expected
    assert {key[0] for key in tuned._idle.graphs._rounds} == {TreeShape(5, 10, 60)} and len(captures) == 5
    assert not [each for each in recwarn.list if "not captured" in str(each.message)]
