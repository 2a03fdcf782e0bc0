"""`coral-spec train` from end to end: answers, drafter, and what is trained on the frozen drafter.

`runs/NAME` is the drafter's run; `runs/NAME/router` and `runs/NAME/low-rank` are runs of their own below it. All leave
their files in `runs/NAME/drafter`. A stage that is finished is not done again when the run is resumed.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from filecmp import cmp
from pathlib import Path
from typing import Any

import torch

from coral_spec.backbone import Backbone
from coral_spec.drafter import WEIGHTS, Drafter, load_ranking
from coral_spec.grouping import FILE as GROUPING
from coral_spec.grouping import Grouping, make_grouping, require_groups
from coral_spec.heads.choose import warn_small_head
from coral_spec.heads.low_rank import LowRankFactors
from coral_spec.router import Router, Routing
from coral_spec.targets import Target
from coral_spec.training.answering import write_answers
from coral_spec.training.config import STAGES, Stage, TrainConfig
from coral_spec.training.loop import Loop, require_plain_head
from coral_spec.training.prompts import read_prompts
from coral_spec.training.report import Curves, add_section, plot_curves
from coral_spec.training.run import Outcome, best_of, common_result, fit_in, read_answers, train
from coral_spec.training.second import HeldOut, LowRankTrainer, RouterTrainer, SecondStage
from expkit.checkpoint import atomic_path, write_json
from expkit.cli import console
from expkit.config import flatten, load_config
from expkit.distributed import World, barrier, gather
from expkit.errors import UsageError
from expkit.metrics import read_metrics
from expkit.rundir import evidence

CURVES = {
    "router": Curves(
        ("router",), "held_out_mass", "share of the probability", "mass of the target that is read, held out"
    ),
    "low-rank": Curves(("soft",), "held_out_agreed", "share of positions", "likeliest token the target's, held out"),
}


# settings that change nothing of a stage that is done
ELSEWHERE = {
    "drafter": ("stages", "answers.", "router.", "low_rank."),
    "router": ("stages", "answers.", "low_rank."),
    "low-rank": ("stages", "answers.", "router."),
}


def require_inputs(config: TrainConfig) -> None:
    """UsageError for files that a stage needs and lacks, before any model is loaded."""
    if "data" in config.stages:
        answers, held = config.answers, config.evaluation.prompts
        count = answers.self_prompts
        if answers.prompts is not None:
            count = len(read_prompts(answers.prompts, answers.limit))
        if len(config.stages) > 1 and count <= held:
            raise UsageError(
                f"{count} prompts, {held} of them held out, leave nothing to train on; lower evaluation.prompts or "
                "take more prompts"
            )
    if config.drafter is not None and not (config.drafter / "config.json").is_file():
        raise UsageError(f"drafter is {config.drafter}, which is no drafter's folder: it has no config.json")


def require_target(config: TrainConfig, target: Target) -> None:
    """UsageError for what a stage cannot do with this target, before any stage begins."""
    if all(stage == "data" for stage in config.stages):
        return
    if target.dtype == torch.float16:
        raise UsageError("training in float16 is not supported; use dtype bf16 or fp32")
    require_plain_head(Backbone(target))
    vocab, width = target.model.get_output_embeddings().weight.shape  # type: ignore[no-untyped-call]
    if "router" in config.stages:
        require_groups(config.router.groups, config.router.always, vocab)
    if "low-rank" in config.stages and config.low_rank.rank > width:
        raise UsageError(f"low_rank.rank is {config.low_rank.rank}, but the head is {width} wide")


def run_stages(
    config: TrainConfig, target: Target, runs: Path, world: World, *, resume: bool = False
) -> dict[Stage, Outcome]:
    """All stages of a configuration, in order; what each came to (empty on all but the main process).

    Args:
        runs: folder of all runs.
        resume: go on with the run of this name; stages that are finished stay as they are.

    Raises:
        UsageError: whatever is wrong with the configuration, the answers or the folders.
    """
    require_target(config, target)
    folder, found = runs / config.name, dict[Stage, Outcome]()
    stages = [stage for stage in STAGES if stage in config.stages]
    if world.is_main and not resume and "drafter" in stages and folder.is_dir() and any(folder.iterdir()):
        raise UsageError(f"run {folder} exists already; resume it or choose another name")
    for stage in stages:
        if stage == "data":
            write_answers(config.answers, target, config.data[0], world)
            barrier()
            continue
        at = folder if stage == "drafter" else folder / stage
        own = config if stage == "drafter" else _own_settings(stage, config)
        outcome = _finished(stage, at, own) if resume else None
        if outcome is None:
            # of a run that was killed before, this stage may not have begun yet
            again = resume and ((at / "config.toml").is_file() or (stage == stages[0] and not folder.is_dir()))
            if stage == "drafter":
                outcome = train(config, target, runs, world, resume=again)
            else:
                outcome = _train_head(stage, own, target, folder, world, again)
            barrier()
        if outcome is not None and world.is_main:
            found[stage] = outcome
    return found


def _finished(stage: Stage, folder: Path, config: TrainConfig) -> Outcome | None:
    """What a stage came to that is done; UsageError when it was done with other settings."""
    path = folder / "result.json"
    if not path.is_file():
        return None
    before, now = (flatten(asdict(each)) for each in (load_config(TrainConfig, folder / "config.toml"), config))
    own = [key for key in now if not key.startswith(ELSEWHERE[stage])]
    changed = [f"{key} ({before[key]!r} -> {now[key]!r})" for key in own if before[key] != now[key]]
    if changed:
        raise UsageError(f"{folder} was finished with other settings: {', '.join(changed)}; choose another name")
    return Outcome(folder, json.loads(path.read_text(encoding="utf-8")))


def _own_settings(stage: Stage, config: TrainConfig) -> TrainConfig:
    """Those of a run on the frozen drafter."""
    settings = config.router if stage == "router" else config.low_rank
    return replace(
        config,
        name=stage,
        steps=settings.steps,
        max_minutes=settings.max_minutes,
        optimizer=replace(config.optimizer, lr=settings.lr),
    )


def _train_head(
    stage: Stage, config: TrainConfig, target: Target, folder: Path, world: World, resume: bool
) -> Outcome | None:
    record = evidence(config.seed)
    answers, manifests = read_answers(config, target)
    own = folder / "drafter"
    if config.drafter is not None and world.is_main:
        Drafter.load(config.drafter, target)  # refused before anything is copied
        if not own.is_dir():
            with atomic_path(own) as temporary:
                shutil.copytree(config.drafter, temporary)
        elif not cmp(config.drafter / WEIGHTS, own / WEIGHTS, shallow=False):
            raise UsageError(f"drafter is {config.drafter}, but {own} holds another one; choose another name")
    barrier()
    drafter = Drafter.load(folder / "drafter", target)
    trainer: SecondStage
    if stage == "router":
        at = folder / stage if resume else None
        trainer = _router_trainer(config, target, answers, world, drafter, folder / "drafter", at)
    else:
        trainer = LowRankTrainer(config, target, answers, world, drafter)
    run = fit_in(folder, trainer, resume=resume)
    if run is None:
        return None
    best = best_of(run)
    trainer.module.load_state_dict(best.tensors)
    scores = trainer.evaluate()
    result = {
        **common_result(trainer, run, manifests, record, best.step),
        **scores.figures,
        **scores.curves,
        **_save(trainer, folder / "drafter", scores),
    }
    lines = read_metrics(run.path / "metrics.jsonl")
    if not plot_curves(run.path / "curves.png", lines, f"{folder.name}: {stage}, {config.target}", CURVES[stage]):
        console().print("curves.png is left out: matplotlib is not installed")
    write_json(run.path / "result.json", result)
    return Outcome(run.path, result)


def _router_trainer(
    config: TrainConfig,
    target: Target,
    answers: Any,
    world: World,
    drafter: Drafter,
    folder: Path,
    resumed: Path | None,
) -> RouterTrainer:
    settings = config.router
    weight = target.model.get_output_embeddings().weight.detach()  # type: ignore[no-untyped-call]
    if resumed is not None and (resumed / GROUPING).is_file():
        grouping = Grouping.load(resumed, len(weight))
    else:
        ranking = load_ranking(folder, len(weight))
        if ranking is None:
            raise UsageError(f"{folder} has no frequency.safetensors, which says what a router always reads")
        grouping = make_grouping(
            settings.grouping,
            settings.groups,
            settings.always,
            ranking,
            weight=weight,
            answers=answers,
            first=target.eos_token_ids,
            seed=config.seed,
        )
        grouping = Grouping(gather(grouping.slots)[0], grouping.always, grouping.kind)  # one for all processes
    trainer = RouterTrainer(config, target, answers, world, drafter, grouping)
    routing = Routing(trainer.module, grouping, settings.active, settings.scores)  # type: ignore[arg-type]
    warn_small_head(routing, sum(part.numel() for part in drafter.parameters()), weight.shape[1])
    return trainer


def _save(trainer: Loop, folder: Path, scores: HeldOut) -> dict[str, Any]:
    """Write what was trained into the drafter's folder, and say in its card what that is."""
    tokenizer = trainer.target.tokenizer_hash
    if isinstance(trainer, RouterTrainer):
        assert isinstance(trainer.module, Router)
        settings, grouping = trainer.config.router, trainer.grouping
        routing = Routing(trainer.module, grouping, settings.active, settings.scores)
        routing.save(folder, tokenizer)
        share = routing.rows / grouping.vocab_size
        add_section(
            folder,
            "Router of the head",
            f"{grouping.groups} groups of {grouping.rows} head rows ({grouping.kind}), {grouping.always} always read, "
            f"{settings.active} more at every level: {routing.rows:,} rows, {share:.1%}. On held-out answers "
            f"{scores.figures['held_out_mass']:.3f} of the target's probability is read, and its likeliest token at "
            f"{scores.figures['held_out_recall']:.3f} of positions (each position choosing for itself).\n"
            "Without `router.safetensors` the folder works all the same, with other heads.\n",
        )
        return {"rows": routing.rows, "rows_share": share, "grouping": grouping.kind, "digest": grouping.digest}
    assert isinstance(trainer.module, LowRankFactors)
    trainer.module.save(folder, tokenizer)
    add_section(folder, "Head of low rank", f"Rank {trainer.module.rank}, trained on this drafter's features.\n")
    return {"rank": trainer.module.rank}
