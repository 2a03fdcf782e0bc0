"""ERM + RandAugment (Cubuk et al., 2020): n random operations of one magnitude on each image.

Of its fourteen operations the nine that AugMix has too: identity, colour, contrast, brightness, sharpness are left out.
"""

from __future__ import annotations

from torch import Tensor

from pden.baselines.erm import Erm
from pden.baselines.operations import random_operation
from pden.training.stream import Stream


class RandAugment(Erm):
    """Args:
    count: operations in a row (n).
    magnitude: of each (m), 0 to 1; 0.3 is 9 of 30.
    """

    def __init__(self, count: int = 2, magnitude: float = 0.3) -> None:
        self.count, self.magnitude = count, magnitude

    def views(self, images: Tensor, stream: Stream) -> Tensor:
        for _ in range(self.count):
            images = random_operation(images, self.magnitude, stream.torch, fixed=True)
        return images
