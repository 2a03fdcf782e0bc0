"""What every generator is: a module on batches in training, an ordinary image transform once trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as image_functions

from expkit.errors import UsageError
from pden.pixels import check_pixels


def draw_noise(images: Tensor, size: int, generator: torch.Generator | None = None) -> Tensor:
    """Standard normal noise z, ``(batch, size)``, on the images' device.

    A generator that lives on another device (the usual CPU one) works too: it draws there.
    """
    device = generator.device if generator is not None else images.device
    return torch.randn(len(images), size, generator=generator, device=device).to(images.device)


class Generator(nn.Module):
    """Base of all generators G(x, z). A subclass gives `transform`.

    Attributes:
        channels: of the images.
        noise: size of z; 0 is a generator without randomness, as the reverse one of the cycle loss is.
    """

    def __init__(self, channels: int, noise: int) -> None:
        super().__init__()
        if channels < 1 or noise < 0:
            raise UsageError(f"a generator of {channels} channels and {noise} noise values; use at least 1 and 0")
        self.channels, self.noise = channels, noise

    def transform(self, images: Tensor, noise: Tensor) -> Tensor:
        """A batch in [0, 1], ``(batch, channels, height, width)``, with noise ``(batch, noise)``.

        Same shape, in whatever layout of memory it was computed in.
        """
        raise NotImplementedError

    def draws(self, images: Tensor, noises: Sequence[Tensor]) -> list[Tensor]:
        """`transform` of one batch with each of several noises; a subclass may compute once what they share."""
        return [self.transform(images, noise) for noise in noises]

    def forward(self, images: Any, noise: Tensor | None = None, *, generator: torch.Generator | None = None) -> Any:
        """The images in the generated domain, in the form they came in.

        Args:
            images: one image or a batch: floats in [0, 1] or uint8, ``(channels, height, width)`` with or without
                a batch before it, or a PIL image.
            noise: z, ``(batch, noise)``; drawn where it is not given.
            generator: where the noise is drawn from; torch's own where it is not given.

        Raises:
            UsageError: a wrong number of channels, noise of a wrong shape, or, where none is given, bad pixels.
        """
        if not isinstance(images, Tensor):
            made: Tensor = self(image_functions.pil_to_tensor(images), noise, generator=generator)
            return image_functions.to_pil_image(made)
        if images.dtype == torch.uint8:
            made = self(images.float() / 255, noise, generator=generator)
            return (made * 255).round().to(torch.uint8)
        if images.dim() == 3:
            return self(images[None], noise, generator=generator)[0]
        if images.dim() != 4 or images.shape[1] != self.channels:
            raise UsageError(
                f"images of shape {tuple(images.shape)}; this generator takes {self.channels} channel(s), "
                "with or without a batch before them"
            )
        if noise is None:
            if len(images):
                check_pixels(images, "images")  # not in training, which gives the noise: it would wait for the GPU
            noise = draw_noise(images, self.noise, generator)
        elif noise.shape != (len(images), self.noise):
            raise UsageError(f"noise of shape {tuple(noise.shape)}; it must be {(len(images), self.noise)}")
        return self.transform(images, noise).contiguous()
