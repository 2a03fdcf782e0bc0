"""The whole engine on its kernels gives the text that it gives without them."""

from __future__ import annotations

import pytest
import torch

from coral_spec import kernels
from coral_spec.layers import Projection
from coral_spec.model import load
from coral_spec.tree import TreeShape
from drafting import PROMPT, clear_target, save_drafter

pytest.importorskip("triton")


@pytest.fixture
def on_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels serve tensors of the CPU too, by Triton's interpreter."""
    made = Projection.__init__

    def with_weight(self: Projection, *args: object) -> None:
        made(self, *args)  # type: ignore[arg-type]
        self.weight, self._packed = torch.cat([part.weight for part in self._parts]), None

    monkeypatch.setattr(Projection, "__init__", with_weight)
    monkeypatch.setattr(
        kernels, "serve", lambda states: states.dim() == 3 and states.shape[0] == 1 and states.shape[1] <= 64
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU all tests run on kernels")
@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "temperature"), [("llama", 0.0), ("gemma3", 0.8)])
def test_text_is_the_same(architecture, temperature, tmp_path, request):
    target = clear_target(architecture)
    limits = {"max_new_tokens": 7, "temperature": temperature, "seed": 5, "ignore_eos": True}
    expected = load(target, draft="none").generate(PROMPT, **limits).token_ids
    request.getfixturevalue("on_kernels")
    for draft in ("none", "ngram", str(save_drafter(target, tmp_path / "drafter"))):
        model = load(target, draft=draft, tree=TreeShape(2, 2, 4), head="full" if "drafter" in draft else "auto")
        assert model.generate(PROMPT, **limits).token_ids == expected, draft
