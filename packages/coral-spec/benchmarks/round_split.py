"""Where the time of a drafted round goes, and what each step of the engine bought.

    python packages/coral-spec/benchmarks/round_split.py --json packages/coral-spec/results/round-split.json

The same prompt, drafter and tree in every form (in bf16 answers may part at ties): the model's own classes launched
operation by operation; layers in fewer operations; on a GPU the Triton kernels, then rounds captured as CUDA graphs,
then kernels that start while the one in front of them ends. The host's share is what a round takes beyond the replay of
its graph. Writes a picture beside the JSON. `--quick`: few rounds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table

from coral_spec import kernels
from coral_spec.backbone import Backbone
from coral_spec.bundled import bundled_drafter
from coral_spec.engine import Session
from coral_spec.kernels import attention, grouped, inputs, linear, routing, slots, top, tree
from coral_spec.model import Model
from coral_spec.sampling import Sampling
from coral_spec.statistics import PARTS, Stopwatch
from coral_spec.targets import Target, load_target
from coral_spec.tree import TreeShape
from expkit.checkpoint import atomic_path, write_json
from expkit.device import synchronize
from expkit.rundir import evidence

PROMPT = "Explain how photosynthesis works, step by step, for a curious twelve year old."
COLOURS = {"target": "#0072B2", "drafter": "#E69F00", "head": "#009E73", "rest": "#CC79A7", "host": "#9A9A9A"}
KERNELS = (attention, grouped, inputs, linear, routing, slots, top, tree)


@contextmanager
def form(name: str) -> Iterator[None]:
    """The engine with only a part of what makes it fast."""
    with ExitStack() as stack:

        def put(owner: Any, attribute: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(owner, attribute, value))

        if name == "model classes":
            put(Backbone, "_recognise", lambda self: None)
        if name in ("model classes", "fewer operations"):
            put(kernels, "serve", lambda states: False)
            put(kernels, "available", lambda device: False)
        if name == "kernels":
            made = Session.__init__

            def uncaptured(self: Session, *args: Any) -> None:
                made(self, *args)
                self.graphs = None

            put(Session, "__init__", uncaptured)
        if name == "captured":
            for module in KERNELS:
                put(module, "early", lambda device: {"EARLY": False})
        yield


@torch.inference_mode()
def measure(target: Target, shape: TreeShape | None, rounds: int) -> dict[str, Any]:
    """Milliseconds a round, by part, and the replay alone where rounds are captured."""
    drafter = str(bundled_drafter(target)) if shape else "none"
    model = Model(Backbone(target), draft=drafter, tree=shape, head="full" if shape else "auto")
    session = model.session(1024)
    seeds = torch.zeros(1, dtype=torch.long, device=session.device)
    ids = model.encode(PROMPT)
    found: dict[str, Any] = {}
    for _ in range(2):  # the first one warms up
        session.begin(*session.prefill(ids), 0, Sampling(), seeds)
        synchronize(session.device)
        session.watch = Stopwatch(session.device)
        session.watch.lap("rest")
        started = time.perf_counter()
        lengths = 0
        for number in range(rounds):
            while session.under_way < min(session.ahead, rounds - number):
                session.launch(Sampling(), seeds)
            lengths += len(session.collect().tokens[0])
        synchronize(session.device)
        wall = (time.perf_counter() - started) / rounds * 1e3
        split = session.watch.split(session.shares())
        found = {"milliseconds": wall, "tau": lengths / rounds}
        found["parts"] = {part: split.get(part, 0.0) / rounds * 1e3 for part in PARTS}
    if session.graphs is not None:
        found["replay"] = replay(session, rounds)
        # Parts are shares of the whole; the host's own share is none of theirs.
        device = min(found["replay"], found["milliseconds"])
        known = sum(found["parts"].values())
        found["parts"] = {part: spent * device / known for part, spent in found["parts"].items()}
        found["parts"]["host"] = found["milliseconds"] - device
    found["tokens_per_second"] = found["tau"] / found["milliseconds"] * 1e3
    return found


def replay(session: Session, rounds: int) -> float:
    """Milliseconds of the round's graph, back to back, at about the length of the text before."""
    assert session.graphs is not None
    graph = next(each.graph for (*_, timed), each in session.graphs._rounds.items() if not timed)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    session.rewind(session.filled // 2)
    before = session.lengths.clone()
    torch.cuda.synchronize()
    begin.record()
    for _ in range(rounds):
        graph.replay()
        session.lengths.copy_(before)
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / rounds


def draw(forms: dict[str, dict[str, Any]], path: Path, title: str) -> None:
    """Stacked bars: all forms on one scale, and below, the fast ones on a scale of their own."""
    from matplotlib.figure import Figure

    slowest = max(each["milliseconds"] for each in forms.values())
    fast = {name: each for name, each in forms.items() if each["milliseconds"] < slowest / 4}
    panels = [forms, fast] if fast else [forms]
    heights = [len(panel) + 0.8 for panel in panels]
    figure = Figure(figsize=(8.4, 0.62 * sum(heights) + 1.2), layout="constrained")
    for axes, panel in zip(
        figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0], panels, strict=True
    ):
        for row, each in enumerate(panel.values()):
            left = 0.0
            for part, spent in each["parts"].items():
                axes.barh(row, spent, left=left, color=COLOURS[part], label=part if row == len(panel) - 1 else None)
                left += spent
            axes.text(left, row, f"  {each['milliseconds']:.2f} ms, {each['tokens_per_second']:.0f} tok/s", va="center")
        axes.set_yticks(range(len(panel)), list(panel))
        axes.invert_yaxis()
        axes.set_xlim(0, 1.35 * max(each["milliseconds"] for each in panel.values()))
        axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("milliseconds of a round")
    axes.legend(frameon=False, ncols=5, loc="upper center", bbox_to_anchor=(0.45, -0.28))
    figure.suptitle(title, fontsize=11)
    with atomic_path(path) as aside:
        figure.savefig(aside, format="png", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--tree", help="6,10,60 on a GPU, 2,3,5 on a CPU")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    rounds = 6 if options.quick else options.rounds
    cuda = torch.cuda.is_available()
    shape = TreeShape.parse(options.tree or ("6,10,60" if cuda else "2,3,5"))
    names = ["model classes", "fewer operations", *(["kernels", "captured", "captured, early starts"] if cuda else [])]
    forms: dict[str, dict[str, Any]] = {}
    plain: dict[str, dict[str, Any]] = {}
    load: Callable[[], Target] = lambda: load_target(options.model)  # noqa: E731
    for name in names:
        with form(name):
            forms[name] = measure(load(), shape, rounds)
            plain[name] = measure(load(), None, rounds)
    out = Table("form", "ms a round", *PARTS, "host", "tokens/s", "plain tokens/s")
    for name, each in forms.items():
        parts = [f"{each['parts'].get(part, 0.0):.2f}" for part in (*PARTS, "host")]
        speeds = [f"{one[name]['tokens_per_second']:.0f}" for one in (forms, plain)]
        out.add_row(name, f"{each['milliseconds']:.2f}", *parts, *speeds)
    Console(width=130).print(out)
    if options.json is not None:
        device = torch.cuda.get_device_name() if cuda else "CPU"
        settings = {"model": options.model, "tree": str(shape), "rounds": rounds, "head": "full"}
        write_json(options.json, {"drafting": forms, "plain": plain, "settings": settings, **evidence(0)})
        draw(forms, options.json.with_suffix(".png"), f"A drafted round of {options.model}, tree {shape}, {device}")


if __name__ == "__main__":
    main()
