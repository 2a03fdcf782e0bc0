"""The groups of rows that a router chooses, level by level. After CORAL.

The head's rows are permuted once, so that a group is one slab of memory. A level's nodes share one choice of slabs
(`coral_spec.router`); only those are read.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from coral_spec import kernels, packing
from coral_spec.backbone import Backbone
from coral_spec.grouping import EMPTY
from coral_spec.heads.interface import ProposalHead
from coral_spec.router import Router, Routing, choose_groups


def grouped_top(
    features: Tensor,
    slabs: Tensor,
    active: Tensor,
    count: int,
    *,
    ids: Tensor | None = None,
    log_mass: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The best tokens among the active slabs; the reference of any kernel that does the same.

    With z the logits of the rows of the active slabs, empty places left out, all in fp32, the log-probability of row
    r in slab g is

    * ``z_r - logsumexp(z of all active slabs)`` without ``log_mass``: renormalised over the rows that were read;
    * ``log_mass[node, g] + z_r - logsumexp(z of slab g)`` with it: hierarchical. The router's mass is over all
      groups, so that what is read sums to less than 1.

    Candidates are ordered by that log-probability; among equal ones the order is not defined.

    Args:
        features: ``(nodes, width)``.
        slabs: ``(groups, rows_per_group, width)``, the permuted head.
        active: int64 ``(k,)``, distinct groups.
        count: candidates of every node, no more than the active slabs have tokens.
        ids: int64 ``(groups, rows_per_group)``: the token of every place, -1 where it is empty; without it places are
            tokens, counted through all slabs.
        log_mass: fp32 ``(nodes, k)``, log-probabilities of the active groups.

    Returns:
        fp32 log-probabilities and int64 token ids, ``(nodes, count)`` each, best first.
    """
    groups, rows, _ = slabs.shape
    if slabs.device.type == "cpu":  # slab by slab, where each lies: nothing is copied
        parts = [functional.linear(features, slabs[group]) for group in active.tolist()]
        logits = torch.stack(parts, dim=1)
    else:
        logits = functional.linear(features, slabs[active].flatten(0, 1)).view(len(features), len(active), rows)
    ids = torch.arange(groups * rows, device=slabs.device).view(groups, rows) if ids is None else ids
    return top_of_slabs(logits, ids[active], count, log_mass)


def top_of_slabs(
    logits: Tensor, ids: Tensor, count: int, log_mass: Tensor | None, *, gaps: bool = True
) -> tuple[Tensor, Tensor]:
    """The second half of :func:`grouped_top`: ``logits (nodes, k, rows)`` of tokens ``ids (k, rows)``.

    Without ``gaps`` no place is empty.
    """
    logits = logits.float()
    if gaps:
        logits = logits.masked_fill(ids == EMPTY, float("-inf"))
    if log_mass is None:
        flat = logits.flatten(1)
        best = flat.topk(count, dim=-1)
        log_probs = best.values - flat.logsumexp(dim=-1, keepdim=True)
    else:
        best = (logits.log_softmax(dim=-1) + log_mass[:, :, None]).flatten(1).topk(count, dim=-1)
        log_probs = best.values
    return log_probs, ids.flatten()[best.indices]


