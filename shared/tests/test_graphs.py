"""Functions of tensors as CUDA graphs: plain calls without a GPU, the same figures with one."""

from __future__ import annotations

import pytest
import torch

from expkit.graphs import Beside, Captured
from expkit.norms import kept_statistics

CUDA = torch.device("cuda")


def test_without_graphs_a_call_is_a_plain_one() -> None:
    calls = []
    run = Captured(lambda *given: calls.append(given) or given, enabled=False)
    first, second = torch.ones(2), torch.zeros(3)
    assert run(first, second) == (first, second) and len(calls) == 1
    beside = Beside(enabled=False)
    assert beside(lambda x, y: x + y, 1, 2) == 3
    beside.join()


def test_statistics_are_kept_and_their_counters_too() -> None:
    layers = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.Dropout(), torch.nn.BatchNorm1d(2))
    layers(torch.randn(8, 2))
    before = {name: value.clone() for name, value in layers.state_dict().items()}
    with kept_statistics(layers):
        layers(5 + torch.randn(8, 2))
        assert not torch.equal(layers[0].running_mean, before["0.running_mean"])
    assert all(torch.equal(value, before[name]) for name, value in layers.state_dict().items())


@pytest.mark.gpu
def test_a_graph_gives_what_a_plain_call_gives_for_every_shape() -> None:
    run = Captured(lambda x, y: {"sum": x + y, "none": None}, enabled=True)
    for size in (3, 5, 3):
        x, y = torch.randn(size, device=CUDA), torch.randn(size, device=CUDA)
        found = run(x, y)
        assert torch.equal(found["sum"], x + y) and found["none"] is None


@pytest.mark.gpu
def test_trial_runs_leave_statistics_and_random_numbers_alone() -> None:
    points = torch.randn(64, 4, device=CUDA)
    found = []
    for enabled in (False, True):
        layer, noisy = torch.nn.BatchNorm1d(4).to(CUDA), torch.nn.Dropout()
        torch.cuda.manual_seed(3)
        run = Captured(lambda x, layer=layer, noisy=noisy: noisy(layer(x)), enabled, [layer])
        found.append([run(points).clone(), layer.running_mean, layer.num_batches_tracked, torch.rand(4, device=CUDA)])
    assert all(torch.equal(plain, graph) for plain, graph in zip(*found, strict=True))
