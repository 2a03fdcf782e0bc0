"""Sampled decoding against exact probabilities: thousands of draws from one cached prefix, and a chi-square test.

The first token comes from the prefill; tokens 2 and 3 come from the tree. How often each pair (token 1, token 2) and
each triple was drawn is held against the target's exact chain probabilities, one forward per prefix. The warping
(temperature, top-k) is transformers' own here, so that an error in ours shows. Everything runs in fp32: with
thousands of draws the rounding of bf16 alone would be found significant.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from coral_spec.check.noise import FP32_GAP
from coral_spec.sampling import Sampling

if TYPE_CHECKING:
    from coral_spec.model import Model

Cell = tuple[int, ...]

TOKENS = 3
P_VALUE = 1e-3
LEAST_EXPECTED = 5.0
_ROWS = 50


@dataclass(frozen=True)
class LevelTest:
    """The chi-square test of one level of the tree.

    Attributes:
        token: which token of the answer this level draws, counted from 1.
        cells: beginnings of the answer with an expected count of at least 5.
        pooled: whether the rest forms one more cell.
        impossible: draws whose exact probability is zero; a single one fails.
        statistic: chi-square.
        degrees: of freedom; 0 when the target leaves no choice, and then nothing is tested.
        p_value: chance of a statistic this large from a lossless decoder.
    """

    token: int
    cells: int
    pooled: bool
    impossible: int
    statistic: float
    degrees: int
    p_value: float

    @property
    def passed(self) -> bool:
        """Not significant at 0.001, and nothing impossible drawn."""
        return self.impossible == 0 and self.p_value >= P_VALUE


@dataclass(frozen=True)
class SampledReport:
    """Outcome of `check_sampled`: one test for token 2 and one for token 3."""

    draws: int
    temperature: float
    top_k: int
    seed: int
    levels: list[LevelTest]

    @property
    def passed(self) -> bool:
        """Every level passed."""
        return all(level.passed for level in self.levels)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        levels = [{**vars(level), "passed": level.passed} for level in self.levels]
        return {**vars(self), "levels": levels, "passed": self.passed}


def check_sampled(
    model: Model,
    reference: nn.Module,
    prompt: Sequence[int],
    *,
    draws: int = 2000,
    temperature: float = 1.0,
    top_k: int = 8,
    seed: int = 0,
    on_draws: Callable[[int], None] = lambda count: None,
) -> SampledReport:
    """Draw three tokens `draws` times from one cached prefix and test tokens 2 and 3.

    Args:
        model: in fp32, with the draft to be checked.
        reference: the same weights in fp32.
        prompt: token ids of the prefix.
        draws: how many, each with a seed of its own.
        temperature: above 0.
        top_k: few tokens make full cells; 0 keeps all.
        seed: the whole test is a pure function of it.
        on_draws: called with the number of new draws after every batch.
    """
    sampling = Sampling(temperature, top_k)
    prefix = model.prefix(list(prompt), capacity=2 * TOKENS)
    counts: Counter[Cell] = Counter()
    for start in range(0, draws, _ROWS):
        seeds = [seed * 1_000_003 + index for index in range(start, min(start + _ROWS, draws))]
        rows = prefix.generate(seeds, max_new_tokens=TOKENS, sampling=sampling)
        counts.update(tuple(row[:TOKENS]) for row in rows)
        on_draws(len(seeds))
    exact = chain_probabilities(reference, prompt, temperature=temperature, top_k=top_k, least=LEAST_EXPECTED / draws)
    levels = [examine_level(counts, level, token + 1) for token, level in enumerate(exact) if token > 0]
    return SampledReport(draws, temperature, top_k, seed, levels)


@dataclass(frozen=True)
class Level:
    """Exact probabilities of beginnings of an answer.

    Attributes:
        cells: beginning -> probability, for all that matter.
        support: which next tokens may be drawn, by the beginning before them: those above zero, and those that
            miss the top-k by less than fp32 rounding.
    """

    cells: dict[Cell, float]
    support: dict[Cell, frozenset[int]]


@torch.inference_mode()
def chain_probabilities(
    reference: nn.Module,
    prompt: Sequence[int],
    *,
    temperature: float,
    top_k: int,
    least: float = 0.0,
) -> list[Level]:
    """Probability of every beginning of one, two and three tokens, by one forward for each prefix.

    Args:
        reference: the model in fp32.
        prompt: token ids.
        temperature: above 0.
        top_k: 0 keeps all.
        least: beginnings less probable than this are left out, and so are those that follow from them.
    """
    levels: list[Level] = []
    open_cells: dict[Cell, float] = {(): 1.0}
    for _ in range(TOKENS):
        cells: dict[Cell, float] = {}
        support: dict[Cell, frozenset[int]] = {}
        for start in range(0, len(open_cells), _ROWS):
            begun = list(open_cells)[start : start + _ROWS]
            rows, possible = _next_probabilities(reference, prompt, begun, temperature, top_k)
            for cell, row, tokens in zip(begun, rows, possible, strict=True):
                support[cell] = frozenset(tokens.nonzero()[:, 0].tolist())
                mass = row * open_cells[cell]
                for token in (mass >= max(least, 1e-12)).nonzero()[:, 0].tolist():
                    cells[(*cell, token)] = float(mass[token])
        levels.append(Level(cells, support))
        open_cells = cells
    return levels


def _next_probabilities(
    reference: nn.Module, prompt: Sequence[int], begun: Sequence[Cell], temperature: float, top_k: int
) -> tuple[Tensor, Tensor]:
    """Probabilities, warped by transformers' own processors, and what may be drawn: fp64 and bool, by row."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper

    device = next(reference.parameters()).device
    text = torch.tensor([[*prompt, *cell] for cell in begun], device=device)
    logits = reference(input_ids=text, use_cache=False, logits_to_keep=1).logits[:, -1].float()
    scaled = TemperatureLogitsWarper(float(temperature))(text, logits)
    warped = TopKLogitsWarper(top_k)(text, scaled) if top_k else scaled
    least = warped.masked_fill(warped.isinf(), float("inf")).amin(dim=-1, keepdim=True)
    probabilities: Tensor = warped.double().softmax(dim=-1).cpu()
    return probabilities, (scaled >= least - FP32_GAP / temperature).cpu()


