"""On a GPU: fused attention with our masks gives the CPU's answers and gradients."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from coral_spec.training.data import Answers
from coral_spec.training.generation import Sampling, answer_batch
from coral_spec.training.replay import Replayed
from coral_spec.training.trainer import Trainer
from expkit.distributed import World
from making_answers import small_config, write_answers
from tiny import tiny_target

ALONE = World(rank=0, size=1, local_rank=0)
PROMPTS = [[5, 6, 7], [9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19], [20], list(range(30, 130))]


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_answers_equal_those_of_the_cpu(architecture: str) -> None:
    sampling = Sampling(temperature=0, max_new_tokens=40)
    here = answer_batch(tiny_target(architecture), PROMPTS, sampling, seed=0)
    there = answer_batch(tiny_target(architecture, device="cuda"), PROMPTS, sampling, seed=0)
    assert here == there
    half = tiny_target(architecture, width=64, device="cuda", dtype=torch.bfloat16)
    drawn = answer_batch(half, PROMPTS * 8, Sampling(temperature=1.0, max_new_tokens=40), seed=0)
    assert drawn == answer_batch(half, PROMPTS * 8, Sampling(temperature=1.0, max_new_tokens=40), seed=0)


@pytest.mark.gpu
def test_a_step_in_bf16_has_the_gradients_of_fp32(tmp_path: Path) -> None:
    write_answers(tmp_path, tiny_target())
    answers = Answers.read(tmp_path)
    gradients = []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.float32), ("cuda", torch.bfloat16)):
        target = tiny_target(device=device, dtype=dtype)
        trainer = Trainer(replace(small_config(tmp_path), noise=0.0, align_steps=3), target, answers, ALONE)
        trainer.step()
        assert all(value > 0 for name, value in trainer.take_metrics().items() if name.startswith("soft"))
        gradients.append([parameter.grad.float().cpu() for parameter in trainer.drafter.parameters()])  # type: ignore[union-attr]
        assert trainer.evaluate().tau >= 1
    for cpu, single, half in zip(*gradients, strict=True):
        assert torch.allclose(cpu, single, atol=1e-4, rtol=1e-2)
        assert torch.nn.functional.cosine_similarity(cpu.flatten(), half.flatten(), dim=0) > 0.98


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_compiled_training_follows_the_plain_one(architecture: str, tmp_path: Path) -> None:
    target = tiny_target(architecture, device="cuda", dtype=torch.float32)
    write_answers(tmp_path, target)
    answers, weights = Answers.read(tmp_path), []
    for how in ("none", "all"):  # the last one is captured too
        trainer = Trainer(replace(small_config(tmp_path), align_steps=3, compile=how), target, answers, ALONE)
        for _ in range(3):
            trainer.step()
        for _ in range(2 if how == "all" else 0):  # at least once for every shape
            trainer.evaluate()
        weights.append(torch.cat([each.detach().flatten() for each in trainer.drafter.parameters()]))
    assert torch.allclose(*weights, atol=1e-3)
    assert isinstance(trainer._features, Replayed) and trainer._features._graphs


@pytest.mark.gpu
def test_replayed_features_are_those_of_the_forward(recwarn: pytest.WarningsRecorder) -> None:
    decoder = tiny_target(device="cuda").model.model

    def forward(tokens: torch.Tensor) -> torch.Tensor:
        return decoder(input_ids=tokens, use_cache=False).last_hidden_state

    weight = next(decoder.parameters())
    replayed = Replayed(forward, 96, weight.new_empty(0), 32)
    generator = torch.Generator().manual_seed(0)
    for shape in [(2, 16), (3, 32), (2, 16), (3, 32), (2, 16), (4, 32), (4, 32), (2, 16)]:  # 128 tokens are too many
        tokens = torch.randint(3, 250, shape, generator=generator).cuda()
        with torch.no_grad():
            torch.testing.assert_close(replayed(tokens), forward(tokens))
    assert set(replayed._graphs) == {torch.Size((2, 16)), torch.Size((3, 32))}
    assert not recwarn.list


@pytest.mark.gpu
def test_what_cannot_be_captured_is_launched_and_said() -> None:
    def forward(tokens: torch.Tensor) -> torch.Tensor:
        return tokens[..., None] * float(tokens.max())  # waits for the device

    replayed = Replayed(forward, 96, torch.empty(0, device="cuda"), 1)
    tokens = torch.ones(2, 16, dtype=torch.long, device="cuda")
    replayed(tokens)
    with pytest.warns(UserWarning, match="not captured"):
        assert torch.equal(replayed(tokens), torch.ones(2, 16, 1, device="cuda"))
    assert torch.equal(replayed(2 * tokens), torch.full((2, 16, 1), 4.0, device="cuda"))
