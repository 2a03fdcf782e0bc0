"""How near two samples are: each kernel gives scores whose softmax over a row's neighbours is p_{j|i}.

A score is the logarithm of the kernel's value up to a constant of the row, so that normalising k(u, v) over the
neighbours and a softmax over scores are one thing, and never divide by a small sum. Rows are the samples i, columns
the candidates j; `neighbours` says which j count for i. The formulation is that of the notes on arXiv 2311.17607:
cosine is PKT's kernel, the rest are options of ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

KernelName = Literal["cosine", "gaussian", "student-t", "softmax-cosine"]
Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]

_TINY = 1e-7  # of fp32: keeps the logarithm of opposite vectors (cosine -1) and a norm of zero finite


def cosine_similarity(rows: Tensor, columns: Tensor) -> Tensor:
    """Cosines between all pairs: (rows, dim), (columns, dim) -> (rows, columns)."""
    return F.normalize(rows, dim=1, eps=_TINY) @ F.normalize(columns, dim=1, eps=_TINY).T


def squared_distances(rows: Tensor, columns: Tensor) -> Tensor:
    """Squared Euclidean distances between all pairs, never negative: -> (rows, columns)."""
    centre = columns.detach().mean(dim=0)  # small numbers lose less in the expansion below
    rows, columns = rows - centre, columns - centre
    squares = rows.square().sum(1, keepdim=True) + columns.square().sum(1) - 2 * rows @ columns.T
    return squares.clamp_min(0)


def cosine(rows: Tensor, columns: Tensor, neighbours: Tensor) -> Tensor:
    """log((1 + cos) / 2), PKT's kernel."""
    return ((1 + cosine_similarity(rows, columns)) / 2).clamp_min(_TINY).log()


def softmax_cosine(temperature: float) -> Kernel:
    """cos / temperature; a low temperature looks at the nearest ones only."""

    def scores(rows: Tensor, columns: Tensor, neighbours: Tensor) -> Tensor:
        return cosine_similarity(rows, columns) / temperature

    return scores


def student_t(rows: Tensor, columns: Tensor, neighbours: Tensor) -> Tensor:
    """-log(1 + d^2 / s), t-SNE's kernel, where s is the row's mean d^2, so that the features' scale is no matter."""
    squares = squared_distances(rows, columns)
    count = neighbours.sum(1, keepdim=True).clamp_min(1)
    scale = (squares * neighbours).sum(1, keepdim=True) / count
    return -torch.log1p(squares / scale.clamp_min(_TINY**2))


def gaussian(perplexity: float) -> Kernel:
    """-beta_i d^2 with each row's beta_i chosen, without gradient, to give the row this perplexity (as in SNE)."""

    def scores(rows: Tensor, columns: Tensor, neighbours: Tensor) -> Tensor:
        squares = squared_distances(rows, columns)
        return -precision_of(squares.detach(), neighbours, perplexity) * squares

    return scores


@torch.no_grad()
def precision_of(squares: Tensor, neighbours: Tensor, perplexity: float, steps: int = 40) -> Tensor:
    """The beta_i, (rows, 1), at which softmax(-beta_i d^2) over the neighbours has entropy log(perplexity).

    A perplexity above what a row's neighbours allow is lowered to 0.9 of their number. Bisection on log(beta); entropy
    falls as beta grows. Rows whose distances are all equal keep any beta: their distribution is uniform anyway.
    """
    count = neighbours.sum(1, keepdim=True).clamp_min(1)
    target = torch.minimum(torch.full_like(squares[:, :1], perplexity), 0.9 * count).clamp_min(1.0).log()
    scale = ((squares * neighbours).sum(1, keepdim=True) / count).clamp_min(_TINY**2)
    low, high = torch.full_like(scale, -12.0), torch.full_like(scale, 12.0)
    for _ in range(steps):
        middle = (low + high) / 2
        logs = (-middle.exp() * squares / scale).masked_fill(~neighbours, -torch.inf).log_softmax(1)
        entropy = -(logs.exp() * logs.masked_fill(~neighbours, 0)).sum(1, keepdim=True)
        low, high = torch.where(entropy > target, middle, low), torch.where(entropy > target, high, middle)
    return ((low + high) / 2).exp() / scale


def make_kernel(name: KernelName, *, temperature: float, perplexity: float) -> Kernel:
    """The kernel called `name`; raises KeyError for an unknown one."""
    kernels: dict[str, Kernel] = {
        "cosine": cosine,
        "student-t": student_t,
        "gaussian": gaussian(perplexity),
        "softmax-cosine": softmax_cosine(temperature),
    }
    return kernels[name]
