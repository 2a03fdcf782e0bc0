"""The command line: one module per verb in `train_adv.commands`, registered under its name.

Those modules import torch only when they run, so that ``--help`` answers at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import NoReturn

import typer

from expkit.cli import main as start
from expkit.cli import make_app

VERBS = ("train", "eval", "predict", "attack", "topology", "demo")
HELP = "Adversarial training that keeps natural accuracy."


def build() -> typer.Typer:
    """The application with every verb."""
    app = make_app("train-adv", HELP, "train-adv")
    for verb in VERBS:
        app.command(verb)(import_module(f"train_adv.commands.{verb}").run)
    return app


def main() -> NoReturn:
    """Entry point of ``train-adv``."""
    start(build())


if __name__ == "__main__":
    main()
