"""Groupings of the head's rows: which rows are read together while drafting.

A grouping is a permutation of the vocabulary into equal slabs, the first of which are always read. A vocabulary that
the number of groups does not divide leaves places empty, spread over the groups; no row is ever dropped. Three ways
to group: by frequency rank ("contiguous"), balanced k-means on the head's rows ("kmeans"), and balanced k-means on
what the training answers have before each token ("cooccurrence"). CORAL groups the head's rows; how is ours to decide.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn import functional

from expkit.checkpoint import load_tensors, read_metadata, save_tensors
from expkit.errors import UsageError

if TYPE_CHECKING:
    from coral_spec.training.data import Answers

FILE = "grouping.safetensors"
EMPTY = -1
Kind = Literal["contiguous", "kmeans", "cooccurrence"]

ITERATIONS = 12  # of k-means
SAMPLE = 16_384  # points among which its beginning is sought
CHUNK = 8192  # rows or pairs in fp32 at once
SKETCH = 128  # width of the random projection of co-occurrence counts
WINDOW = 2  # tokens before a token that count as its context


@dataclass(frozen=True, eq=False)
class Grouping:
    """Equal groups of head rows.

    Attributes:
        slots: int64 ``(groups, rows)`` on the CPU: the token of every row of every slab, :data:`EMPTY` where there is
            none.
        always: leading groups that are read at every level.
        kind: how it was made.
    """

    slots: Tensor
    always: int
    kind: str

    def __post_init__(self) -> None:
        tokens = self.slots[self.slots != EMPTY].sort().values
        if not 0 <= self.always <= self.groups or not torch.equal(tokens, torch.arange(len(tokens))):
            raise UsageError("a grouping needs every token in exactly one group")

    @property
    def groups(self) -> int:
        """Slabs, those that are always read included."""
        return int(self.slots.shape[0])

    @property
    def rows(self) -> int:
        """Rows of a slab."""
        return int(self.slots.shape[1])

    @cached_property
    def vocab_size(self) -> int:
        """Tokens in all groups."""
        return int((self.slots != EMPTY).sum())

    @cached_property
    def group_of(self) -> Tensor:
        """int64 ``(vocab,)``: the group of every token."""
        found = torch.empty(self.vocab_size, dtype=torch.long)
        filled = self.slots != EMPTY
        found[self.slots[filled]] = torch.arange(self.groups)[:, None].expand_as(self.slots)[filled]
        return found

    @cached_property
    def digest(self) -> str:
        """Hexadecimal SHA-256 of the slabs' tokens and of how many slabs are always read."""
        content = self.slots.to(torch.int32).contiguous().numpy().tobytes()
        return hashlib.sha256(f"{self.groups}x{self.rows},{self.always};".encode() + content).hexdigest()

    def slabs(self, weight: Tensor) -> Tensor:
        """Rows of a head ``(vocab, ...)`` as slabs ``(groups, rows, ...)``; empty places are zero."""
        places = self.slots.to(weight.device)
        empty = (places == EMPTY).view(*places.shape, *[1] * (weight.dim() - 1))
        return weight[places.clamp(min=0)].masked_fill_(empty, 0)

    def save(self, folder: Path) -> None:
        """Write :data:`FILE` beside a drafter."""
        about = {"kind": self.kind, "always": str(self.always), "digest": self.digest, "format": "pt"}
        save_tensors(folder / FILE, {"slots": self.slots.to(torch.int32)}, about)

    @classmethod
    def load(cls, folder: Path, vocab_size: int) -> Grouping:
        """The grouping in ``folder``.

        Raises:
            UsageError: there is none, it is damaged, or it is one of another vocabulary.
        """
        path = folder / FILE
        slots, about = load_tensors(path).get("slots"), read_metadata(path)
        if slots is None or slots.dim() != 2 or not about.get("always", "").isdigit():
            raise UsageError(f"{path} holds no grouping of head rows")
        found = cls(slots.long(), int(about["always"]), about.get("kind", ""))
        if found.digest != about.get("digest"):
            raise UsageError(f"{path} is damaged: its digest is not that of its slabs")
        if found.vocab_size != vocab_size:
            raise UsageError(f"{path} groups a vocabulary of {found.vocab_size}, but the head has {vocab_size} rows")
        return found


