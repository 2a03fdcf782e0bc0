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


def test_trustworthiness_is_of_the_features_as_a_picture_of_the_reference():
    """Venna and Kaski's sum: neighbours in the picture that are none in the original, by their rank there."""
    features, reference, k, n = cloud(seed=5, count=24), cloud(count=24), 10, 24

    def ranks(z: torch.Tensor) -> torch.Tensor:
        """Of each sample's others by cosine, from 1 on."""
        similarity = torch.nn.functional.normalize(z, dim=1) @ torch.nn.functional.normalize(z, dim=1).T
        return similarity.fill_diagonal_(2).argsort(1, descending=True).argsort(1)

    def penalty(picture: torch.Tensor, original: torch.Tensor) -> float:
        shown = (ranks(picture) <= k) & (ranks(picture) > 0)
        late = (ranks(original) - k).clamp(min=0)
        return 1 - 2 / (n * k * (2 * n - 3 * k - 1)) * float((late * shown).sum())

    figures = metrics.measure(features, reference)
    assert abs(penalty(features, reference) - penalty(reference, features)) > 1e-3
    assert figures["trustworthiness"] == pytest.approx(penalty(features, reference))
    assert figures["continuity"] == pytest.approx(penalty(reference, features))


def test_cka_is_the_ratio_of_hsic():
    one, other = cloud(seed=3).double(), cloud(dim=4).double()
    centre = torch.eye(60, dtype=torch.float64) - 1 / 60

    def hsic(first: torch.Tensor, second: torch.Tensor) -> float:
        return float(torch.trace(first @ first.T @ centre @ second @ second.T @ centre))

    expected = hsic(one, other) / (hsic(one, one) * hsic(other, other)) ** 0.5
    assert metrics.linear_cka(one, other) == pytest.approx(expected)


def test_neighbour_confusion_rows_are_shares():
    labels = torch.tensor([0] * 30 + [1] * 30)
    features = cloud() * 0.1 + torch.nn.functional.one_hot(labels, 6) * 2.0
    table = metrics.neighbour_confusion(features, labels, 2)
    assert torch.allclose(table.sum(1), torch.ones(2)) and float(table.diag().min()) > 0.99


def test_too_many_neighbours_are_refused():
    with pytest.raises(UsageError, match="60 samples"):
        metrics.knn_overlap(cloud(), cloud(), 60)
