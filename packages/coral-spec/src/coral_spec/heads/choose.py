"""From what the user calls a head to the head itself."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path

from coral_spec.backbone import Backbone
from coral_spec.drafter import Drafter, load_ranking
from coral_spec.grouping import FILE as GROUPING
from coral_spec.grouping import Grouping
from coral_spec.heads.frequency import FrequencyHead
from coral_spec.heads.full import FullHead
from coral_spec.heads.interface import ProposalHead
from coral_spec.heads.low_rank import FILE as LOW_RANK
from coral_spec.heads.low_rank import LowRankFactors, LowRankHead
from coral_spec.heads.routed import RoutedHead
from coral_spec.router import FILE as ROUTER
from coral_spec.router import SCORES, Routing, Scores
from expkit.errors import UsageError

NEEDED = (
    "auto, full, frequency, a number of rows, routed, routed:GROUPS, routed:GROUPS,SCORES "
    f"(SCORES: {' or '.join(SCORES)}), low-rank or low-rank:RANK"
)
FREQUENT_ROWS = {"cpu": 8192, "cuda": 16384}
FEWEST_ROWS = 64
WORTH_ROUTING = 0.1  # share of a draft step's weights that a router must spare
SMALLEST_GROUP = 2**21  # weights: with 0.2 and 1.3 million the static head of FREQUENT_ROWS was at least as fast


@dataclass(frozen=True)
class HeadChoice:
    """What was asked for.

    Attributes:
        kind: auto, full, frequency, routed or low-rank.
        size: rows, active groups or rank; None for the default.
        scores: of a routed head; None for what its file says.
    """

    kind: str
    size: int | None = None
    scores: Scores | None = None

    @classmethod
    def parse(cls, head: str | int) -> HeadChoice:
        """Read `--head`.

        Raises:
            UsageError: it is none of :data:`NEEDED`.
        """
        wrong = UsageError(f"head is {head!r}, needed {NEEDED}")
        text = str(head)
        if text.isdecimal():
            if int(text) < FEWEST_ROWS:
                raise UsageError(f"head is {head!r}, needed {NEEDED}; a number from {FEWEST_ROWS} on")
            return cls("frequency", int(text))
        kind, colon, options = text.partition(":")
        if kind not in ("auto", "full", "frequency", "routed", "low-rank"):
            raise wrong
        if not colon:
            return cls(kind)
        size, comma, name = options.partition(",")
        scores = next((each for each in SCORES if each == name), None)
        if kind not in ("routed", "low-rank") or not size.isdecimal():
            raise wrong
        if comma and (kind == "low-rank" or scores is None):
            raise wrong
        return cls(kind, int(size), scores)


def make_head(backbone: Backbone, folder: Path, choice: HeadChoice, drafter: Drafter) -> ProposalHead:
    """The head of a drafter's folder.

    ``auto`` is the router where there is one and its groups are not too small, else the most frequent rows where they
    are known, else all rows.

    Raises:
        UsageError: the folder lacks what the head needs, or has it for another model.
    """
    ranking = load_ranking(folder, backbone.vocab_size)
    kind = choice.kind
    if kind == "auto":
        kind = "full" if ranking is None else "frequency"
        routable = (folder / ROUTER).is_file() and (folder / GROUPING).is_file()
        if routable and (ranking is None or _group_weights(backbone, folder) >= SMALLEST_GROUP):
            kind = "routed"
    if kind == "full":
        return FullHead(backbone)
    if kind == "frequency":
        if ranking is None:
            raise UsageError(f"head is {kind!r}, but drafter {folder} has no frequency.safetensors; needed 'full'")
        rows = choice.size or FREQUENT_ROWS[backbone.target.device.type]
        return FrequencyHead(backbone, ranking, rows)
    if kind == "low-rank":
        return LowRankHead(backbone, _factors(backbone, folder, choice.size))
    routing = Routing.load(folder, backbone.target, backbone.vocab_size, backbone.hidden_size)
    routing = replace(
        routing, active=routing.active if choice.size is None else choice.size, scores=choice.scores or routing.scores
    )
    warn_small_head(routing, sum(part.numel() for part in drafter.parameters()), backbone.hidden_size)
    return RoutedHead(backbone, routing)


def _group_weights(backbone: Backbone, folder: Path) -> int:
    """Of one group of head rows."""
    return Grouping.load(folder, backbone.vocab_size).rows * backbone.hidden_size


def _factors(backbone: Backbone, folder: Path, rank: int | None) -> LowRankFactors:
    weight = backbone.output.weight
    if (folder / LOW_RANK).is_file():
        factors = LowRankFactors.load(folder, backbone.target, (backbone.vocab_size, backbone.hidden_size))
        if rank in (None, factors.rank):
            return factors
        warnings.warn(
            f"low-rank:{rank} is not trained, only {factors.rank} is: it is cut out of the head", stacklevel=3
        )
    return LowRankFactors.of_head(weight.detach(), max(1, int(weight.shape[1]) // 4) if rank is None else rank)


def spared_share(routing: Routing, drafter_weights: int, width: int) -> float:
    """Share of the weights that a draft step would read with all head rows which it need not read with the router."""
    router = sum(part.numel() for part in routing.router.parameters())
    full = drafter_weights + routing.grouping.vocab_size * width
    return 1 - (drafter_weights + router + routing.rows * width) / full


def warn_small_head(routing: Routing, drafter_weights: int, width: int) -> None:
    """Say so where routing cannot pay."""
    spared = spared_share(routing, drafter_weights, width)
    if spared < WORTH_ROUTING:
        warnings.warn(
            f"routing {routing.grouping.vocab_size} head rows spares about {max(0.0, spared):.0%} of a draft step's "
            "weights, which will hardly pay; --head full reads them all",
            stacklevel=2,
        )
