"""L_topo against a naive reference, and the laws it keeps."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from expkit.errors import UsageError
from train_adv.topology.kernels import precision_of, squared_distances
from train_adv.topology.loss import TopologyLoss

KERNELS = ["cosine", "gaussian", "student-t", "softmax-cosine"]


def features(count: int = 9, dim: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dim, generator=generator), torch.randn(count, dim + 2, generator=generator)


def cosine(u: Tensor, v: Tensor) -> float:
    return float(u @ v / (u.norm() * v.norm()))


def naive_kernel(name: str, z: Tensor, i: int, j: int, betas: list[float], scales: list[float]) -> float:
    if name == "cosine":
        return (1 + cosine(z[i], z[j])) / 2
    if name == "softmax-cosine":
        return math.exp(cosine(z[i], z[j]) / 0.2)
    distance = float((z[i] - z[j]).square().sum())
    return math.exp(-betas[i] * distance) if name == "gaussian" else 1 / (1 + distance / scales[i])


def naive_probabilities(name: str, z: Tensor) -> list[list[float]]:
    """p_{j|i} with loops and plain quotients."""
    count = len(z)
    z = z.double()
    squares = [[float((z[i] - z[j]).square().sum()) for j in range(count)] for i in range(count)]
    scales = [sum(row) / (count - 1) for row in squares]
    betas = [naive_beta([row[j] for j in range(count) if j != i], 4.0) for i, row in enumerate(squares)]
    table = []
    for i in range(count):
        values = [naive_kernel(name, z, i, j, betas, scales) if j != i else 0.0 for j in range(count)]
        table.append([value / sum(values) for value in values])
    return table


def naive_beta(squares: list[float], perplexity: float) -> float:
    low, high = 1e-9, 1e9
    for _ in range(200):
        beta = math.sqrt(low * high)
        weights = [math.exp(-beta * (each - min(squares))) for each in squares]
        shares = [weight / sum(weights) for weight in weights]
        entropy = -sum(share * math.log(share) for share in shares if share > 0)
        low, high = (beta, high) if entropy > math.log(perplexity) else (low, beta)
    return beta


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("direction", ["forward", "reverse", "jensen-shannon"])
def test_it_is_the_divergence_of_the_formula(kernel, direction):
    own, other = features()
    p, q = naive_probabilities(kernel, other), naive_probabilities(kernel, own)
    total = 0.0
    for i in range(len(own)):
        for j in range(len(own)):
            if i == j:
                continue
            a, b = p[i][j], q[i][j]
            m = (a + b) / 2
            total += {
                "forward": a * math.log(a / b),
                "reverse": b * math.log(b / a),
                "jensen-shannon": (a * math.log(a / m) + b * math.log(b / m)) / 2,
            }[direction]
    loss = TopologyLoss(kernel=kernel, direction=direction, temperature=0.2, perplexity=4.0)
    assert float(loss(own, other)) == pytest.approx(total / len(own), rel=2e-3, abs=1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), scale=st.floats(0.1, 10))
def test_permuting_rotating_and_scaling_change_nothing(kernel, seed, scale):
    own, other = features(seed=seed)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(own), generator=generator)
    rotation, _ = torch.linalg.qr(torch.randn(5, 5, generator=generator))
    loss = TopologyLoss(kernel=kernel, perplexity=4.0)
    before = float(loss(own, other))
    assert float(loss(own[order], other[order])) == pytest.approx(before, rel=1e-3, abs=1e-5)
    assert float(loss(scale * own @ rotation, other)) == pytest.approx(before, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_equal_features_have_no_loss_and_other_ones_a_positive_one(kernel):
    own, other = features()
    assert float(TopologyLoss(kernel=kernel)(other, other)) == pytest.approx(0, abs=1e-6)
    assert float(TopologyLoss(kernel=kernel)(own, other)) > 1e-4


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_gradient_is_that_of_finite_differences(kernel):
    own, other = features(count=6)
    loss = TopologyLoss(kernel=kernel, direction="jensen-shannon", perplexity=3.0)
    leaf = own.clone().requires_grad_()
    loss(leaf, other).backward()
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(own.shape, generator=generator)
    h = 1e-2
    slope = (float(loss(own + h * direction, other)) - float(loss(own - h * direction, other))) / (2 * h)
    if kernel == "gaussian":  # its precision is held fixed in the gradient, so only the sign must agree
        assert slope * float((leaf.grad * direction).sum()) > 0
    else:
        assert float((leaf.grad * direction).sum()) == pytest.approx(slope, rel=5e-2, abs=1e-4)


def test_no_gradient_reaches_the_reference():
    own, other = features()
    other.requires_grad_()
    TopologyLoss()(own.requires_grad_(), other).backward()
    assert other.grad is None and own.grad is not None


def test_reductions_agree_with_each_other():
    own, other = features()
    values = {name: TopologyLoss(reduction=name)(own, other) for name in ("row", "mean", "sum", "none")}
    assert values["none"].shape == (9,)
    assert float(values["row"]) == pytest.approx(float(values["none"].mean()))
    assert float(values["sum"]) == pytest.approx(float(values["none"].sum()))
    assert float(values["mean"]) == pytest.approx(float(values["row"]) / 9)


def test_nearest_neighbours_are_the_references():
    """Only pairs near in the reference count: moving a far sample changes nothing for the others."""
    generator = torch.Generator().manual_seed(0)
    other = torch.cat([torch.tensor([[1.0, 0.0]]) + 0.1 * torch.randn(5, 2, generator=generator), -torch.ones(1, 2)])
    own, _ = features(count=6)
    loss = TopologyLoss(neighbours=3, reduction="none")
    before = loss(own, other)
    own[5] = own[5] + 3
    after = loss(own, other)
    assert torch.allclose(before[:5], after[:5]) and not torch.allclose(before[5], after[5])


def test_the_diagonal_can_be_kept():
    own, other = features()
    assert float(TopologyLoss(diagonal=True)(own, other)) != pytest.approx(float(TopologyLoss()(own, other)))


def test_it_is_computed_in_fp32_under_autocast():
    own, other = features(count=32)
    plain = TopologyLoss()(own, other)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = TopologyLoss()(own, other)
    assert mixed.dtype == torch.float32 and torch.equal(plain, mixed)


def test_the_gaussian_reaches_its_perplexity():
    own, _ = features(count=30)
    mask = ~torch.eye(30, dtype=torch.bool)
    squares = squared_distances(own, own)
    beta = precision_of(squares, mask, 7.0)
    logs = (-beta * squares).masked_fill(~mask, -torch.inf).log_softmax(1)
    entropy = -(logs.exp() * logs.masked_fill(~mask, 0)).sum(1)
    assert torch.allclose(entropy.exp(), torch.tensor(7.0), rtol=1e-3)


def test_degenerate_features_stay_finite():
    for kernel in KERNELS:
        own = torch.zeros(5, 3, requires_grad=True)
        opposite = torch.tensor([[1.0, 0, 0], [-1.0, 0, 0]]).repeat(3, 1)[:5]
        value = TopologyLoss(kernel=kernel)(own, opposite)
        value.backward()
        assert torch.isfinite(value) and torch.isfinite(own.grad).all()


@pytest.mark.parametrize(
    ("own", "other", "said"),
    [((1, 4), (1, 4), "batch of 1"), ((3, 4), (2, 4), "3 samples against 2"), ((3, 4, 2), (3, 4), "expected")],
)
def test_what_cannot_be_compared_is_refused(own, other, said):
    with pytest.raises(UsageError, match=said):
        TopologyLoss()(torch.zeros(own), torch.zeros(other))


def test_unknown_settings_are_named():
    with pytest.raises(UsageError, match="cosine"):
        TopologyLoss(kernel="euclid")
    with pytest.raises(UsageError, match="forward"):
        TopologyLoss(direction="up")


def test_a_single_neighbour_is_nothing_to_compare():
    features = torch.randn(2, 5)
    with pytest.raises(UsageError, match="neighbours is 1"):
        TopologyLoss(neighbours=1)
    with pytest.raises(UsageError, match="a batch of 2 has one neighbour for each"):
        TopologyLoss()(features, torch.randn(2, 5))
    assert float(TopologyLoss(diagonal=True)(features, torch.randn(2, 5))) > 0
    assert float(TopologyLoss(neighbours=1, diagonal=True)(torch.randn(6, 5), torch.randn(6, 5))) > 0
