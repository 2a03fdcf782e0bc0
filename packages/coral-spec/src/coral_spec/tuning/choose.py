"""The tree that should give the most tokens per second, chosen anew when acceptance departs from the profile."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from coral_spec.tree import TreeShape
from coral_spec.tuning.acceptance import Acceptance
from coral_spec.tuning.costs import StepCosts

TYPICAL = 1.2  # hardness to begin with: the profile's long answers to simple prompts are easier than most text
# Text differs: the bundled drafter met hardness 0.6 (GSM8K), 1.2 (HumanEval) and 1.8 (MT-bench) in 128-token answers.
SPREAD = (0.5, 1.0, 1.5)
MEMORY = 200  # rounds: an answer of n rounds moves the estimate by n / (n + MEMORY) of its difference
# Shapes within this share of the best count as good as it. A captured round takes what it was timed at, to a percent;
# on a CPU rounds take longer among other work than when they are timed, the more so the more rows they have.
NEAR, NEAR_UNCAPTURED = 0.99, 0.96
GAIN = 1.03  # another shape must promise this much more
LIKELY = (0.5, 0.8, TYPICAL, 1.8, 2.4)  # hardness from easy to hard text, whose trees are made ready in advance


@dataclass(frozen=True)
class Choice:
    """A shape with what is expected of it.

    Attributes:
        shape: None is plain decoding.
        tau: tokens per round.
        milliseconds: of a round.
    """

    shape: TreeShape | None
    tau: float
    milliseconds: float

    @property
    def tokens_per_second(self) -> float:
        """While decoding, prefill not counted."""
        return 1e3 * self.tau / self.milliseconds


def expect(shape: TreeShape | None, costs: StepCosts, acceptance: Acceptance, hardness: float = TYPICAL) -> Choice:
    """What a shape should give."""
    return Choice(shape, acceptance.tau(shape, hardness), costs.round(shape))


def choose(
    costs: StepCosts,
    acceptance: Acceptance,
    hardness: float = TYPICAL,
    *,
    plain: bool = True,
    spread: Sequence[float] = SPREAD,
    among: Collection[TreeShape | None] | None = None,
) -> Choice:
    """The best of the profile's shapes and, with ``plain``, of not drafting at all, for text that differs.

    Others than those in ``among`` are left out, if it is given; of one shape at least something must be known.

    The best is the one that is soonest done with as many tokens of every hardness in ``spread`` times ``hardness``.
    Of shapes that are as good, it is the one with the shortest rounds.

    Products of small matrices cost in steps, so only numbers of rows that were timed themselves are trusted.
    """
    timed = [shape for shape in acceptance.survival if shape.budget + 1 in costs.verify]
    shapes = [shape for shape in [*timed, *([None] if plain else [])] if among is None or shape in among]
    choices = [average(shape, costs, acceptance, hardness, spread) for shape in shapes]
    best = max(choice.tokens_per_second for choice in choices)
    share = NEAR if costs.change else NEAR_UNCAPTURED
    near = [choice for choice in choices if choice.tokens_per_second >= share * best]
    return min(near, key=lambda choice: choice.milliseconds)


def average(
    shape: TreeShape | None,
    costs: StepCosts,
    acceptance: Acceptance,
    hardness: float,
    spread: Sequence[float] = SPREAD,
) -> Choice:
    """What a shape should give over as many tokens of every hardness in ``spread`` times ``hardness``."""
    rounds = sum(1 / acceptance.tau(shape, hardness * share) for share in spread)  # a token
    return Choice(shape, len(spread) / rounds, costs.round(shape))


class Tuner:
    """The current choice, kept in step with running acceptance.

    Args:
        costs: of this machine.
        acceptance: the drafter's own profile, or another one's to begin with.
        own: whether it is the drafter's own; else it drafts in any case until answers have shown what is accepted.

    Attributes:
        shape: the tree to draft with; None is plain decoding, which is kept, since nothing tells when it ceases to pay.
        hardness: of the text so far, see :mod:`coral_spec.tuning.acceptance`.
        lost: milliseconds that a better shape would have saved since the last change. An engine that captures its
            rounds pays for every new shape, so it is taken when as much has been lost as the change costs; the best of
            those that are captured already is taken at once.
    """

    def __init__(self, costs: StepCosts, acceptance: Acceptance, *, own: bool = True) -> None:
        self.costs, self.acceptance = costs, acceptance
        self.hardness, self.lost = TYPICAL, 0.0
        self.shape = choose(costs, acceptance, plain=own).shape

    @property
    def likely(self) -> list[TreeShape]:
        """Other trees than the current one that text may ask for."""
        found = [choose(self.costs, self.acceptance, hardness).shape for hardness in LIKELY]
        return [shape for shape in dict.fromkeys(found) if shape not in (None, self.shape)]

    def note(
        self, shape: TreeShape | None, accept_lengths: Sequence[int], ready: Collection[TreeShape | None] = ()
    ) -> None:
        """Learn from the rounds of one answer, which were drafted with ``shape``; may change :attr:`shape`.

        Args:
            shape: None is plain decoding, which teaches nothing.
            accept_lengths: drafted tokens that each round accepted.
            ready: shapes that cost nothing to change to.
        """
        if shape is None or self.shape is None or not accept_lengths:
            return
        rounds = len(accept_lengths)
        expected = self.acceptance.tau(shape, self.hardness)
        observed = 1.0 + sum(accept_lengths) / rounds
        tau = expected + (observed - expected) * rounds / (rounds + MEMORY)
        self.hardness = self.acceptance.hardness(shape, tau)
        now = average(self.shape, self.costs, self.acceptance, self.hardness)
        free = choose(self.costs, self.acceptance, self.hardness, among={self.shape, *ready})
        if free.tokens_per_second > GAIN * now.tokens_per_second:
            self.shape, self.lost, now = free.shape, 0.0, free
        best = choose(self.costs, self.acceptance, self.hardness)
        if best.tokens_per_second <= GAIN * now.tokens_per_second:
            self.lost = 0.0
            return
        self.lost += rounds * now.milliseconds * (1 - now.tokens_per_second / best.tokens_per_second)
        if self.lost >= self.costs.change:
            self.shape, self.lost = best.shape, 0.0
