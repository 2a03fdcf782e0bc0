"""The kinds of generator by name, and their size for a given image size."""

from __future__ import annotations

from typing import Any

from expkit.errors import UsageError
from pden.generators.base import Generator
from pden.generators.composite import Composite
from pden.generators.geometric import Geometric
from pden.generators.photometric import Photometric

KINDS: dict[str, type[Photometric] | type[Geometric] | type[Composite]] = {
    "photometric": Photometric,
    "geometric": Geometric,
    "composite": Composite,
}


def default_width(size: int) -> int:
    """Channels after the first convolution: the paper's 16 up to 64 pixels, 32 above (ours)."""
    return 16 if size <= 64 else 32


def build_generator(
    kind: str, *, channels: int = 3, width: int = 16, noise: int = 10, grid: int = 0, grid_share: float = 1.0
) -> Generator:
    """A new generator.

    Args:
        grid: on which the style of a photometric part differs by place; a geometric one has none.
        grid_share: of its draws, those whose style does.

    Raises:
        UsageError: an unknown kind.
    """
    if kind not in KINDS:
        raise UsageError(f'unknown generator "{kind}"; use {", ".join(KINDS)}')
    made = KINDS[kind]
    if issubclass(made, Geometric):
        return made(channels, width, noise)
    return made(channels, width, noise, grid, grid_share)


def generator_settings(generator: Generator) -> dict[str, Any]:
    """What `build_generator` needs to make one like this."""
    kind = next(name for name, each in KINDS.items() if type(generator) is each)
    noise = generator.noise // 2 if kind == "composite" else generator.noise
    painting = {"grid": getattr(generator, "grid", 0), "grid_share": getattr(generator, "grid_share", 1.0)}
    return {"kind": kind, "channels": generator.channels, "width": generator.width, "noise": noise, **painting}