class RoutedHead(ProposalHead):
    """The groups that the router chooses; a batch's rows share the choice."""

    kind = "routed"

    def __init__(self, backbone: Backbone, routing: Routing) -> None:
        output = backbone.output
        grouping, device = routing.grouping, output.weight.device
        self._backbone, self._routing = backbone, routing
        self.rows = routing.rows + routing.router_rows
        self._ids, self._group_of = grouping.slots.to(device), grouping.group_of.to(device)
        slabs: Tensor = grouping.slabs(output.weight)
        bias = getattr(output, "bias", None)
        self._bias = None if bias is None else grouping.slabs(bias)
        self._plain = bias is None and backbone.leaves_logits_alone
        self._gaps = bool((grouping.slots == EMPTY).any())
        self._router: Router = packing.packed(routing.router)
        self._fixed, self._packed = None, None
        if _packable(slabs):  # what is always read is one product
            self._fixed = packing.pack(slabs[: grouping.always].flatten(0, 1)) if grouping.always else None
            self._packed = [packing.pack(slab) for slab in slabs[grouping.always :]]
        self._slabs = slabs if self._packed is None else None
        self._levels: list[Tensor] = []  # the groups that each level of the last tree has read

    @property
    def choices(self) -> int:
        """Tokens of the groups that are always read and of the smallest others."""
        grouping, active = self._routing.grouping, self._routing.active
        sizes = (grouping.slots != EMPTY).sum(dim=1)
        fixed, others = sizes[: grouping.always], sizes[grouping.always :].sort().values
        return int(fixed.sum() + others[:active].sum())

    def top(self, features: Tensor, count: int, scores: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See :class:`ProposalHead`."""
        routing = self._routing
        if self._served(features, count):
            return self._top_by_kernels(features, count, scores)
        nodes = features.flatten(0, 1)
        log_probs = self._router(nodes)
        paths = None if scores is None else scores.flatten()
        active = choose_groups(log_probs, paths, routing.grouping.always, routing.active)
        self._levels = [active] if scores is None else [*self._levels, active]
        log_mass = log_probs[:, active] if routing.scores == "hierarchical" else None
        log_probs, tokens = self._best(nodes, active, count, log_mass)
        shape = *features.shape[:2], count
        return log_probs.view(shape), tokens.view(shape)

    def _served(self, features: Tensor, count: int) -> bool:
        groups = self._routing.grouping.groups
        return (
            self._slabs is not None
            and self._plain
            and kernels.serve(features)
            and count <= kernels.MAX_ROWS
            and kernels.MAX_ROWS * groups <= kernels.MAX_ROUTED
        )

    def _top_by_kernels(self, features: Tensor, count: int, scores: Tensor | None) -> tuple[Tensor, Tensor]:
        assert self._slabs is not None
        routing = self._routing
        logits = self._router.logits(features)
        active, mass = kernels.choose_groups(logits, scores, routing.grouping.always, routing.active)
        self._levels = [active] if scores is None else [*self._levels, active]
        hierarchical = routing.scores == "hierarchical"
        return kernels.grouped_best(features, self._slabs, active, count, self._ids, mass if hierarchical else None)

    def _best(self, nodes: Tensor, active: Tensor, count: int, log_mass: Tensor | None) -> tuple[Tensor, Tensor]:
        if self._slabs is not None and self._plain:
            return grouped_top(nodes, self._slabs, active, count, ids=self._ids, log_mass=log_mass)
        if self._packed is not None:
            fixed, always = self._fixed, self._routing.grouping.always
            parts = [] if fixed is None else [packing.multiply(nodes, fixed, None)]
            parts += [packing.multiply(nodes, self._packed[group - always], None) for group in active[always:].tolist()]
            logits = torch.cat(parts, dim=1).view(len(nodes), len(active), -1)
        else:
            assert self._slabs is not None
            logits = torch.einsum("nw,krw->nkr", nodes, self._slabs[active])
        if self._bias is not None:
            logits = logits + self._bias[active]
        logits = self._backbone.finish_logits(logits)
        return top_of_slabs(logits, self._ids[active], count, log_mass, gaps=self._gaps)

    def seen(self, tokens: Tensor, counts: Tensor) -> Tensor | None:
        """See :class:`ProposalHead`."""
        depth = min(len(self._levels), tokens.shape[1])
        groups = self._group_of[tokens[:, :depth]]
        read = (groups[:, :, None] == torch.stack(self._levels[:depth])).any(dim=-1)
        drafted = torch.arange(depth, device=tokens.device) < counts[:, None]
        return torch.stack([(read & drafted).sum(), drafted.sum()])


def _packable(slabs: Tensor) -> bool:
    """Whether oneDNN's layout pays for the slabs and there is memory for it."""
    groups, rows, width = slabs.shape
    probe = nn.Linear(width, groups * rows, bias=False, device="meta")
    probe.weight = nn.Parameter(slabs.view(groups * rows, width), requires_grad=False)
    return packing.pays(probe)
