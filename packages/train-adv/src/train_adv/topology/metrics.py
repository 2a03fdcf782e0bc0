"""How well the relations between samples survive from one set of features to another; all of the same images."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from expkit.errors import UsageError
from train_adv.topology.kernels import cosine_similarity
from train_adv.topology.loss import TopologyLoss, check_features

NEIGHBOURS = (5, 10, 50)
BATCH = 128  # samples of one L_topo: its value depends on how many neighbours there are


def knn_overlap(first: Tensor, second: Tensor, k: int) -> float:
    """Mean Jaccard index of the k nearest (cosine) neighbours, of (n, d1) and (n, d2) features; 1 is the same sets."""
    count = len(first)
    if not 0 < k < count:
        raise UsageError(f"{k} neighbours of {count} samples; needed 1 to {count - 1}")
    sets = [_nearest(features, k) for features in (first, second)]
    shared = (sets[0] & sets[1]).sum(1).float()
    return float((shared / (2 * k - shared)).mean())


def linear_cka(first: Tensor, second: Tensor) -> float:
    """Linear centred kernel alignment (Kornblith et al. 2019, eq. 3 in feature space); 1 up to rotation and scale."""
    first, second = (features.double() - features.double().mean(0) for features in (first, second))
    cross = (first.T @ second).square().sum()
    return float(cross / ((first.T @ first).norm() * (second.T @ second).norm()).clamp_min(1e-30))


def distance_spearman(first: Tensor, second: Tensor) -> float:
    """Spearman's rank correlation of all pairwise cosine distances (tied distances share their mean rank)."""
    from scipy.stats import rankdata

    rows, columns = np.triu_indices(len(first), k=1)
    ranks = [
        rankdata(1 - cosine_similarity(features.double(), features.double()).cpu().numpy()[rows, columns])
        for features in (first, second)
    ]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def trustworthiness_continuity(first: Tensor, second: Tensor, k: int) -> tuple[float, float]:
    """Trustworthiness of `second` as a picture of `first`, and continuity, which is the same the other way round."""
    from sklearn.manifold import trustworthiness

    a, b = (F.normalize(features.double(), dim=1).cpu().numpy() for features in (first, second))
    return float(trustworthiness(a, b, n_neighbors=k)), float(trustworthiness(b, a, n_neighbors=k))


@torch.no_grad()
def topology_loss(features: Tensor, reference: Tensor) -> float:
    """L_topo (cosine kernel, row-sum), averaged over consecutive batches of 128."""
    loss = TopologyLoss(gather=False)
    whole = max(1, len(features) // BATCH) * BATCH
    batches = zip(torch.split(features[:whole], BATCH), torch.split(reference[:whole], BATCH), strict=True)
    return float(torch.stack([loss(own, other) for own, other in batches]).mean())


def measure(features: Tensor, reference: Tensor) -> dict[str, float]:
    """Every metric of (n, d1) features against the reference's (n, d2); neighbour counts that n allows only."""
    check_features(features, reference)
    features, reference = features.float(), reference.float()
    figures = {f"knn_{k}": knn_overlap(reference, features, k) for k in NEIGHBOURS if k < len(features)}
    k = min(10, (len(features) - 1) // 2)
    if k:
        figures["trustworthiness"], figures["continuity"] = trustworthiness_continuity(reference, features, k)
    figures["cka"] = linear_cka(reference, features)
    figures["spearman"] = distance_spearman(reference, features)
    figures["l_topo"] = topology_loss(features, reference)
    return figures


def neighbour_confusion(features: Tensor, labels: Tensor, classes: int, k: int = 10) -> Tensor:
    """How the classes of a sample's k nearest neighbours are shared out: (classes, classes), rows sum to 1."""
    near = _nearest(features.float(), min(k, len(features) - 1)).float()
    votes = near @ F.one_hot(labels.to(near.device), classes).float()
    table = torch.zeros(classes, classes, device=near.device).index_add_(0, labels.to(near.device), votes)
    return table / table.sum(1, keepdim=True).clamp_min(1)


def _nearest(features: Tensor, k: int) -> Tensor:
    """Boolean (n, n): the k nearest neighbours of each sample by cosine, itself left out."""
    similarity = cosine_similarity(features, features)
    similarity.fill_diagonal_(-torch.inf)
    chosen = torch.zeros_like(similarity, dtype=torch.bool)
    return chosen.scatter_(1, similarity.topk(k, dim=1).indices, True)
