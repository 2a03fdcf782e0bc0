"""torchrun's processes: who am I, wait, average, gather. Without torchrun every function is a no-op."""

from __future__ import annotations

import atexit
import os
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """This process among all.

    Attributes:
        rank: 0 .. size - 1.
        size: number of processes.
        local_rank: index on this machine, which is also the index of its GPU.
    """

    rank: int
    size: int
    local_rank: int

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0


def join() -> World:
    """Join the group that torchrun describes in the environment (nccl with a GPU each, else gloo), until `leave` or the
    end of the process."""
    world = World(
        rank=int(os.environ.get("RANK", "0")),
        size=int(os.environ.get("WORLD_SIZE", "1")),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
    )
    if world.size == 1 or dist.is_initialized():
        return world
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    on_gpu = torch.cuda.is_available() and torch.cuda.device_count() >= local_size
    device = torch.device("cuda", world.local_rank) if on_gpu else None
    if device is not None:
        torch.cuda.set_device(device)
    # Its functions have the group as a default from their import on. Imported later, as torch's compiler does, they
    # would keep the group and gloo's threads beyond `leave`, and these abort the process at its end now and then.
    import_module("torch.distributed.nn")
    dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device)  # told, nccl has no device to guess
    atexit.register(leave)  # for scripts that do not leave by themselves: gloo's threads would outlive them as well
    return world


def barrier() -> None:
    """Wait until every process is here."""
    if _active():
        dist.barrier()


def all_reduce_mean(tensor: Tensor) -> Tensor:
    """The mean of `tensor` over all processes, in place; returned for convenience."""
    if _active():
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor


def gather(obj: Any) -> list[Any]:
    """`obj` of every process, in rank order, on every process."""
    if not _active():
        return [obj]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, obj)
    return found


def leave() -> None:
    """Leave the group; harmless outside one."""
    if _active():
        dist.destroy_process_group()


def _active() -> bool:
    return dist.is_available() and dist.is_initialized()
