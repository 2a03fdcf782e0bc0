"""The safety gate (ours): a finished domain is measured on held-out source images, then accepted or refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from expkit.device import tf32
from pden.generators import Generator
from pden.losses import diversity
from pden.losses.safety import IGNORED
from pden.models import TaskModel
from pden.training.config import GateConfig
from pden.training.stream import Stream

_CHUNK = 256
_ENOUGH = 20  # images of a class that tell its agreement


@dataclass(frozen=True)
class DomainReport:
    """What was measured of a domain.

    Attributes:
        round, attempt: which; the first attempt is 0.
        kind: of its generator.
        agreement: share of held-out images (or pixels) that the task model labels rightly in the domain.
        worst_class: the same of the class that it labels rightly least; None for segmentation, and where no class has
            enough images.
        judge_agreement: the same for the judge, which has seen the source alone.
        distance: from the source: 1 - cosine of the judge's features, mean over images.
        novelty: the least such distance from an earlier domain; None for the first.
        diversity: mean absolute difference of two draws.
        verdict: accepted, retrain or dropped; recorded where the gate only measures.
        reasons: what it fell short of.
        warning: that the generator has collapsed, or nothing.
    """

    round: int
    attempt: int
    kind: str
    agreement: float
    judge_agreement: float
    distance: float
    novelty: float | None
    diversity: float
    verdict: str = "recorded"
    reasons: tuple[str, ...] = ()
    warning: str = ""
    worst_class: float | None = None

    @property
    def kept(self) -> bool:
        """Whether the domain joins the pool."""
        return self.verdict in ("accepted", "recorded")

    def plain(self) -> dict[str, Any]:
        """As a dictionary for JSON and checkpoints."""
        return {**asdict(self), "reasons": list(self.reasons)}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> DomainReport:
        """Back from `plain`."""
        return cls(**{**plain, "reasons": tuple(plain["reasons"])})


@dataclass(frozen=True)
class Measures:
    """The judge's view of one domain: features ``(images, width)``, normalised, and both agreements.

    Attributes:
        chance: agreement of one answer for all images, the best one.
        worst_class: see `DomainReport`.
    """

    features: Tensor
    agreement: float
    judge_agreement: float
    diversity: float
    chance: float
    worst_class: float | None = None


@torch.no_grad()
@tf32(False)
def measure(
    task: TaskModel, judge: TaskModel, generator: Generator | None, images: Tensor, labels: Tensor, stream: Stream
) -> Measures:
    """Measure a domain; without a generator, the source itself. Both models must be in eval mode.

    Args:
        images: held-out source images in [0, 1].
        stream: for the noise; the same stream gives the same figures.
    """
    features, rights, judged, difference = [], [], 0.0, 0.0
    for part, answer in zip(torch.split(images, _CHUNK), torch.split(labels, _CHUNK), strict=True):
        made = part if generator is None else generator(part, generator=stream.torch)
        if generator is not None:
            difference += float(diversity(made, generator(part, generator=stream.torch))) * len(part)
        seen, counts = judge.full(made), answer != IGNORED if answer.dim() == 3 else torch.ones_like(answer).bool()
        features.append(F.normalize(seen.features.float(), dim=1))
        rights.append((task(made).argmax(1) == answer) & counts)
        judged += float(((seen.logits.argmax(1) == answer) & counts).sum())
    right = torch.cat(rights)
    dense = labels.dim() == 3
    total = max(1.0, float((labels != IGNORED).sum()) if dense else float(len(labels)))
    of_class = torch.bincount(labels) if not dense else None
    chance = 1 / task.classes if of_class is None else float(of_class.max()) / total
    worst = None
    if of_class is not None and bool((of_class >= _ENOUGH).any()):
        shares = torch.bincount(labels, weights=right.float()) / of_class
        worst = float(shares[of_class >= _ENOUGH].min())
    agreements = float(right.sum()) / total, judged / total
    return Measures(torch.cat(features), *agreements, difference / len(images), chance, worst)


@torch.no_grad()
def two_draws(generator: Generator, images: Tensor, stream: Stream) -> float:
    """The diversity of two draws for images in [0, 1]."""
    parts = torch.split(images, _CHUNK)
    draws = [diversity(*(generator(part, generator=stream.torch) for _ in range(2))) * len(part) for part in parts]
    return float(torch.stack(draws).sum()) / len(images)


def collapse_warning(diversity: float, gate: GateConfig, round: int) -> str:
    """A sentence where a generator's draws differ by less than the gate's floor, else nothing."""
    if diversity >= gate.collapse:
        return ""
    return f"round {round}: the generator has collapsed (diversity {diversity:.4f} < {gate.collapse:g})"


def distance(first: Measures, second: Measures) -> float:
    """1 - cosine of the judge's features of the same images, mean over images; 0 to 2."""
    return float(1 - (first.features * second.features).sum(dim=1).mean())


def judge_limit(gate: GateConfig, chance: float) -> float:
    """The judge's least agreement: so many times chance, or halfway from chance to all where one class is so frequent
    that this would ask for more."""
    return min(gate.judge_over_chance * chance, (1 + chance) / 2)


def judge_domain(
    found: Measures,
    source: Measures,
    earlier: Sequence[Measures],
    gate: GateConfig,
    *,
    round: int,
    attempt: int,
    kind: str,
) -> DomainReport:
    """The report of a domain, with its verdict."""
    far = distance(found, source)
    novelty = min((distance(found, each) for each in earlier), default=None)
    limits = [
        ("label agreement", found.agreement, gate.agreement),
        ("label agreement of the worst class", found.worst_class, gate.worst_class),
        ("label agreement of the judge", found.judge_agreement, judge_limit(gate, found.chance)),
        ("distance from the source", far, gate.distance),
        ("novelty", novelty, gate.novelty),
    ]
    reasons = tuple(
        f"{what} {value:.3f} < {least:.3g}" for what, value, least in limits if value is not None and not value >= least
    )
    verdict = "recorded"
    if gate.mode == "on":
        verdict = "accepted" if not reasons else ("retrain" if attempt < gate.retries else "dropped")
    return DomainReport(
        round,
        attempt,
        kind,
        found.agreement,
        found.judge_agreement,
        far,
        novelty,
        found.diversity,
        verdict,
        reasons,
        collapse_warning(found.diversity, gate, round),
        found.worst_class,
    )
