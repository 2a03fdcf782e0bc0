"""Features of two processes give the loss and the gradient of one process that holds them all."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from train_adv.topology.loss import TopologyLoss

REDUCTIONS = ("row", "mean", "sum")


def half(rank: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    own, other = whole()
    found = {}
    for reduction in REDUCTIONS:
        part = own.detach()[4 * rank : 4 * rank + 4].clone().requires_grad_()
        loss = TopologyLoss(reduction=reduction)(part, other[4 * rank : 4 * rank + 4])
        loss.backward()
        found[reduction] = {"loss": loss.detach(), "gradient": part.grad}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def whole() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8, 3, generator=generator, requires_grad=True), torch.randn(8, 5, generator=generator)


@pytest.mark.slow
def test_two_processes_are_as_one(tmp_path):
    # By path: pytest's import mode gives this file a name that a new process could not import.
    ranks = [subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [each.wait(timeout=120) for each in ranks] == [0, 0]
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for reduction in REDUCTIONS:
        own, other = whole()
        loss = TopologyLoss(reduction=reduction)(own, other)
        loss.backward()
        assert torch.allclose((parts[0][reduction]["loss"] + parts[1][reduction]["loss"]) / 2, loss), reduction
        # Averaging over processes divides by 2, which the caller does on the parameters' gradients.
        gradient = torch.cat([part[reduction]["gradient"] for part in parts]) / 2
        assert torch.allclose(gradient, own.grad, rtol=1e-4, atol=1e-6), reduction


if __name__ == "__main__":
    half(int(sys.argv[1]), sys.argv[2])
