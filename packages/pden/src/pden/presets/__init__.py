"""Settings that come with the package, by name."""

from __future__ import annotations

from pathlib import Path

from expkit.errors import UsageError

NAMES = ("paper", "ours", "tiny", "demo")


def preset_path(name: str) -> Path:
    """The TOML file of a preset.

    Raises:
        UsageError: there is none of this name.
    """
    if name not in NAMES:
        raise UsageError(f'unknown preset "{name}"; use {", ".join(NAMES)}')
    return Path(__file__).parent / f"{name}.toml"
