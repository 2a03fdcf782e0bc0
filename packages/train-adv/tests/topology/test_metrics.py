"""Metrics of topology: 1 (or 0) for the same relations, less (or more) for others, and agreement with loops."""

from __future__ import annotations

import pytest
import torch

from expkit.errors import UsageError
from train_adv.topology import metrics


def cloud(seed: int = 0, count: int = 60, dim: int = 6) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def test_rotated_and_scaled_features_score_as_the_same():
    one = cloud()
    rotation, _ = torch.linalg.qr(cloud(seed=1, count=6))
    figures = metrics.measure(3 * one @ rotation, one)
    assert figures.pop("l_topo") == pytest.approx(0, abs=1e-5)
    assert all(value == pytest.approx(1, abs=1e-4) for value in figures.values()), figures


def test_unrelated_features_score_low():
    figures = metrics.measure(cloud(seed=3), cloud())
    assert figures["knn_5"] < 0.2 and abs(figures["spearman"]) < 0.2 and figures["cka"] < 0.4
    assert figures["l_topo"] > 0.01 and figures["trustworthiness"] < 0.7


def test_overlap_is_the_jaccard_index_of_loops():
    one, other = cloud(count=12), cloud(seed=5, count=12)
    total = 0.0
    for i in range(12):
        sets = []
        for z in (one, other):
            similarity = [(float(torch.cosine_similarity(z[i], z[j], dim=0)), j) for j in range(12) if j != i]
            sets.append({j for _, j in sorted(similarity, reverse=True)[:4]})
        total += len(sets[0] & sets[1]) / len(sets[0] | sets[1])
    assert metrics.knn_overlap(one, other, 4) == pytest.approx(total / 12)


def test_spearman_is_that_of_scipy():
    from scipy.stats import spearmanr

    one, other = cloud(count=15), cloud(seed=5, count=15)
    pairs = [(i, j) for i in range(15) for j in range(i + 1, 15)]
    distances = [[1 - float(torch.cosine_similarity(z[i], z[j], dim=0)) for i, j in pairs] for z in (one, other)]
    assert metrics.distance_spearman(one, other) == pytest.approx(spearmanr(*distances).statistic, abs=1e-3)


def test_neighbour_confusion_rows_are_shares():
    labels = torch.tensor([0] * 30 + [1] * 30)
    features = cloud() * 0.1 + torch.nn.functional.one_hot(labels, 6) * 2.0
    table = metrics.neighbour_confusion(features, labels, 2)
    assert torch.allclose(table.sum(1), torch.ones(2)) and float(table.diag().min()) > 0.99


def test_too_many_neighbours_are_refused():
    with pytest.raises(UsageError, match="60 samples"):
        metrics.knn_overlap(cloud(), cloud(), 60)
