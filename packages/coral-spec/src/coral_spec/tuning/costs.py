"""What a round costs on this machine, from a few timed rounds of the engine itself, kept on disk.

A round of depth d, width w and budget b costs ``verify(b + 1) + (d - 1) * level(w)``: the target reads b + 1 rows once,
and every level past the first runs the drafter on w nodes. Both terms come from whole rounds - whatever the engine
fuses or captures - and are interpolated between them: the second from two trees that differ in depth alone, or on a CPU
from one level against several. On a GPU rows cost next to nothing and every shape is captured first, so few are timed.
Ours.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import transformers

from coral_spec import __version__, kernels
from coral_spec.backbone import Backbone
from coral_spec.drafter import DrafterConfig
from coral_spec.drafts import Draft
from coral_spec.engine import Session
from coral_spec.sampling import Sampling
from coral_spec.tree import TreeShape
from expkit.checkpoint import write_json
from expkit.rundir import cpu_name

# Trees of one level tell what verification costs, the deeper ones what their levels do. The most telling come first:
# where a round takes long, the last ones are left out.
# fmt: off
SHAPES = tuple(map(TreeShape.parse, (
    "1,5,5", "6,2,5", "1,12,12", "1,3,3", "6,4,12", "1,8,8", "1,1,1", "1,16,16", "1,24,24", "6,10,24", "1,60,60",
)))
CUDA_SHAPES = tuple(map(TreeShape.parse, ("6,10,60", "3,10,60")))
# fmt: on
LEAST_SHAPES = 4  # plain decoding included
CONTEXT, PREFILLED = 128, 8  # tokens in the cache, of which so many are really run
CAPACITY = 256
MOST_ROUNDS = 6
PIPELINED = 8  # rounds timed together where the host may be ahead of the device
SECONDS = 1.6
PREEMPTIONS = 60.0  # per second: about 250 where another process wants the same cores, next to none otherwise

MakeSession = Callable[[TreeShape | None], Session]


@dataclass(frozen=True)
class StepCosts:
    """Milliseconds of the parts of a round.

    Attributes:
        plain: a round without drafting: one token.
        verify: by rows, the root included: a drafted round's first level and its verification.
        level: by width: every further level.
        change: until another shape's rounds are captured; 0 where they are not.
    """

    plain: float
    verify: Mapping[int, float]
    level: Mapping[int, float]
    change: float = 0.0

    def __post_init__(self) -> None:
        values = [self.plain, self.change, *self.verify.values(), *self.level.values()]
        if not self.verify or not self.level or not all(math.isfinite(each) for each in values) or min(values) < 0:
            raise ValueError(f"step costs are {values}, needed finite milliseconds")

    def round(self, shape: TreeShape | None) -> float:
        """Milliseconds of a round; None is plain decoding."""
        if shape is None:
            return self.plain
        return interpolate(self.verify, shape.budget + 1) + (shape.depth - 1) * interpolate(self.level, shape.width)

    @classmethod
    def from_json(cls, record: Mapping[str, object]) -> StepCosts:
        """What :func:`dataclasses.asdict` and JSON made of it (keys are text there)."""

        def numbers(table: object) -> dict[int, float]:
            assert isinstance(table, dict)
            return {int(key): float(value) for key, value in table.items()}

        plain, change = (float(str(record[name])) for name in ("plain", "change"))
        return cls(plain, numbers(record["verify"]), numbers(record["level"]), change)


def interpolate(table: Mapping[int, float], at: float) -> float:
    """The value at ``at`` on straight lines through the table's points, the outermost ones prolonged."""
    points = sorted(table.items())
    if len(points) == 1:
        return points[0][1]
    right = min(max(bisect_right([x for x, _ in points], at), 1), len(points) - 1)
    (x0, y0), (x1, y1) = points[right - 1], points[right]
    return max(0.0, y0 + (y1 - y0) * (at - x0) / (x1 - x0))


def measure(make_session: MakeSession, *, most_rows: int, cuda: bool = False, seconds: float = SECONDS) -> StepCosts:
    """Time rounds of a few shapes through fresh sessions.

    Args:
        make_session: a session of :data:`CAPACITY` tokens that drafts with a shape, or not at all (None).
        most_rows: rows of the proposal head; wider trees are left out.
        cuda: rounds are captured.
        seconds: no further sweep over the shapes is begun after this time; half of it may go into warming up.
    """
    shapes = [shape for shape in (CUDA_SHAPES if cuda else SHAPES) if shape.width <= most_rows]
    fastest = time_rounds(make_session, [None, *shapes], seconds=seconds)
    if cuda and len(shapes) == len(CUDA_SHAPES):
        first, second = map(make_session, shapes)
        return replace(_by_depth(fastest), change=_change(first, second.draft))
    timed = {shape: milliseconds for shape, milliseconds in fastest.items() if shape}
    flat = {shape.budget + 1: spent for shape, spent in timed.items() if shape.depth == 1}
    # More rows never take less time, so what they took bounds fewer ones that were disturbed.
    verify = {rows: min(spent for more, spent in flat.items() if more >= rows) for rows in sorted(flat)}
    level = {
        shape.width: max(0.0, spent - interpolate(verify, shape.budget + 1)) / (shape.depth - 1)
        for shape, spent in timed.items()
        if shape.depth > 1
    }
    # Nor does a plain round take longer than one that drafts too, or a level no time at all.
    plain = min(fastest[None], *verify.values())
    least = 0.01 * plain
    return StepCosts(plain, verify, {width: max(spent, least) for width, spent in sorted(level.items())})


