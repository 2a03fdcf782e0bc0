"""Generators: trainable image transforms that make a new domain of a source."""

from pden.generators.base import Generator, draw_noise
from pden.generators.composite import Composite
from pden.generators.geometric import Geometric
from pden.generators.kinds import KINDS, build_generator, default_width, generator_settings
from pden.generators.photometric import AdaIN, Photometric

__all__ = [
    "KINDS",
    "AdaIN",
    "Composite",
    "Generator",
    "Geometric",
    "Photometric",
    "build_generator",
    "default_width",
    "draw_noise",
    "generator_settings",
]
