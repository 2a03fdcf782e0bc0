"""Records, their file, the figures made of them, and the judgement of greedy ids."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from coral_spec.bench.identity import judge_all
from coral_spec.bench.methods import Answer, Request
from coral_spec.bench.plot import save_chart
from coral_spec.bench.records import Key, PartialFile, Record
from coral_spec.bench.runner import Bench, Settings, open_partial, run
from coral_spec.bench.summary import NOT_MEASURED, summarise_runs, table
from coral_spec.bench.tasks import Prompt
from coral_spec.check.noise import forward_distances
from coral_spec.model import load
from expkit.errors import UsageError
from tiny import tiny_target

SETTINGS = Settings("tiny", {"hf": "", "ar": "", "ngram": ""}, max_new_tokens=12)
TASKS = {"sample": [Prompt("a", "one two three one two"), Prompt("b", "four five"), Prompt("c", "six")]}


@pytest.fixture
def bench() -> Bench:
    return Bench.build(SETTINGS, load(tiny_target(), draft="none"))


class Spy:
    """A method that notes when it is asked, and may fail."""

    def __init__(self, name: str, calls: list[tuple[str, int]], fail_at: int = -1) -> None:
        self.name, self.calls, self.fail_at = name, calls, fail_at

    def answer(self, prompt: list[int], request: Request) -> Answer:
        if len(self.calls) == self.fail_at:
            raise KeyboardInterrupt
        self.calls.append((self.name, len(prompt)))
        return Answer([1, 2, 3], seconds=0.5 + len(self.calls), accept_lengths=[1])


def spying(settings: Settings, calls: list[tuple[str, int]], fail_at: int = -1) -> Bench:
    model = load(tiny_target(), draft="none")
    return Bench(model, [Spy(name, calls, fail_at) for name in settings.methods], settings)


def record(method: str, prompt: str, seconds: float, accepted: list[int] | None, ids: list[int]) -> Record:
    return Record("sample", prompt, method, 5, ids, [seconds], accepted, depth=2)


def test_methods_take_turns_on_every_prompt_after_each_has_warmed_up() -> None:
    calls: list[tuple[str, int]] = []
    bench = spying(SETTINGS, calls)
    run(bench, TASKS, PartialFile(None, {}))
    names = [name for name, _ in calls]
    assert names[:3] == ["hf", "ar", "ngram"]
    assert names[3:] == ["hf", "ar", "ngram", "ar", "ngram", "hf", "ngram", "hf", "ar"]
    lengths = [length for _, length in calls[3:]]
    assert lengths == [length for length in dict.fromkeys(lengths) for _ in range(3)]


def test_the_median_of_the_repeats_counts() -> None:
    bench = spying(replace(SETTINGS, repeats=3), [])
    [first, *_] = bench.measure("sample", 0, TASKS["sample"][0])
    assert first.seconds == [1.5, 4.5, 7.5] and first.median_seconds == 4.5


def test_a_killed_benchmark_goes_on_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    partial = open_partial(SETTINGS, TASKS, path)
    with pytest.raises(KeyboardInterrupt):
        run(spying(SETTINGS, [], fail_at=3 + 6), TASKS, partial)
    partial.close()
    kept = tmp_path / "out.partial.jsonl"
    kept.write_text(kept.read_text() + '{"task": "sample", "pro')  # the kill came in the middle of a line

    calls: list[tuple[str, int]] = []
    partial = open_partial(SETTINGS, TASKS, path)
    assert partial.resumed == 6
    run(spying(SETTINGS, calls), TASKS, partial)
    assert len(calls) == 3 + 3  # warming up, and the last prompt
    assert len(partial.records) == 9
    partial.remove()
    assert not list(tmp_path.iterdir())


def test_an_unfinished_run_with_other_settings_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    partial = open_partial(SETTINGS, TASKS, path)
    partial.add(record("hf", "a", 2.0, None, [1] * 10))
    partial.close()
    with pytest.raises(UsageError, match=r"out\.partial\.jsonl holds an unfinished run.*\(max_new_tokens\)"):
        open_partial(replace(SETTINGS, max_new_tokens=13), TASKS, path)
    with pytest.raises(UsageError, match=r"\(tasks\)"):
        open_partial(SETTINGS, {"sample": TASKS["sample"][:1]}, path)
    assert (tmp_path / "out.partial.jsonl").is_file()


def test_figures_are_those_of_the_definitions() -> None:
    records = {
        each.key: each
        for each in [
            record("hf", "a", 2.0, None, [1] * 10),
            record("hf", "b", 2.0, None, [1] * 10),
            record("ngram", "a", 1.0, [2, 0], [1] * 10),
            record("ngram", "b", 1.0, [1, 1, 1, 1], [1] * 10),
        ]
    }
    settings = Settings("tiny", {"hf": "", "ngram": ""})
    hf, ngram = summarise_runs(settings, {"sample": TASKS["sample"][:2]}, records, {})
    assert hf["tau"] is None and hf["tau_prompts"] is None and hf["tokens_per_second"] == 5.0
    assert ngram["tokens_per_second"] == 10.0
    assert ngram["tau"] == pytest.approx(2.0)  # 12 tokens in 6 rounds
    assert ngram["tau_prompts"] == pytest.approx(2.0)
    assert ngram["speedup"] == {"ar": None, "hf": 2.0}
    assert ngram["identical"] is None  # nothing to compare with
    assert ngram["depth_acceptance"] == pytest.approx([5 / 6, 1 / 5])


def test_tau_over_prompts_weighs_prompts_alike_and_tau_weighs_rounds_alike() -> None:
    several = [record("ar", "a", 1.0, [3], [1] * 5), record("ar", "b", 1.0, [0, 0, 0], [1] * 4)]
    [ar] = summarise_runs(
        Settings("tiny", {"ar": ""}), {"sample": TASKS["sample"][:2]}, {each.key: each for each in several}, {}
    )
    assert ar["tau"] == pytest.approx(1.75) and ar["tau_prompts"] == pytest.approx(2.5)


def test_with_workers_no_speed_is_given() -> None:
    records = {each.key: each for each in [record("ngram", "a", 1.0, [2, 0], [1] * 10)]}
    settings = Settings("tiny", {"ngram": ""}, workers=2)
    [ngram] = summarise_runs(settings, {"sample": TASKS["sample"][:1]}, records, {})
    assert ngram["speed"] == NOT_MEASURED
    assert ngram["tokens_per_second"] is None and ngram["speedup"] == {"ar": None, "hf": None}
    assert ngram["tau"] == 2.0


def measured(bench: Bench) -> dict[Key, Record]:
    partial = PartialFile(None, {})
    run(bench, TASKS, partial)
    return partial.records


def test_equal_ids_are_exact_and_above_temperature_zero_nothing_is_judged(bench: Bench) -> None:
    records = measured(bench)
    judgements = judge_all(bench, TASKS, records)
    assert {key[2] for key in judgements} == {"hf", "ngram"}
    assert {judgement.verdict for judgement in judgements.values()} == {"exact"}
    runs = summarise_runs(SETTINGS, TASKS, records, judgements)
    assert [each["identical"] for each in runs] == ["exact"] * 3

    warm = replace(bench, settings=replace(SETTINGS, temperature=1.0))
    assert judge_all(warm, TASKS, records) == {}
    assert {each["identical"] for each in summarise_runs(warm.settings, TASKS, records, {})} == {None}


def test_a_token_that_noise_does_not_explain_is_a_bug(bench: Bench) -> None:
    records = measured(bench)
    wrong = records["sample", "b", "ngram"]
    ids = [*wrong.ids[:4], (wrong.ids[4] + 1) % 256 + 3, *wrong.ids[5:]]
    records[wrong.key] = replace(wrong, ids=ids)
    judgement = judge_all(bench, TASKS, records)[wrong.key]
    assert judgement.verdict == "bug" and judgement.position == 4
    [_, _, ngram] = summarise_runs(SETTINGS, TASKS, records, judge_all(bench, TASKS, records))
    assert ngram["identical"] == "bug" and ngram["bugs"] == 1


def swap_closest(bench: Bench, method: int) -> tuple[list[int], list[int], int, list[int]]:
    """Prompt a, a method's answer, where its two best tokens are closest, and the answer with the second one there."""
    ids = bench.encode("sample", TASKS["sample"][0])
    answer = bench.methods[method].answer(ids, Request(max_new_tokens=12, record_logits=True))
    assert answer.logits is not None
    margins = answer.logits.topk(2, dim=-1)
    place = int((margins.values[:, 0] - margins.values[:, 1]).argmin())
    return ids, answer.ids, place, [*answer.ids[:place], int(margins.indices[place, 1]), *answer.ids[place + 1 :]]


