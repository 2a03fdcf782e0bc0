"""What a drafter would bring on this machine, before there is one.

Timed are whole rounds of the engine with a drafter of the right sizes and random weights, and its head alone. How much
a drafter gets right is not known yet, so it is a parameter: tokens per round in EAGLE-2's tree (depth 6, width 10, 60
nodes), the tau that papers report. How the same drafter fares in smaller trees and with fewer head rows follows the
bundled drafter's profile at the hardness that gives this tau. Ours.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from coral_spec.backbone import Backbone
from coral_spec.drafter import Drafter, DrafterConfig
from coral_spec.drafts import DrafterDraft, NoDraft
from coral_spec.engine import Session
from coral_spec.heads import FrequencyHead, FullHead, ProposalHead
from coral_spec.layers import FusedDrafter
from coral_spec.tree import TreeShape
from coral_spec.tuning.acceptance import Acceptance
from coral_spec.tuning.choose import Choice, choose
from coral_spec.tuning.costs import CAPACITY, StepCosts, measure
from expkit.device import synchronize

REFERENCE = TreeShape(6, 10, 60)
TAUS = (1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0)
REPEATS = 7


@dataclass(frozen=True)
class HeadEstimate:
    """Costs with one kind of proposal head.

    Attributes:
        rows: of the head.
        head: by width: milliseconds of the head alone.
        costs: of whole rounds.
        acceptance: the bundled drafter's profile with about this share of the rows.
    """

    rows: int
    head: dict[int, float]
    costs: StepCosts
    acceptance: Acceptance

    def best(self, hardness: float) -> Choice:
        """The best tree, drafting in any case."""
        return choose(self.costs, self.acceptance, hardness, plain=False, spread=(1.0,))

    def speedup(self, choice: Choice) -> float:
        """Over plain decoding."""
        return choice.tau * self.costs.plain / choice.milliseconds


@dataclass(frozen=True)
class Estimate:
    """What was timed: the full head first, then the reduced one where it is smaller.

    Attributes:
        heads: by kind, ``full`` and ``reduced``.
    """

    heads: dict[str, HeadEstimate]

    def hardness(self, tau: float) -> float:
        """At which the reference tree with the full head gives ``tau``."""
        return self.heads["full"].acceptance.hardness(REFERENCE, tau)

    def rows(self, taus: tuple[float, ...] = TAUS) -> list[dict[str, Any]]:
        """Per tau of the reference tree, the best shape of each head with its tau and speed-up over ``ar``."""
        found = []
        for tau in taus:
            hardness = self.hardness(tau)
            row: dict[str, Any] = {"tau": tau}
            for kind, head in self.heads.items():
                best = head.best(hardness)
                row[kind] = {"tree": str(best.shape), "tau": best.tau, "speedup": head.speedup(best)}
            found.append(row)
        return found

    def break_even(self) -> float | None:
        """The least reference tau with a speed-up; None when even the highest of :data:`TAUS` brings none."""
        steps = [1.05 + 0.05 * step for step in range(round((TAUS[-1] - 1.05) / 0.05) + 1)]
        return next((tau for tau in steps if self.gain(tau) > 1.0), None)

    def gain(self, tau: float) -> float:
        """Speed-up of the better head."""
        hardness = self.hardness(tau)
        return max(head.speedup(head.best(hardness)) for head in self.heads.values())


def estimate(backbone: Backbone, rows: int, profile: Callable[[int], Acceptance]) -> Estimate:
    """Time everything.

    Args:
        rows: of the reduced head.
        profile: the acceptance profile for a number of rows.
    """
    with torch.random.fork_rng(devices=[]):
        random = Drafter(DrafterConfig.from_target(backbone.target))
    drafter = FusedDrafter(random.to(backbone.target.device, backbone.target.dtype).eval().requires_grad_(False))
    heads: dict[str, ProposalHead] = {"full": FullHead(backbone)}
    if rows < backbone.vocab_size:
        heads["reduced"] = FrequencyHead(backbone, torch.arange(rows), rows)
    timed: dict[str, StepCosts] = {}
    for kind, head in heads.items():

        def session(shape: TreeShape | None, head: ProposalHead = head) -> Session:
            return Session(backbone, DrafterDraft(backbone, drafter, head, shape) if shape else NoDraft(), CAPACITY)

        timed[kind] = measure(session, most_rows=head.rows, cuda=backbone.target.device.type == "cuda")
    plain = min(costs.plain for costs in timed.values())  # the same for all heads
    return Estimate(
        {
            kind: HeadEstimate(
                head.rows,
                {width: _time_head(backbone, head, width) for width in timed[kind].level},
                replace(timed[kind], plain=plain),
                profile(head.rows),
            )
            for kind, head in heads.items()
        }
    )


@torch.inference_mode()
def _time_head(backbone: Backbone, head: ProposalHead, width: int) -> float:
    device = backbone.target.device
    features = torch.randn(1, width, backbone.hidden_size, dtype=backbone.target.dtype, device=device)
    times = []
    for _ in range(REPEATS + 1):
        synchronize(device)
        started = time.perf_counter()
        head.top(features, width)
        synchronize(device)
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times[1:])
