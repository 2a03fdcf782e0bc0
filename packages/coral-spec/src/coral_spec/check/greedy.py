"""Greedy decoding with a draft against plain decoding, prompt by prompt, by the rule of `coral_spec.check.noise`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from coral_spec.check.noise import (
    Identical,
    Judgement,
    Mismatch,
    Rounding,
    find_mismatch,
    forward_distances,
    is_far,
    judge,
    largest_distance,
    logit_distance,
    margin_noise,
    position_distances,
    reference_logits,
    summarise,
)

if TYPE_CHECKING:
    from coral_spec.model import Model


@dataclass(frozen=True)
class GreedyReport:
    """Outcome of `check_greedy`.

    Attributes:
        dtype: working precision, such as "bfloat16".
        judgements: one per prompt.
        noise: largest margin noise of the baseline over the run; a judgement's own may be larger, see
            `coral_spec.check.noise`.
        baseline_distance: largest distance of the baseline's logits from fp32.
        distance: the same of the drafted run.
        tokens: how many tokens were compared.
        rounds: target forwards of the drafted run after prefill.
    """

    dtype: str
    judgements: list[Judgement]
    noise: float
    baseline_distance: float
    distance: float
    tokens: int
    rounds: int

    @property
    def identical(self) -> Identical:
        """One word for all prompts."""
        return summarise(judgement.verdict for judgement in self.judgements)

    @property
    def passed(self) -> bool:
        """No bug."""
        return self.identical != "bug"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **{name: value for name, value in vars(self).items() if name != "judgements"},
            "identical": self.identical,
            "passed": self.passed,
            "prompts": [vars(judgement) for judgement in self.judgements],
        }


@dataclass(frozen=True)
class _Pair:
    mismatch: Mismatch | None
    noise: float
    own_noise: float
    baseline_distance: float
    distances: Tensor
    prompt: list[int]
    ids: list[int]
    rounds: int

    @property
    def distance(self) -> float:
        return largest_distance(self.distances)


def check_greedy(
    model: Model,
    reference: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    on_prompt: Callable[[int], None] = lambda index: None,
) -> GreedyReport:
    """Decode every prompt plainly and with the model's draft, and classify every first mismatch.

    Args:
        model: with the draft to be checked; plain decoding shares its weights.
        reference: the same weights in fp32 (`coral_spec.check.noise.reference_model`).
        prompts: token ids.
        max_new_tokens: per prompt.
        on_prompt: called after each prompt, with its index.
    """
    plain = model.with_draft("none")
    pairs: list[_Pair] = []
    for index, prompt in enumerate(prompts):
        pairs.append(_compare(plain, model, reference, list(prompt), max_new_tokens))
        on_prompt(index)
    noise = max(pair.noise for pair in pairs)
    baseline_distance = max(pair.baseline_distance for pair in pairs)

    def rounding(pair: _Pair) -> Rounding | None:
        """Of the model's own forward, where the drafted run's logits are too far without it."""
        if not is_far(pair.distance, baseline_distance):
            return None
        own = forward_distances(model.target.model, reference, pair.prompt, pair.ids)
        return Rounding.of(pair.distances, baseline_distance, own)

    dtype = model.target.dtype
    return GreedyReport(
        dtype=str(dtype).removeprefix("torch."),
        judgements=[
            judge(
                p.mismatch,
                dtype,
                noise=noise,
                own_noise=p.own_noise,
                distance=p.distance,
                baseline_distance=baseline_distance,
                rounding=rounding(p),
            )
            for p in pairs
        ],
        noise=noise,
        baseline_distance=baseline_distance,
        distance=max(pair.distance for pair in pairs),
        tokens=sum(len(pair.ids) for pair in pairs),
        rounds=sum(pair.rounds for pair in pairs),
    )


def _compare(plain: Model, drafted: Model, reference: nn.Module, prompt: list[int], max_new_tokens: int) -> _Pair:
    baseline = plain.generate(prompt, max_new_tokens=max_new_tokens, record_logits=True)
    other = drafted.generate(prompt, max_new_tokens=max_new_tokens, record_logits=True)
    assert baseline.logits is not None and other.logits is not None
    exact = reference_logits(reference, prompt, baseline.token_ids)
    mismatch = find_mismatch(reference, prompt, baseline.token_ids, other.token_ids)
    own = exact if mismatch is None else reference_logits(reference, prompt, other.token_ids)
    return _Pair(
        mismatch=mismatch,
        noise=margin_noise(baseline.logits, exact),
        own_noise=margin_noise(other.logits, own),
        baseline_distance=logit_distance(baseline.logits, exact),
        distances=position_distances(other.logits, own),
        prompt=prompt,
        ids=other.token_ids,
        rounds=other.statistics.rounds,
    )
