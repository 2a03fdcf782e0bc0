"""One target draw per node that is looked at, with noise keyed to (seed, position).

A draw is the arg-max of the warped logits plus Gumbel noise that depends on the seed, the position of the token and
its id alone. So a token that is drawn inside a tree is the token that plain decoding draws at that position with
that seed, up to ties of working precision, and speculative decoding is lossless because it only ever keeps draws
from the target. Source: the Gumbel-max trick; keying it to the position is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from coral_spec import kernels
from expkit.errors import UsageError

if TYPE_CHECKING:
    from coral_spec.tree import Tree

SHORTLIST = 2048  # most probable tokens among which a nucleus is looked for first
# splitmix64's constants (Steele, Lea and Flood, 2014), as signed 64-bit integers.
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn, in transformers' order: temperature, top-k, top-p. Temperature 0 is greedy.

    Attributes:
        temperature: divides the logits; 0 takes the most probable token.
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: keep the smallest set of most probable tokens whose mass reaches top_p; 1 keeps all.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise UsageError(f"temperature is {self.temperature}, needed a finite number >= 0")
        if self.top_k < 0:
            raise UsageError(f"top_k is {self.top_k}, needed 0 (all tokens) or more")
        if not 0.0 < self.top_p <= 1.0:
            raise UsageError(f"top_p is {self.top_p}, needed above 0 and at most 1")

    @property
    def greedy(self) -> bool:
        """True when the most probable token is taken."""
        return self.temperature == 0.0

    def warp(self, logits: Tensor) -> Tensor:
        """fp32 logits ``(..., vocab)`` after temperature, top-k and top-p; dropped tokens are -inf."""
        # The largest logit becomes 0, so that no temperature, however low, overflows.
        warped = (logits.float() - logits.max(dim=-1, keepdim=True).values.float()) / (self.temperature or 1.0)
        if 0 < self.top_k < warped.shape[-1]:
            threshold = warped.topk(self.top_k, dim=-1).values[..., -1:]
            warped = warped.masked_fill(warped < threshold, float("-inf"))
        if self.top_p < 1.0:
            warped = _nucleus(warped, self.top_p)
        return warped

    def draw(self, logits: Tensor, positions: Tensor, depths: Tensor, seeds: Tensor) -> Tensor:
        """One token per node.

        Args:
            logits: ``(batch, nodes, vocab)``.
            positions: ``(batch, levels)``, sequence positions of the tokens to be drawn, one per tree level.
            depths: ``(batch, nodes)``, index into ``positions``.
            seeds: ``(batch,)`` int64.

        Returns:
            token ids ``(batch, nodes)``.
        """
        if self.greedy:
            return largest(logits)
        if kernels.serve(logits):
            if self.top_k or self.top_p < 1.0:
                return kernels.draw(self.warp(logits), depths, positions, seeds, 1.0)
            return kernels.draw(logits, depths, positions, seeds, self.temperature)
        noise = gumbel_noise(seeds, positions, logits.shape[-1])
        warped = self.warp(logits)
        rows = torch.arange(logits.shape[0], device=logits.device)[:, None]
        return largest(warped.add_(noise[rows, depths]))

    def draw_path(self, logits: Tensor, positions: Tensor, tree: Tree, seeds: Tensor) -> Tensor:
        """:meth:`draw` at the nodes of the path that its draws follow, one level after the other; 0 at all others.

        Siblings differ and the path goes on as far as a draw is a node, so no node that is left out could be accepted,
        whatever were drawn at it or above.

        On a CPU, which may look at every draw, it spares the noise and the sorting of all other nodes' vocabularies.
        """
        draws = torch.zeros_like(tree.tokens)
        rows = torch.arange(len(draws), device=draws.device)
        slots = torch.zeros_like(rows)
        for level in range(positions.shape[1]):
            place, root = positions[rows, level, None], torch.zeros_like(rows[:, None])
            found = self.draw(logits[rows, slots, None], place, root, seeds[rows])
            draws[rows, slots] = found[:, 0]
            children = (tree.parents[rows] == slots[:, None]) & (tree.tokens[rows] == found) & tree.valid[rows]
            children[:, 0] = False  # the root is its own parent
            going = children.any(dim=1)
            rows, slots = rows[going], children[going].int().argmax(dim=1)
            if not len(rows):
                break
        return draws


def largest(scores: Tensor) -> Tensor:
    """Index of the first largest score along the last dimension: on a CPU `max` is several times `argmax`'s speed."""
    if kernels.serve(scores):
        return kernels.largest(scores)
    return scores.max(dim=-1).indices


def _nucleus(logits: Tensor, top_p: float) -> Tensor:
    vocab, norm = logits.shape[-1], logits.logsumexp(dim=-1, keepdim=True)
    # Sorting a whole vocabulary takes several times as long as all else that a draw does on a CPU, where it is known
    # at once whether some were enough.
    for count in (SHORTLIST, vocab) if logits.device.type == "cpu" and vocab > SHORTLIST else (vocab,):
        ordered, order = logits.topk(count, dim=-1) if count < vocab else logits.sort(dim=-1, descending=True)
        mass = (ordered - norm).exp()
        # A token stays while the mass before it is under top_p, so that the first one always stays.
        kept = mass.cumsum(dim=-1) - mass < top_p
        if count < vocab and not bool(kept[..., -1].any()):
            break
    nothing = torch.full_like(logits, float("-inf"))
    return nothing.scatter_(-1, order, ordered.masked_fill(~kept, float("-inf")))


def gumbel_noise(seeds: Tensor, positions: Tensor, vocab: int) -> Tensor:
    """Standard Gumbel noise, a pure function of (seed, position, token id).

    Args:
        seeds: ``(batch,)`` int64.
        positions: ``(batch, levels)`` int64.
        vocab: number of token ids.

    Returns:
        fp32 ``(batch, levels, vocab)``.
    """
    key = _mix(_mix(seeds[:, None] * _GOLDEN) + positions * _GOLDEN)
    token = torch.arange(vocab, device=seeds.device) * _GOLDEN
    bits = _shift(_mix(key[..., None] + token), 32)
    # 32 bits in float64: both tails of -log stay exact to 2**-33, which float32 could not hold near 1.
    uniform = (bits.double() + 0.5) * 2.0**-32
    return uniform.log_().neg_().log_().neg_().float()


def _shift(states: Tensor, bits: int) -> Tensor:
    """Logical shift right of int64."""
    return (states >> bits) & ((1 << (64 - bits)) - 1)


def _mix(states: Tensor) -> Tensor:
    """splitmix64's finaliser; int64 products wrap."""
    states = (states ^ _shift(states, 30)) * _MIX_1
    states = (states ^ _shift(states, 27)) * _MIX_2
    return states ^ _shift(states, 31)