def _by_depth(fastest: Mapping[TreeShape | None, float]) -> StepCosts:
    """From plain rounds and :data:`CUDA_SHAPES`."""
    deep, flat = CUDA_SHAPES
    plain = fastest[None]
    level = max(0.01 * plain, (fastest[deep] - fastest[flat]) / (deep.depth - flat.depth))
    verify = max(plain, fastest[flat] - (flat.depth - 1) * level)
    return StepCosts(plain, {flat.budget + 1: verify}, {flat.width: level})


@torch.inference_mode()
def _change(session: Session, draft: Draft) -> float:
    """Milliseconds until a session has captured its rounds with another tree, kernels being compiled."""
    run = _rounds(session)
    run()
    started = time.perf_counter()
    session.redraft(draft)
    run()
    return (time.perf_counter() - started) * 1e3


@torch.inference_mode()
def time_rounds(
    make_session: MakeSession, shapes: list[TreeShape | None], *, seconds: float
) -> dict[TreeShape | None, float]:
    """Milliseconds of a round of every shape: the fastest of a few, since other work can only add time.

    Sweeps go over all shapes in turn, so that a machine that slows down slows all alike. A round ends by reading its
    tokens, so the device has been waited for.
    """
    started = time.perf_counter()
    rounds: dict[TreeShape | None, Callable[[], float]] = {}
    for shape in shapes:
        if len(rounds) >= LEAST_SHAPES and time.perf_counter() - started > seconds / 2:
            break
        rounds[shape] = _rounds(make_session(shape))
        rounds[shape]()  # warms up
    fastest: dict[TreeShape | None, float] = dict.fromkeys(rounds, math.inf)
    for _ in range(MOST_ROUNDS):
        for shape, run in rounds.items():
            fastest[shape] = min(fastest[shape], run())
        if time.perf_counter() - started > seconds:
            break
    return fastest


def _rounds(session: Session) -> Callable[[], float]:
    """Milliseconds of a round, of one or of several in a pipeline, always at about the same length.

    What the cache holds does not matter, so it stays empty.
    """
    sampling = Sampling()
    vocab, context = session.backbone.vocab_size, session.backbone.context_length
    ids = [(7 * place + 1) % vocab for place in range(min(CONTEXT, context - 1))]
    keep = max(0, len(ids) - PREFILLED)
    seeds = torch.zeros(1, dtype=torch.long, device=session.device)
    session.begin(*session.prefill(ids, keep), keep, sampling, seeds)

    def run() -> float:
        count = 1 if session.ahead == 1 else PIPELINED
        if session.filled + count * (session.draft.depth + 1) > session.room:
            session.rewind(len(ids))
        begun = time.perf_counter()
        for number in range(count):
            while session.under_way < min(session.ahead, count - number):
                session.launch(sampling, seeds)
            session.collect()
        return (time.perf_counter() - begun) / count * 1e3

    return run


class Disturbance:
    """Whether other work took the processor since this was made; never, where the system does not count it.

    Threads that wait for a preempted one make rounds many times as long, so such times say nothing.
    """

    def __init__(self) -> None:
        self._began, self._before = time.perf_counter(), _preemptions()

    def __call__(self) -> bool:
        return _preemptions() - self._before > PREEMPTIONS * (time.perf_counter() - self._began)


def _preemptions() -> int:
    try:
        from resource import RUSAGE_SELF, getrusage
    except ImportError:  # Windows
        return 0
    return getrusage(RUSAGE_SELF).ru_nivcsw


def costs_key(backbone: Backbone, drafter: DrafterConfig, head_rows: int) -> dict[str, object]:
    """All that the costs depend on: sizes and not weights, the device, and the software."""
    target, config = backbone.target, backbone.config
    cuda = target.device.type == "cuda"
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    return {
        "target": [target.name, config.model_type, config.num_hidden_layers, backbone.hidden_size, backbone.vocab_size],
        "layers": bool(backbone.layers),
        "kernels": kernels.available(target.device),
        "drafter": [getattr(drafter, name) for name in sizes],
        "head_rows": head_rows,
        "device": torch.cuda.get_device_name(target.device) if cuda else cpu_name(),
        "dtype": str(target.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "versions": [__version__, str(torch.__version__), transformers.__version__],
    }


def cached(key: Mapping[str, object], folder: Path, measure: Callable[[], StepCosts]) -> StepCosts:
    """The costs kept in ``folder`` under ``key``, else measured and kept there.

    A damaged file is measured anew, a folder that cannot be written to is no error, and costs that were measured beside
    other work are not kept.
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    path = folder / f"{digest}.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["key"] == dict(key):
            return StepCosts.from_json(record["costs"])
    except (OSError, ValueError, KeyError, TypeError, AssertionError):
        pass
    disturbed = Disturbance()
    costs = measure()
    if disturbed():
        return costs
    try:
        write_json(path, {"key": dict(key), "costs": asdict(costs)})
    except OSError:
        pass
    return costs
