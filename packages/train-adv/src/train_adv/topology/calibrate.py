"""lambda has no natural scale: measure how hard each loss pulls, and choose it for a target ratio."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from expkit.distributed import all_reduce_mean
from expkit.errors import UsageError

_NOTHING = 1e-6  # times the host's gradient: rounding, as of a network that is compared with itself


def gradient_norm(loss: Tensor, parameters: Iterable[nn.Parameter], *, keep: bool = False) -> Tensor:
    """L2 norm of the gradient of a scalar loss over all parameters, averaged over processes first.

    With `keep` the loss may still be used for a backward, which the graphs of torch.compile do not allow.
    """
    asking = [parameter for parameter in parameters if parameter.requires_grad]
    gradients = torch.autograd.grad(loss, asking, retain_graph=keep, allow_unused=True)
    flat = [gradient.float().flatten() for gradient in gradients if gradient is not None]
    if not flat:
        return torch.zeros((), device=loss.device)
    norm: Tensor = torch.linalg.vector_norm(all_reduce_mean(torch.cat(flat)))
    return norm


def weight_for_ratio(host: float, topology: float, ratio: float) -> float:
    """The lambda at which lambda * |grad L_topo| = ratio * |grad L_host|.

    Raises:
        UsageError: a ratio of 0 or less, or a topology gradient that is not a number, or nothing beside the host's.
    """
    if ratio <= 0:
        raise UsageError(f"the target ratio of gradient norms is {ratio}; it must be above 0")
    if not topology > _NOTHING * host or not host >= 0:
        raise UsageError(f"gradient norms {host:.3g} (host) and {topology:.3g} (topology) give no lambda")
    return ratio * host / topology
