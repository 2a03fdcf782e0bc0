"""Functions of tensors as CUDA graphs: plain calls without a GPU, the same figures with one."""

from __future__ import annotations

from typing import Any

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
    beside = Beside(None)
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


@pytest.mark.gpu
def test_recordings_share_no_workspace_and_leave_none_behind() -> None:
    x, weight = torch.randn(64, 512, device=CUDA), torch.randn(512, 512, device=CUDA)

    def held() -> int:
        run = Captured(lambda x: torch.autograd.grad((x @ weight).square().sum(), weight), enabled=True)
        found = run(x)[0].clone()
        torch.testing.assert_close(found, 2 * x.T @ (x @ weight), rtol=1e-2, atol=1.0)
        del run
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    weight.requires_grad_()
    held()
    first = held()
    assert all(held() <= first for _ in range(6))


@pytest.mark.gpu
def test_recordings_of_one_pool_share_their_memory() -> None:
    x = torch.randn(1 << 20, device=CUDA)

    def held(pool: Any) -> int:
        before = torch.cuda.memory_reserved()
        runs = [Captured(lambda x, n=n: (x.sin() + n).cos().sum(), True, pool=pool) for n in range(4)]
        for _ in range(2):
            for n, run in enumerate(runs):
                torch.testing.assert_close(run(x), (x.sin() + n).cos().sum())
        found = torch.cuda.memory_reserved() - before
        del runs, run
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return found

    held(None)
    assert held(torch.cuda.graph_pool_handle()) < held(None)


@pytest.mark.gpu(2)
def test_a_graph_is_on_the_device_of_its_inputs() -> None:
    run = Captured(lambda x: 2 * x, enabled=True)
    beside = Beside(torch.device("cuda", 1))
    with torch.cuda.device(0):
        for _ in range(3):
            x = torch.randn(5, device="cuda:1")
            assert torch.equal(run(x), 2 * x)
            found = beside(lambda x: 3 * x, x)
            beside.join()
            assert torch.equal(found, 3 * x)
