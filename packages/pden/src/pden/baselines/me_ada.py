"""ME-ADA (Zhao et al., 2020): ADA whose copies also raise the entropy of the predictions."""

from __future__ import annotations

from pden.baselines.ada import Ada


class MeAda(Ada):
    """ADA with an entropy term."""

    def __init__(
        self,
        growth: tuple[int, ...] = (100, 200, 300),
        steps: int = 15,
        lr: float = 1.0,
        gamma: float = 1.0,
        eta: float = 10.0,
    ) -> None:
        super().__init__(growth, steps, lr, gamma, eta)
