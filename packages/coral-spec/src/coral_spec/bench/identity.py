"""Are a method's greedy ids those of plain decoding? Every first mismatch is classified after the timed runs.

The rule is that of `coral_spec.check.noise`. Its noise and the baseline's distance from fp32 are the largest over the
baseline's positions of the run; here prompts are added until both cover a mismatch, which is the same answer with less
work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from torch import Tensor

from coral_spec.bench.records import Record
from coral_spec.bench.runner import Bench
from coral_spec.bench.tasks import Prompt
from coral_spec.check.noise import (
    Judgement,
    Rounding,
    find_mismatch,
    first_difference,
    forward_distances,
    is_far,
    is_tie,
    judge,
    logit_distance,
    margin_noise,
    position_distances,
    reference_logits,
)

BASELINE = "ar"


@dataclass
class Identity:
    """Judges records against the baseline's; what a record does not hold already is decoded again.

    Attributes:
        bench: the target and the methods.
        prompts: the prompts of one task.
        baselines: the records of `ar` by prompt id.
        noise, baseline_distance: the largest so far, over the prompts in `measured`.
    """

    bench: Bench
    task: str
    prompts: Sequence[Prompt]
    baselines: Mapping[str, Record]
    noise: float = 0.0
    baseline_distance: float = 0.0
    measured: set[str] = field(default_factory=set)

    def judge(self, prompt: Prompt, record: Record) -> Judgement:
        """Tie or bug, if the ids differ at all."""
        baseline = self.baselines[prompt.id]
        if first_difference(baseline.ids, record.ids) is None:
            return Judgement("exact")
        ids = self.bench.encode(self.task, prompt)
        mismatch = find_mismatch(self.bench.reference, ids, baseline.ids, record.ids)
        assert mismatch is not None
        self._measure_noise(prompt)
        dtype = self.bench.model.target.dtype
        noise, distance = record.noise, record.distance
        if noise is None or distance is None:
            noise, distance = self._against_fp32(ids, record.method)
        verdict = partial(judge, mismatch, dtype, own_noise=noise, distance=distance)
        found = verdict(noise=self.noise, baseline_distance=self.baseline_distance)
        hopeless = not is_tie(mismatch, float("inf"), dtype)
        for other in self.prompts:
            if found.verdict != "bug" or hopeless:
                break
            self._measure_noise(other)
            found = verdict(noise=self.noise, baseline_distance=self.baseline_distance)
        if is_far(distance, self.baseline_distance) and not hopeless:
            rounding = self._rounding(ids, record.method)
            found = verdict(noise=self.noise, baseline_distance=self.baseline_distance, rounding=rounding)
        return found

    def _measure_noise(self, prompt: Prompt) -> None:
        if prompt.id in self.measured:
            return
        self.measured.add(prompt.id)
        ids = self.bench.encode(self.task, prompt)
        baseline = self.baselines[prompt.id]
        noise, distance = baseline.noise, baseline.distance
        if noise is None or distance is None:
            noise, distance = self._against_fp32(ids, BASELINE)
        self.noise, self.baseline_distance = max(self.noise, noise), max(self.baseline_distance, distance)

    def _against_fp32(self, ids: list[int], name: str) -> tuple[float, float]:
        """Margin noise and distance of a method's logits for a prompt, which it answers once more."""
        _, logits, exact = self._answer(ids, name)
        return margin_noise(logits, exact), logit_distance(logits, exact)

    def _rounding(self, ids: list[int], name: str) -> Rounding:
        """Of a method's answer to a prompt."""
        answer, logits, exact = self._answer(ids, name)
        own = forward_distances(self.bench.model.target.model, self.bench.reference, ids, answer)
        return Rounding.of(position_distances(logits, exact), self.baseline_distance, own)

    def _answer(self, ids: list[int], name: str) -> tuple[list[int], Tensor, Tensor]:
        """A method's answer to a prompt, given once more, its logits, and the same in fp32."""
        method = next(each for each in self.bench.methods if each.name == name)
        answer = method.answer(ids, replace(self.bench.settings.request, record_logits=True))
        assert answer.logits is not None
        return answer.ids, answer.logits, reference_logits(self.bench.reference, ids, answer.ids)


def judge_all(
    bench: Bench, tasks: dict[str, list[Prompt]], records: dict[tuple[str, str, str], Record]
) -> dict[tuple[str, str, str], Judgement]:
    """A judgement for every record, by its key; empty above temperature 0 or without `ar` among the methods."""
    if bench.settings.temperature > 0 or BASELINE not in bench.settings.methods:
        return {}
    judgements: dict[tuple[str, str, str], Judgement] = {}
    for task, prompts in tasks.items():
        baselines = {prompt.id: records[task, prompt.id, BASELINE] for prompt in prompts}
        identity = Identity(bench, task, prompts, baselines)
        for prompt in prompts:
            for method in bench.methods:
                if method.name != BASELINE:
                    record = records[task, prompt.id, method.name]
                    judgements[record.key] = identity.judge(prompt, record)
    return judgements