def test_in_bf16_a_swap_of_two_close_tokens_is_a_tie() -> None:
    bench = Bench.build(SETTINGS, load(tiny_target(dtype=torch.bfloat16), draft="none"))
    records = measured(bench)
    _, answer, place, swapped = swap_closest(bench, 1)
    assert answer == records["sample", "a", "ar"].ids
    other = replace(records["sample", "a", "ngram"], ids=swapped)
    judgement = judge_all(bench, TASKS, {**records, other.key: other})[other.key]
    assert judgement.position == place
    assert judgement.noise is not None and judgement.gap is not None
    assert judgement.verdict == ("tie" if judgement.gap <= min(judgement.noise, 0.5) else "bug")


def test_the_baselines_distance_is_that_of_the_whole_run() -> None:
    bench = Bench.build(SETTINGS, load(tiny_target(dtype=torch.bfloat16), draft="none"))
    records = {
        key: replace(record, noise=0.4, distance=0.6 if key[1] == "c" else 0.2)
        for key, record in measured(bench).items()
    }
    *_, swapped = swap_closest(bench, 1)
    for distance, again in ((1.0, False), (1.3, True)):  # farther than twice 0.2, but not than twice prompt c's
        other = replace(records["sample", "a", "ngram"], ids=swapped, distance=distance)
        judgement = judge_all(bench, TASKS, {**records, other.key: other})[other.key]
        assert judgement.verdict == "tie" and (judgement.forward_distance is not None) == again


