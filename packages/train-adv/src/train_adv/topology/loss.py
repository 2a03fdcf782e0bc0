"""L_topo: how far the network's relations between natural samples are from those of a standard model.

Symbols (notes on arXiv 2311.17607): z_s reference features, z_a features in training, p = p_{j|i} from z_s, q from z_a,
L_topo = (1/B) sum_i sum_{j != i} p log(p/q). The abstract gives the idea; kernel, direction and reduction are ours.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from expkit.errors import UsageError
from train_adv.topology.gather import gather_with_gradient
from train_adv.topology.kernels import KernelName, make_kernel

Direction = Literal["forward", "reverse", "jensen-shannon"]
Reduction = Literal["row", "mean", "sum", "none"]


class TopologyLoss(nn.Module):
    """Divergence between the neighbour distributions of two sets of features of the same samples.

    Computed in fp32 also inside autocast: probabilities differ from 1/B by a few per cent only.

    Args:
        kernel: "cosine" (PKT), "gaussian" (each row at `perplexity`), "student-t" or "softmax-cosine".
        temperature: of softmax-cosine.
        perplexity: of gaussian; lowered where a row has too few neighbours.
        diagonal: count a sample as its own neighbour.
        direction: "forward" KL(p|q), "reverse" KL(q|p) or "jensen-shannon".
        neighbours: only the so many nearest by the reference; 0 is all; one alone, without the diagonal, has nothing to
            be compared with.
        reduction: "row" mean over i of the sum over j; "mean" also over j (PKT's scale: divide by the columns);
            "sum" (with `gather` such that the processes' mean is the sum over all); "none" gives (batch,).
        gather: neighbours are the samples of all processes, not only of this one.
    """

    def __init__(
        self,
        *,
        kernel: KernelName = "cosine",
        temperature: float = 0.1,
        perplexity: float = 30.0,
        diagonal: bool = False,
        direction: Direction = "forward",
        neighbours: int = 0,
        reduction: Reduction = "row",
        gather: bool = True,
    ) -> None:
        super().__init__()
        for name, value, kind in (
            ("kernel", kernel, KernelName),
            ("direction", direction, Direction),
            ("reduction", reduction, Reduction),
        ):
            if value not in get_args(kind):
                raise UsageError(f"{name} is {value!r}; use one of {', '.join(get_args(kind))}")
        if temperature <= 0 or perplexity < 1 or neighbours < 0:
            raise UsageError(
                f"temperature {temperature}, perplexity {perplexity}, neighbours {neighbours}: "
                "needed above 0, at least 1, and 0 or more"
            )
        if neighbours == 1 and not diagonal:
            raise UsageError("neighbours is 1; use 2 or more: a sample's one neighbour has all of its probability")
        self.kernel, self.temperature, self.perplexity = kernel, temperature, perplexity
        self.diagonal, self.direction, self.neighbours = diagonal, direction, neighbours
        self.reduction, self.gather = reduction, gather
        self._scores = make_kernel(kernel, temperature=temperature, perplexity=perplexity)

    def extra_repr(self) -> str:
        return f"kernel={self.kernel}, direction={self.direction}, reduction={self.reduction}"

    def forward(self, features: Tensor, reference: Tensor) -> Tensor:
        """Compare features (batch, dim) in training with the reference's (batch, dim of its own), gradient-free.

        Returns:
            A scalar, or (batch,) without reduction.

        Raises:
            UsageError: other shapes, or (over all processes) fewer than three samples, with the diagonal two.
        """
        with torch.autocast(features.device.type, enabled=False):
            own, other = features.float(), reference.detach().float()
            check_features(own, other)
            all_own, start = gather_with_gradient(own) if self.gather else (own, 0)
            all_other, _ = gather_with_gradient(other) if self.gather else (other, 0)
            require_neighbours(len(all_own), 2 if self.diagonal else 3)
            mask = self._neighbours(other, all_other, start)
            log_p = log_probabilities(self._scores(other, all_other, mask), mask)
            log_q = log_probabilities(self._scores(own, all_own, mask), mask)
            return self._reduce(self._diverge(log_p, log_q, mask), all_own)

    def _neighbours(self, rows: Tensor, columns: Tensor, start: int) -> Tensor:
        """Which columns count for each row, boolean (rows, columns)."""
        # By comparison: to write single places of a mask on a GPU waits for it, with some releases of torch.
        places = torch.arange(len(columns), device=rows.device)
        itself = places[start : start + len(rows), None] == places
        mask = torch.ones_like(itself) if self.diagonal else ~itself
        if 0 < self.neighbours < len(columns) - 1:
            # the sample itself is no neighbour that could be chosen
            scores = self._scores(rows, columns, mask).masked_fill(itself, -torch.inf)
            nearest = scores.topk(self.neighbours, dim=1).indices
            chosen = torch.zeros_like(mask).scatter_(1, nearest, True)
            return chosen | itself if self.diagonal else chosen & ~itself
        return mask

    def _diverge(self, log_p: Tensor, log_q: Tensor, mask: Tensor) -> Tensor:
        if self.direction == "forward":
            return divergence(log_p, log_q, mask)
        if self.direction == "reverse":
            return divergence(log_q, log_p, mask)
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        return (divergence(log_p, log_m, mask) + divergence(log_q, log_m, mask)) / 2

    def _reduce(self, rows: Tensor, columns: Tensor) -> Tensor:
        if self.reduction == "row":
            return rows.mean()
        if self.reduction == "mean":
            return rows.mean() / len(columns)
        # Processes average their gradients: with as many times each one's sum that is the sum of all.
        return rows.sum() * (len(columns) / len(rows)) if self.reduction == "sum" else rows


def log_probabilities(scores: Tensor, mask: Tensor) -> Tensor:
    """Log-softmax of each row over its neighbours; 0 elsewhere, where nothing may look at it (nor send gradient)."""
    return scores.masked_fill(~mask, -torch.inf).log_softmax(dim=1).masked_fill(~mask, 0)


def divergence(log_p: Tensor, log_q: Tensor, mask: Tensor) -> Tensor:
    """KL(p|q) of each row: (rows, columns) -> (rows,)."""
    return (log_p.exp() * mask * (log_p - log_q)).sum(dim=1)


def check_features(features: Tensor, reference: Tensor) -> None:
    """Raise UsageError where two sets of features cannot be compared."""
    if features.ndim != 2 or reference.ndim != 2:
        raise UsageError(
            f"features of shape {tuple(features.shape)} and {tuple(reference.shape)}: expected (batch, dim) for both"
        )
    if len(features) != len(reference):
        raise UsageError(f"{len(features)} samples against {len(reference)} of the reference; they must be the same")
    require_neighbours(len(features))


def require_neighbours(count: int, least: int = 2) -> None:
    """Raise UsageError for so few samples that there are no neighbours to compare."""
    if count < least:
        what = "no neighbours" if count < 2 else "one neighbour for each, which has all of its probability"
        raise UsageError(f"a batch of {count} has {what}; the topology loss needs more samples")