def examine_level(counts: Mapping[Cell, int], level: Level, token: int) -> LevelTest:
    """Chi-square of the drawn beginnings of `token` tokens; cells with an expected count under 5 are pooled."""
    draws = sum(counts.values())
    observed: Counter[Cell] = Counter()
    impossible = 0
    for cell, count in counts.items():
        begin = cell[:token]
        before = begin[:-1]
        if begin not in level.cells and before in level.support and begin[-1] not in level.support[before]:
            impossible += count
        observed[begin] += count
    large = {cell: p * draws for cell, p in level.cells.items() if p * draws >= LEAST_EXPECTED}
    pairs = [(float(observed[cell]), expected) for cell, expected in large.items()]
    rest = (draws - sum(count for count, _ in pairs), draws - sum(expected for _, expected in pairs))
    pooled = rest[1] >= LEAST_EXPECTED
    if pooled or not pairs:
        pairs.append(rest)
    elif rest[0] or rest[1] > 0:
        # too small for a cell of its own: it joins the smallest one
        pairs.sort(key=lambda pair: pair[1])
        pairs[0] = (pairs[0][0] + rest[0], pairs[0][1] + max(rest[1], 0.0))
    statistic = sum((count - expected) ** 2 / expected for count, expected in pairs)
    degrees = len(pairs) - 1
    return LevelTest(token, len(large), pooled, impossible, statistic, degrees, chi_square_tail(statistic, degrees))


def chi_square_tail(statistic: float, degrees: int) -> float:
    """Chance that a chi-square variable of so many degrees of freedom exceeds `statistic`; 1 for 0 degrees."""
    if degrees < 1:
        return 1.0
    half = torch.tensor([degrees / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))
