from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from expkit.distributed import World, all_reduce_mean, barrier, gather, join, leave

# The environment that torchrun gives two processes, which are forked so that torch is imported once.
SCRIPT = """
import atexit, os, socket, sys, torch
from expkit.distributed import all_reduce_mean, barrier, gather, join, leave

with socket.socket() as found:
    found.bind(("127.0.0.1", 0))
    port = found.getsockname()[1]
os.environ.update(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
child = os.fork()
os.environ.update(RANK=str(int(child == 0)), LOCAL_RANK=str(int(child == 0)), CUDA_VISIBLE_DEVICES="")


def gloo_threads():
    threads = os.listdir("/proc/self/task") if os.path.isdir("/proc/self/task") else []
    return [each for each in threads if "gloo" in open(f"/proc/self/task/{each}/comm").read()]

atexit.register(lambda: gloo_threads() and os._exit(3))  # registered before `join`, so called after what that registers
world = join()
mean = all_reduce_mean(torch.tensor([float(world.rank)]))
found = gather({"rank": world.rank})
import torch.distributed.nn.functional  # as the compiler does: its defaults must not keep the group
barrier()
if sys.argv[1] == "leaves":
    leave()
    assert not gloo_threads(), gloo_threads()
assert mean.item() == 0.5 and found == [{"rank": 0}, {"rank": 1}], (mean, found)
if world.is_main:
    assert os.waitpid(child, 0)[1] == 0
"""


def test_without_torchrun_there_is_one_process_and_nothing_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert join() == World(rank=0, size=1, local_rank=0)
    assert join().is_main
    assert gather("x") == ["x"]
    assert all_reduce_mean(torch.tensor(3.0)).item() == 3.0
    barrier()
    leave()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("way", ["leaves", "ends"])
def test_two_processes_average_and_gather(way: str) -> None:
    """No thread of gloo is left, whether they leave the group or just end: one aborts a process now and then."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, way], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
