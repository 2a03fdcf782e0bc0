"""The command line: one module per verb in `pden.commands`, registered under its name.

Those modules import torch only when they run, so that ``--help`` answers at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import NoReturn

import typer

from expkit import cli as manner

VERBS = ("train", "eval", "predict", "gallery", "expand", "compare", "demo")
HELP = "Train on one domain, work on others: progressive domain expansion."


def build() -> typer.Typer:
    """The application with every verb."""
    app = manner.make_app("pden", HELP, "pden")
    for verb in VERBS:
        module = "evaluate" if verb == "eval" else verb
        app.command(verb)(import_module(f"pden.commands.{module}").run)
    return app


def main() -> NoReturn:
    """Entry point of ``pden``."""
    manner.main(build())


if __name__ == "__main__":
    main()
