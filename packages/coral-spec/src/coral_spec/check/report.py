"""The whole check: greedy in working precision and in fp32, sampled in fp32; as a table and as JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from rich.table import Table

from coral_spec.check.greedy import GreedyReport, check_greedy
from coral_spec.check.noise import reference_model
from coral_spec.check.sampled import TOKENS, SampledReport, check_sampled

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from coral_spec.model import Model
    from coral_spec.tree import TreeShape


@dataclass(frozen=True)
class Report:
    """Outcome of `check`.

    Attributes:
        model, draft: what was checked.
        greedy: one report per precision, fp32 last.
        sampled: the chi-square tests.
    """

    model: str
    draft: str
    greedy: list[GreedyReport]
    sampled: SampledReport

    @property
    def passed(self) -> bool:
        """No bug anywhere."""
        return self.sampled.passed and all(report.passed for report in self.greedy)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "passed": self.passed,
            "model": self.model,
            "draft": self.draft,
            "greedy": [report.to_dict() for report in self.greedy],
            "sampled": self.sampled.to_dict(),
        }


def check(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    tree: TreeShape | None = None,
    head: str | int = "auto",
    max_new_tokens: int = 64,
    draws: int = 2000,
    temperature: float = 1.0,
    top_k: int = 8,
    seed: int = 0,
    on_progress: Callable[[str, int, int], None] = lambda part, done, total: None,
) -> Report:
    """Check a model with its draft.

    Args:
        model: as loaded; an fp32 copy of the target joins it in memory where it is not fp32 itself.
        prompts: token ids, for the greedy part; the first one is the cached prefix of the sampled part.
        tree, head: what `model` was loaded with.
        max_new_tokens: of the greedy answers.
        draws, temperature, top_k, seed: of the sampled part.
        on_progress: called with (part, newly done, total).
    """
    exact = in_fp32(model, tree, head)
    reference = exact.target.model
    reports = []
    for one in [model] if exact is model else [model, exact]:
        name = f"greedy, {str(one.target.dtype).removeprefix('torch.')}"
        reports.append(
            check_greedy(
                one,
                reference,
                prompts,
                max_new_tokens=max_new_tokens,
                on_prompt=lambda index, name=name: on_progress(name, 1, len(prompts)),  # type: ignore[misc]
            )
        )
    sampled = check_sampled(
        exact.with_draft(exact.draft_name, tree=_shallow(exact), head=head),
        reference,
        prompts[0],
        draws=draws,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
        on_draws=lambda count: on_progress("draws", count, draws),
    )
    return Report(model.target.name, Path(model.draft_name).name, reports, sampled)


def in_fp32(model: Model, tree: TreeShape | None = None, head: str | int = "auto") -> Model:
    """The model itself if it is fp32, else the same target upcast, with the same draft."""
    import coral_spec

    target = model.target
    if target.dtype == torch.float32:
        return model
    upcast = replace(target, model=cast("PreTrainedModel", reference_model(target.model)), dtype=torch.float32)
    return coral_spec.load(upcast, draft=model.draft_name, tree=tree, head=head)


def _shallow(model: Model) -> TreeShape | None:
    """The model's tree cut at the levels that three tokens reach: deeper ones would only be paid for."""
    if model.tree is None:
        return None
    depth = min(model.tree.depth, TOKENS - 1)
    whole = replace(model.tree, depth=depth, budget=1)
    return replace(whole, budget=min(model.tree.budget, whole.pool))


def table(report: Report) -> Table:
    """One row per test, and the verdict under them."""
    verdict = "[bold green]PASS[/]" if report.passed else "[bold red]FAIL[/]"
    out = Table(
        title=f"{report.model} with draft {report.draft}",
        caption=f"{verdict}: decoding with this draft is {'' if report.passed else 'NOT '}lossless here",
    )
    for column in ("test", "what was found", "outcome"):
        out.add_column(column, overflow="fold")
    for greedy in report.greedy:
        words = {"exact": "[green]exact[/]", "ties": "[green]ties only[/]", "bug": "[bold red]bug[/]"}
        found = "\n".join(_found(greedy))
        out.add_row(f"greedy, {greedy.dtype},\nagainst plain", found, words[greedy.identical])
    for level in report.sampled.levels:
        outcome = "[green]pass[/]" if level.passed else "[bold red]fail[/]"
        found = f"{report.sampled.draws} draws against exact chances: {level.cells} cells, p = {level.p_value:.3g}"
        if level.degrees == 0:
            found += "\nthe target leaves no choice here: nothing tested (raise the temperature)"
        if level.impossible:
            found += f"\n{level.impossible} draws that the target never makes"
        out.add_row(f"sampled, token {level.token}", found, outcome)
    return out


def _found(greedy: GreedyReport) -> list[str]:
    lines = [f"{greedy.tokens} tokens in {greedy.rounds} rounds, {len(greedy.judgements)} prompts"]
    lines.append(f"noise {greedy.noise:.3g}; from fp32 {greedy.distance:.2g}, plain {greedy.baseline_distance:.2g}")
    for number, judgement in enumerate(greedy.judgements, 1):
        if judgement.position is not None:
            lines.append(f"prompt {number}, token {judgement.position}: gap {judgement.gap:.3g}, {judgement.verdict}")
        elif judgement.verdict == "bug":
            lines.append(f"prompt {number}: same tokens, but logits too far from fp32 ({judgement.distance:.2g})")
    return lines
