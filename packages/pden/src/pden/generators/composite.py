"""Both kinds in one generator: the geometric one first, so that its borders are painted over with the rest (ours)."""

from __future__ import annotations

from torch import Tensor

from pden.generators.base import Generator
from pden.generators.geometric import Geometric
from pden.generators.photometric import Photometric


class Composite(Generator):
    """A geometric generator followed by a photometric one, driven by the two halves of the noise.

    Args:
        channels: of the images.
        width: of each part.
        noise: size of z for each part; the composite takes twice as much.
        grid, grid_share: of the photometric part's `AdaIN`.
    """

    def __init__(
        self, channels: int = 3, width: int = 16, noise: int = 10, grid: int = 0, grid_share: float = 1.0
    ) -> None:
        super().__init__(channels, 2 * noise)
        self.width, self.grid, self.grid_share = width, grid, grid_share
        self.geometric = Geometric(channels, width, noise)
        self.photometric = Photometric(channels, width, noise, grid, grid_share)

    def transform(self, images: Tensor, noise: Tensor) -> Tensor:
        first, second = noise.chunk(2, dim=1)
        return self.photometric.transform(self.geometric.transform(images, first), second)
