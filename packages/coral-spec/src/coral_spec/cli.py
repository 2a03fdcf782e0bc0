"""The command line: one module per verb in `coral_spec.commands`, registered under its name.

Those modules import torch and transformers only when they run, so that ``--help`` answers at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import NoReturn

import typer

from expkit import cli as manner

VERBS = ("generate", "chat", "bench", "check", "data", "train", "eval", "estimate", "models", "demo")
HELP = "Speculative decoding for language models: the same words, sooner."


def build() -> typer.Typer:
    """The application with every verb."""
    app = manner.make_app("coral-spec", HELP, "coral-spec")
    for verb in VERBS:
        app.command(verb)(import_module(f"coral_spec.commands.{verb}").run)
    return app


def main() -> NoReturn:
    """Entry point of ``coral-spec``."""
    manner.main(build())


if __name__ == "__main__":
    main()
