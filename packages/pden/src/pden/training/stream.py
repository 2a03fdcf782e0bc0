"""Randomness by address: every step draws from a stream that its place in the run names, so nothing need be saved."""

from __future__ import annotations

import hashlib
import random

import torch


class Stream:
    """Random numbers of one step.

    Attributes:
        seed: a hash of the address.
        torch: generator on the device.
        host: generator of decisions that no tensor holds.
    """

    def __init__(self, device: torch.device, *address: object) -> None:
        digest = hashlib.blake2b(repr(address).encode(), digest_size=8).digest()
        self.seed = int.from_bytes(digest, "little") >> 1
        self.device, self.torch = device, torch.Generator(device).manual_seed(self.seed)
        self.host = random.Random(self.seed)

    def seed_layers(self) -> None:
        """Seed what layers draw from by themselves, as dropout does.

        `torch.manual_seed` seeds every kind of device, and without a GPU it formats a stack trace for each of them.
        """
        torch.default_generator.manual_seed(self.seed)
        if self.device.type == "cuda":
            index = torch.cuda.current_device() if self.device.index is None else self.device.index
            torch.cuda.default_generators[index].manual_seed(self.seed)
