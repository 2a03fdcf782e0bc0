"""`train-adv demo`: handwritten digits, adversarial training with and without TRAIN, on any machine."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from train_adv.commands import options

if TYPE_CHECKING:
    from train_adv.data.dataset import DataSet
    from train_adv.topology.report import Measured

BUDGET_SECONDS = 105.0  # no further seed is begun when it would probably end later
NAMES = {"at": "AT", "at+train": "AT + TRAIN"}


def run(
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds.")] = 3,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the 1,294 training images.")] = 20,
    epsilon: Annotated[float, typer.Option(help="Linf radius, for images in [0, 1].")] = 0.3,
    steps: Annotated[int, typer.Option(min=1, help="Steps of PGD in training, a quarter of the radius each.")] = 5,
    topology_weight: Annotated[float, typer.Option(min=0, help="lambda of TRAIN, softmax-cosine kernel.")] = 0.1,
    out: Annotated[Path, typer.Option(help="Folder of the two pictures.")] = Path("train-adv-demo"),
    json: options.Json = None,
) -> None:
    """Train digits classifiers that resist attacks, plainly and with TRAIN; under two minutes on two cores."""
    from expkit.checkpoint import write_json
    from expkit.rundir import evidence
    from train_adv.attacks.norms import check_epsilon
    from train_adv.data.load import digits

    options.check_outputs([json], [out])
    check_epsilon(epsilon, "Linf")
    proof = evidence(0)
    data = digits()
    typer.echo(f"scikit-learn's digits, Linf {epsilon:g}: standard model, AT, and AT + TRAIN for {seeds} seeds ...")
    figures: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="train-adv-demo-") as runs:
        setting = _Setting(Path(runs), data, epochs, epsilon, steps, topology_weight)
        begun = time.monotonic()
        for seed in range(seeds):
            start = time.monotonic()
            figures.append(setting.train(seed))
            now = time.monotonic()
            if seed + 1 < seeds and now - begun + (now - start) > BUDGET_SECONDS:
                typer.echo(f"this machine is slow: the demo ends after {seed + 1} of {seeds} seeds")
                break
        measured = setting.measure()
    rows = [_row(name, figures) for name in NAMES]
    standard = [each["standard"]["natural"] for each in figures]
    _show(rows, standard, epsilon)
    _pictures(rows, standard, measured, data, out, epsilon)
    typer.echo("A demonstration, no benchmark: other radii and --steps come out otherwise (RESULTS.md has some).")
    typer.echo(f"pictures: {out / 'accuracy.png'}, {out / 'neighbourhoods.png'}")
    if json is not None:
        settings = {"data": "digits", "epochs": epochs, "epsilon": epsilon, "steps": steps}
        settings |= {"kernel": "softmax-cosine", "topology_weight": topology_weight}
        write_json(json, {"rows": rows, "standard_natural": standard, "settings": settings, **proof})
        typer.echo(f"figures: {json}")


@dataclass
class _Setting:
    """What is the same for all trainings of the demo."""

    runs: Path
    data: DataSet
    epochs: int
    epsilon: float
    steps: int
    weight: float

    def train(self, seed: int) -> dict[str, dict[str, float]]:
        """The three models of a seed: test accuracies of the last epoch, so that nothing is chosen."""
        path = self.runs / f"standard-{seed}"
        topology = {"kernel": "softmax-cosine", "weight": self.weight, "path": path}
        return {
            "standard": self._fit("standard", seed, "standard", 0.0),
            "at": self._fit("at", seed, "at", 0.0),
            "at+train": self._fit("at+train", seed, "at", topology),
        }

    def _fit(self, name: str, seed: int, host: str, topology: Any) -> dict[str, float]:
        import train_adv

        outcome = train_adv.fit(
            "small-cnn",
            self.data,
            host=host,
            topology=topology,
            name=f"{name}-{seed}",
            runs=self.runs,
            seed=seed,
            epochs=self.epochs,
            batch_size=64,
            device="cpu",
            attack={"epsilon": self.epsilon, "steps": self.steps},
            optimizer={"lr": 0.3, "schedule": "onecycle"},
            validation={"fraction": 0.1, "every": self.epochs},
        )
        last: dict[str, float] = outcome.result["last"]
        return last

    def measure(self) -> tuple[list[Measured], Any]:
        """Topology of the first seed's models."""
        import torch

        from train_adv.topology.report import measure_checkpoints

        paths = [self.runs / f"{name}-0" for name in NAMES]
        return measure_checkpoints(paths, self.runs / "standard-0", self.data, limit=0, device=torch.device("cpu"))


def _row(name: str, figures: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    natural, pgd = ([each[name][key] for each in figures] for key in ("natural", "pgd20"))
    return {
        "name": name,
        "seeds": list(range(len(figures))),
        "natural": sum(natural) / len(natural),
        "pgd20": sum(pgd) / len(pgd),
        "natural_by_seed": natural,
        "pgd20_by_seed": pgd,
    }


def _show(rows: list[dict[str, Any]], standard: list[float], epsilon: float) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"digits, Linf {epsilon:g}, test accuracy in per cent, mean (each seed)")
    for column in ("training", "natural", "PGD-20"):
        table.add_column(column, justify="left" if column == "training" else "right")
    table.add_row("standard", _cell(standard), "")
    for row in rows:
        table.add_row(NAMES[row["name"]], _cell(row["natural_by_seed"]), _cell(row["pgd20_by_seed"]))
    Console().print(table)
    before, after = rows
    natural, pgd = (100 * (after[key] - before[key]) for key in ("natural", "pgd20"))
    typer.echo(
        f"TRAIN: natural {natural:+.1f} points, PGD-20 {pgd:+.1f} points, mean of {len(before['seeds'])} seed(s)."
    )


def _cell(values: list[float]) -> str:
    return f"{100 * sum(values) / len(values):.1f} ({', '.join(f'{100 * value:.1f}' for value in values)})"


def _pictures(
    rows: list[dict[str, Any]],
    standard: list[float],
    measured: tuple[list[Measured], Any],
    data: DataSet,
    out: Path,
    epsilon: float,
) -> None:
    from dataclasses import replace

    from train_adv.topology.plots import plot_accuracies, plot_tsne

    bars: dict[str, tuple[list[float], list[float]]] = {"standard": (standard, [])}
    bars |= {NAMES[row["name"]]: (row["natural_by_seed"], row["pgd20_by_seed"]) for row in rows}
    plot_accuracies(bars, out / "accuracy.png", title=f"digits, Linf {epsilon:g}: bars are means, dots are seeds")
    found, labels = measured
    titles = ("standard", *NAMES.values())
    named = [replace(each, name=title) for each, title in zip(found, titles, strict=True)]
    plot_tsne(named, labels, data.class_names, out / "neighbourhoods.png")
