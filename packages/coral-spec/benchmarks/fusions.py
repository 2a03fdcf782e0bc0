"""What fusing bought: microseconds of one decoder layer in ever other forms, all of them captured in a CUDA graph.

    python packages/coral-spec/benchmarks/fusions.py --json packages/coral-spec/results/fusions.json

A decoder of SmolLM2-135M's sizes with random weights reads 1, 10 or 61 new nodes behind 200 tokens. Capturing takes
launch overhead away from every form, so what differs is the work itself: the model's own classes and this package's
layers in fewer operations, as they are and by torch.compile; the Triton kernels; and the kernels with one fusion taken
back at a time, which is done by a kernel or torch operation of its own then. Query, key and value that are multiplied
one by one are put side by side by another one, and gate and up one by one leave SiLU and product to torch. A layer is
the whole forward by its layers, so a twelfth of embedding, mask and last norm is in it. Every form's result is compared
with the model's own. `--quick` takes two layers; on a CPU it leaves the kernels and torch.compile out, untimed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from graph_timing import microseconds
from plain_speed import MODELS, random_target
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from coral_spec import kernels, layers
from coral_spec.backbone import Backbone
from coral_spec.cache import StaticCache
from coral_spec.kernels import attention, inputs, layer, linear, slots, top, tree
from coral_spec.masks import chain_ancestors
from expkit.checkpoint import write_json
from expkit.rundir import evidence

CONTEXT, NODES = 200, (1, 10, 61)
LAYERS = 12  # 85 MB of weights: more than a level-2 cache holds
TOLERANCE = 0.05  # relative error that bf16 may make
STOCK = ("model classes", "fewer operations")
TAKEN_BACK = ("norm with projection", "activation with gate-up", "residual with projection", "joint projections")
COMPILED, WITHOUT = (f"{each}, compiled" for each in STOCK), (f"without {each}" for each in TAKEN_BACK)
FORMS = (*STOCK, *COMPILED, "kernels", *WITHOUT, "without early starts")
_linear = linear.linear


def _taken_back(fusion: str) -> Callable[..., linear.Rows]:
    """The product of `coral_spec.kernels.linear` with one of its fusions done apart."""

    def product(states: Tensor, weight: Tensor, **options: Any) -> linear.Rows:
        if fusion == "activation with gate-up" and options.get("gated"):
            options = options | {"gated": False, "activation": None}
            gate, up = _linear(states, weight, **options).states.chunk(2, dim=-1)
            return linear.Rows(functional.silu(gate) * up)
        if fusion == "residual with projection" and options.get("residual") is not None:
            projected = _linear(states, weight).states
            return linear.normed(projected, residual=options["residual"], next_norm=options["next_norm"])
        if fusion == "joint projections" and states.shape[1] < weight.shape[0] and not options.get("gated"):
            query = states.shape[1]
            key = (weight.shape[0] - query) // 2
            parts = [_linear(states, each, **options).states for each in weight.split((query, key, key))]
            return linear.Rows(torch.cat(parts, dim=1))
        if fusion == "joint projections" and options.get("gated"):
            options = options | {"gated": False, "activation": None}
            gate, up = (_linear(states, each, **options).states for each in weight.chunk(2))
            return linear.Rows(functional.silu(gate) * up)
        return _linear(states, weight, **options)

    return product


def _norm_apart(
    projection: layers.Projection,
    rows: linear.Rows,
    norm: layers.Norm | None,
    *,
    activation: str | None = None,
    cast: bool,
) -> linear.Rows:
    states = rows.states if norm is None else linear.normed(rows.states, norm.weight, norm.eps).states
    assert projection.weight is not None
    return _linear(states, projection.weight, activation=activation, gated=activation is not None, cast=cast)


def _add_apart(
    projection: layers.Projection, states: Tensor, residual: Tensor, behind: None, after: layers.Norm | None, cast: bool
) -> linear.Rows:
    assert projection.weight is not None
    return _linear(states, projection.weight, residual=residual, cast=cast)


@contextmanager
def form(name: str) -> Iterator[None]:
    """The engine in this form."""
    with ExitStack() as stack:

        def put(owner: Any, attribute: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(owner, attribute, value))

        if name.startswith("model classes"):
            put(Backbone, "_recognise", lambda self: None)
        if name.startswith(STOCK):
            put(kernels, "serve", lambda states: False)
            # torch.compile cannot trace a cached property
            put(layers.Nodes, "slots", property(layers.Nodes.slots.func))
        elif name == "without norm with projection":
            put(layer, "_project", _norm_apart)
            put(layer, "_add", _add_apart)
        elif name == "without early starts":
            for module in (attention, inputs, linear, slots, top, tree):
                put(module, "early", lambda device: {"EARLY": False})
        elif name != "kernels":
            put(layer, "linear", _taken_back(name.removeprefix("without ")))
        yield


@torch.inference_mode()
def measure(backbone: Backbone, nodes: int, repeats: int, compiled: bool) -> tuple[float, Tensor]:
    """Microseconds of a layer, and the hidden states ``(nodes, hidden)`` that the forward gives."""
    device = backbone.target.device
    generator = torch.Generator().manual_seed(nodes)

    def draw(count: int) -> Tensor:
        return torch.randint(0, backbone.vocab_size, (1, count), generator=generator).to(device)

    cache = StaticCache(CONTEXT + 64)
    start, lengths = (torch.tensor([each], device=device) for each in (0, CONTEXT))
    places = torch.arange(CONTEXT + nodes, device=device)[None]
    backbone.forward(draw(CONTEXT), places[:, :CONTEXT], chain_ancestors(1, CONTEXT, device), start, cache, 0)
    tokens, ancestors = draw(nodes), chain_ancestors(1, nodes, device)
    forward = torch.compile(backbone.forward, dynamic=False) if compiled else backbone.forward

    def call() -> Tensor:
        return forward(tokens, places[:, CONTEXT:], ancestors, lengths, cache, CONTEXT)

    states = call()[0].float()
    return microseconds([call] * repeats) / backbone.config.num_hidden_layers, states


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    device, dtype = (torch.device("cuda"), torch.bfloat16) if cuda else (torch.device("cpu"), torch.float32)
    config = MODELS["SmolLM2-135M"]
    config.num_hidden_layers = 2 if options.quick else LAYERS
    target = random_target(config, device, dtype)
    found: dict[str, dict[str, Any]] = {}
    exact: dict[int, Tensor] = {}
    for name in FORMS if cuda else STOCK:
        with form(name):
            backbone = Backbone(target)
            found[name] = {}
            for nodes in NODES:
                torch.compiler.reset()
                try:
                    time, states = measure(backbone, nodes, 2 if options.quick else 8, "compiled" in name)
                except Exception as failure:  # some releases of torch cannot compile some of these
                    reason = f"{type(failure).__name__}: {(str(failure).splitlines() or [''])[0]}"
                    found[name][str(nodes)] = {"microseconds": None, "failed": reason}
                    print(reason)
                    continue
                error = float((states - exact.setdefault(nodes, states)).norm() / exact[nodes].norm())
                if not error < TOLERANCE:
                    raise SystemExit(f"{name} with {nodes} nodes is {error:.1%} off the model's own classes")
                found[name][str(nodes)] = {"microseconds": time if cuda else None, "error": error}
        print(name, flush=True)
    out = Table("form", *(f"{nodes} nodes, µs a layer" for nodes in NODES))
    for name, each in found.items():
        times = [each[str(nodes)]["microseconds"] for nodes in NODES]
        out.add_row(name, *("-" if time is None else f"{time:.1f}" for time in times))
    Console(width=130).print(out)
    if options.json is not None:
        settings = {"layers": config.num_hidden_layers, "context": CONTEXT, "device": str(device), "dtype": str(dtype)}
        write_json(options.json, {"forms": found, "settings": settings, **evidence(0)})


if __name__ == "__main__":
    main()