def test_logits_may_be_as_far_from_fp32_as_the_models_own_forward_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench.build(SETTINGS, load(tiny_target(dtype=torch.bfloat16), draft="none"))
    ids, answer, _, swapped = swap_closest(bench, 2)
    own = forward_distances(bench.model.target.model, bench.reference, ids, answer)
    usual = float(own.mean())  # of plain decoding, on another text
    records = {key: replace(record, noise=0.4, distance=usual) for key, record in measured(bench).items()}
    other = replace(records["sample", "a", "ngram"], ids=swapped, distance=3 * usual)
    judgement = judge_all(bench, TASKS, {**records, other.key: other})[other.key]
    assert judgement.verdict == "tie" and judgement.forward_distance == pytest.approx(float(own.max()))

    # an error at the position that rounds least
    least = int(own.argmin()) + 1
    answers = type(bench.methods[2]).answer

    def wrong(self: object, prompt: list[int], request: Request) -> Answer:
        found = answers(self, prompt, request)  # type: ignore[arg-type]
        if getattr(self, "name", "") == "ngram" and found.logits is not None:
            found.logits[least] += 3 * usual
        return found

    monkeypatch.setattr(type(bench.methods[2]), "answer", wrong)
    assert judge_all(bench, TASKS, {**records, other.key: other})[other.key].verdict == "bug"


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_new_tokens", -1), ("temperature", -0.5), ("repeats", 0), ("workers", 0), ("limit", 0), ("limit", -3)],
)
def test_negative_limits_are_refused_with_their_value(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"{name.replace('_', '-')} is {value}, needed at least"):
        replace(SETTINGS, **{name: value})  # type: ignore[arg-type]


def test_the_chart_is_a_picture_and_the_table_has_a_row_per_run(tmp_path: Path, bench: Bench) -> None:
    runs = summarise_runs(SETTINGS, TASKS, measured(bench), {})
    save_chart(runs, tmp_path / "chart.png", title="tiny")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
    assert table(runs).row_count == 3
    json.dumps(runs)