def require_groups(groups: int, always: int, vocab: int) -> None:
    """UsageError for more groups than rows, or none left to choose: see :func:`make_grouping`."""
    if not 2 <= groups <= vocab:
        raise UsageError(f"{groups} groups of {vocab} head rows: needed 2 to {vocab}")
    if not 0 <= always < groups or always * -(-vocab // groups) + (groups - always) > vocab:
        raise UsageError(f"{always} of {groups} groups are always read, which leaves nothing to choose from")


def make_grouping(
    kind: Kind,
    groups: int,
    always: int,
    ranking: Tensor,
    *,
    weight: Tensor | None = None,
    answers: Answers | None = None,
    first: tuple[int, ...] = (),
    seed: int = 0,
) -> Grouping:
    """Group the head's rows.

    Args:
        kind: see the module; "kmeans" needs ``weight``, "cooccurrence" needs ``answers``.
        groups: slabs in all.
        always: of these, always read: they hold ``first`` and then the most frequent tokens.
        ranking: all token ids, most frequent first ``(vocab,)``.
        weight: the head ``(vocab, width)``, in any dtype, on any device.
        answers: training answers.
        first: tokens that are always read whatever their frequency, such as the end of the text.
        seed: of k-means' beginning; the same seed gives the same groups.

    Raises:
        UsageError: more groups than rows, or no group left to choose.
    """
    vocab = len(ranking)
    require_groups(groups, always, vocab)
    rows = -(-vocab // groups)
    marked = torch.zeros(vocab, dtype=torch.bool)
    marked[list(first)] = True
    ranking = ranking.long().cpu()
    order = torch.cat([torch.tensor(sorted(set(first)), dtype=torch.long), ranking[~marked[ranking]]])
    rest = order[always * rows :]
    routed = groups - always
    capacities = torch.full((routed,), len(rest) // routed)
    capacities[: len(rest) % routed] += 1
    if kind == "contiguous":
        labels = torch.repeat_interleave(torch.arange(routed), capacities)
    elif kind == "kmeans":
        assert weight is not None
        labels = balanced_kmeans(weight[rest.to(weight.device)], capacities, seed=seed)
    else:
        assert answers is not None
        labels = balanced_kmeans(context_profiles(answers, vocab, seed=seed)[rest], capacities, seed=seed)
    slots = torch.full((groups, rows), EMPTY)
    slots[:always] = order[: always * rows].view(always, rows)
    for group, members in enumerate(torch.split(rest[labels.argsort(stable=True)], capacities.tolist())):
        slots[always + group, : len(members)] = members
    return Grouping(slots, always, kind)


def balanced_kmeans(points: Tensor, capacities: Tensor, *, seed: int) -> Tensor:
    """Labels ``(points,)`` of clusters that hold exactly ``capacities`` points each.

    Spherical k-means on centred points: a part that all rows of a head share changes no probability. Each round points
    are given out by how much they would lose elsewhere. Memory beyond the points is 4 bytes x points x clusters. Ours.

    Args:
        points: ``(points, width)``, in any dtype.
        capacities: int64 ``(clusters,)`` with the sum ``points``.
        seed: of the points that clusters begin with.
    """
    device, count = points.device, len(points)
    parts = [slice(begin, min(begin + CHUNK, count)) for begin in range(0, count, CHUNK)]
    mean = torch.stack([points[part].float().sum(0) for part in parts]).sum(0) / count

    def unit(part: slice | Tensor) -> Tensor:
        return functional.normalize(points[part].float() - mean, dim=-1)

    generator = torch.Generator().manual_seed(seed)
    sample = unit(torch.randperm(count, generator=generator)[:SAMPLE].to(device))
    centres = _spread(sample, len(capacities), generator)
    capacities, labels = capacities.to(device), torch.empty(0, dtype=torch.long, device=device)
    for _ in range(ITERATIONS):
        before, labels = labels, _give_out(torch.cat([unit(part) @ centres.T for part in parts]), capacities)
        if torch.equal(before, labels):
            break
        sums = torch.zeros_like(centres)
        for part in parts:  # a product, since adding by index is in no fixed order on a GPU
            sums += functional.one_hot(labels[part], len(capacities)).T.float() @ unit(part)
        centres = functional.normalize(sums, dim=-1)
    return labels.cpu()


def _spread(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Unit points to begin with, each drawn by its squared distance from those before it (k-means++)."""
    chosen = [0]
    distance = torch.full((len(points),), float("inf"), device=points.device)
    for _ in range(count - 1):
        distance = torch.minimum(distance, (1 - points @ points[chosen[-1]]).clamp(min=0))
        distance[chosen[-1]] = 0
        weights = distance.cpu()
        if not weights.any():  # all the others are copies of points that were drawn
            weights = torch.ones_like(weights).index_fill_(0, torch.tensor(chosen), 0)
        chosen.append(int(torch.multinomial(weights, 1, generator=generator)))
    return points[chosen]


def _give_out(scores: Tensor, capacities: Tensor) -> Tensor:
    """The cluster of every point: the best that has room, first to those that would lose most by their second choice.

    Args:
        scores: ``(points, clusters)``.
        capacities: ``(clusters,)``.
    """
    room = capacities.clone()
    labels = torch.full((len(scores),), -1, device=scores.device)
    free = torch.arange(len(scores), device=scores.device)
    while len(free):
        scores = scores.masked_fill(room == 0, float("-inf"))
        best = scores.topk(min(2, scores.shape[1]), dim=1)
        choice, loss = best.indices[:, 0], best.values[:, 0] - best.values[:, -1]
        order = loss.argsort(descending=True, stable=True)
        order = order[choice[order].argsort(stable=True)]
        wanted = torch.bincount(choice, minlength=len(room))
        chosen = choice[order]
        place = torch.arange(len(order), device=order.device) - (wanted.cumsum(0) - wanted)[chosen]
        taken = place < room[chosen]
        labels[free[order[taken]]] = chosen[taken]
        room = room - torch.minimum(wanted, room)
        left = order[~taken].sort().values
        free, scores = free[left], scores[left]
    return labels


def context_profiles(answers: Answers, vocab_size: int, *, seed: int) -> Tensor:
    """What the answers have before each token: ``(vocab, SKETCH)`` fp32, zero for tokens that never occur.

    Tokens that follow the same tokens are alternatives of one another, and so wanted together. Counts of the
    :data:`WINDOW` tokens before are divided by the root of those tokens' frequencies and projected at random.
    """
    tokens = answers.tokens.long()
    index = torch.arange(len(tokens))
    row = torch.bucketize(index, answers.offsets[1:], right=True)
    inside = index - answers.offsets[row]
    frequency = torch.bincount(tokens, minlength=vocab_size).clamp(min=1).float()
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(vocab_size, SKETCH, generator=generator) / frequency.sqrt()[:, None]
    profiles = torch.zeros(vocab_size, SKETCH)
    for back in range(1, WINDOW + 1):
        counted = ((inside >= answers.prompt_lengths[row]) & (inside >= back)).nonzero().squeeze(1)
        for part in counted.split(CHUNK):  # type: ignore[no-untyped-call]
            profiles.index_add_(0, tokens[part], directions[tokens[part - back]])
    return profiles
