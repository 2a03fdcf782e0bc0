"""The progressive loop: order, the pool, the gate's consequences, stopping."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from expkit.errors import UsageError
from pden.evaluation.accuracy import evaluate
from pden.generators import Generator
from pden.training.config import TrainConfig
from pden.training.objectives import task_loss
from pden.training.trainer import Trainer
from pden.training.views import draw_views, make_views
from tiny_domains import finish, tiny_config, tiny_dense, tiny_domain, tiny_trainer, weights


class Blank(Generator):
    """Unsafe: every image becomes the same grey one."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__(channels, 1)
        self.level = torch.nn.Parameter(torch.zeros(1))

    def transform(self, images, noise):
        return (torch.zeros_like(images) + self.level + 0.5).clamp(0, 1)


def plant(trainer: Trainer, attempts: int) -> None:
    """Make the generators of round 1 unsafe, for so many attempts."""
    real = trainer.new_expansion

    def unsafe() -> None:
        real()
        if trainer.clock.round == 1 and trainer.clock.attempt < attempts:
            trainer.expansion.generator = Blank()
            trainer.expander = type(trainer.expander)(trainer.expansion, trainer.expander.settings, trainer.world)

    trainer.new_expansion = unsafe


def guarded(**changes) -> Trainer:
    """A trainer whose gate asks for labels that are kept; its task model has learned the bars."""
    return tiny_trainer(pretrain_steps=60, gate__agreement=0.6, **changes)


def test_a_run_pretrains_judges_and_ends_every_round():
    trainer = tiny_trainer()
    assert finish(trainer) == ["pretrained", "judged", "round", "round"]
    assert len(trainer.pool) == 2 and [report.verdict for report in trainer.reports] == ["accepted", "accepted"]
    assert trainer.clock.total == trainer.planned_steps == 6 + 4 + 2 * 6


def test_the_generator_learns_in_the_first_part_of_a_round_alone():
    trainer = tiny_trainer(gate__mode="off")
    finish(trainer, 6)

    def now() -> torch.Tensor:
        return torch.cat([each.detach().flatten() for each in trainer.expansion.generator.parameters()])

    before = now()
    finish(trainer, 3)
    learned = now()
    assert not torch.equal(before, learned)
    generator = trainer.expansion.generator
    finish(trainer, 3)
    assert trainer.pool[-1] is generator
    assert torch.equal(torch.cat([each.flatten() for each in generator.parameters()]), learned)
    finish(trainer)
    assert torch.equal(torch.cat([each.flatten() for each in generator.parameters()]), learned)


def test_the_generators_step_comes_first_and_leaves_the_task_model_alone():
    trainer = tiny_trainer(gate__mode="off")
    finish(trainer, 6)
    seen = []
    update_generator, update_task = trainer.expander.apply, trainer.learner.apply
    state = {key: value.clone() for key, value in trainer.task.state_dict().items()}

    def generator_first(gradients, progress=0.0):
        update_generator(gradients, progress)
        assert all(torch.equal(value, state[key]) for key, value in trainer.task.state_dict().items())
        seen.append("generator")

    def task_second(gradients, progress=0.0):
        seen.append("task")
        update_task(gradients, progress)

    trainer.expander.apply, trainer.learner.apply = generator_first, task_second
    finish(trainer, 1)
    assert seen == ["generator", "task"]


def test_the_task_model_sees_the_updated_generator_without_its_graph():
    trainer = tiny_trainer(gate__mode="off", loss__mix=False)
    finish(trainer, 6)
    generator, used, made = trainer.expansion.generator, [], []

    def note(module, inputs, output):
        used.append(generator.first.weight.detach().clone())
        made.append(output)

    generator.last.register_forward_hook(note)
    finish(trainer, 1)
    assert len(used) == 3 and torch.equal(used[0], used[1])  # two draws of the generator's own step, one view
    assert made[0].requires_grad and not made[2].requires_grad
    assert torch.equal(used[2], generator.first.weight) and not torch.equal(used[2], used[0])


def test_views_are_source_earlier_mixture_and_current():
    torch.manual_seed(0)
    images = torch.rand(4, 3, 16, 16)

    class Constant(Generator):
        def __init__(self, value):
            super().__init__(3, 1)
            self.value = value

        def transform(self, images, noise):
            return torch.full_like(images, self.value)

    rng = torch.Generator().manual_seed(0)

    def views(current, earlier, mix=True):
        draws = draw_views(images, current, earlier, rng, mix=mix)
        return *make_views(images, draws, current, earlier), draws[1] if earlier is not None and mix else None

    source, earlier, mixed, current, shares = views(Constant(0.25), Constant(0.75))
    assert torch.equal(source, images) and earlier.unique() == 0.75 and current.unique() == 0.25
    assert torch.allclose(mixed, shares * images + (1 - shares) * 0.75)
    assert shares.shape == (4, 1, 1, 1) and shares.min() >= 0 and shares.max() <= 1 and shares.std() > 0.1
    assert len(views(Constant(0.25), None)) == 2 + 1
    assert len(views(Constant(0.25), Constant(0.75), mix=False)) == 3 + 1


def test_graphs_want_a_gpu():
    with pytest.raises(UsageError, match='engine "graphs" needs a CUDA device'):
        tiny_trainer(engine="graphs")
    assert not tiny_trainer(engine="auto").steps.graphs


def test_the_task_loss_is_the_sum_over_views():
    trainer = tiny_trainer(gate__mode="off", loss__contrast="none")
    images, labels = trainer.source.batch(torch.arange(5))
    output = trainer.task.full(torch.cat([images, images]))
    two = type(output)(*(torch.unflatten(each, 0, (2, 5)) for each in output))
    total, _ = task_loss(two, labels, trainer.config.loss)
    assert torch.allclose(total, 2 * torch.nn.functional.cross_entropy(trainer.task(images), labels), atol=1e-5)


def test_earlier_domains_are_drawn_uniformly():
    trainer = tiny_trainer(rounds=4, gate__mode="off")
    finish(trainer, 6 + 3 * 6)
    calls = [0, 0, 0]
    for number, generator in enumerate(trainer.pool):
        generator.register_forward_hook(lambda *_, number=number: calls.__setitem__(number, calls[number] + 1))
    trainer.config = replace(trainer.config, round_steps=200)
    finish(trainer, 150)
    assert sum(calls) == 150 and min(calls) > 25


def test_an_unsafe_generator_is_dropped_and_leaves_no_trace():
    trainer = guarded(rounds=1)
    plant(trainer, attempts=2)
    events = finish(trainer, 64)
    before = weights(trainer)
    events += finish(trainer)
    assert events == ["pretrained", "judged", "refused", "refused"]
    first, second = trainer.reports
    assert (first.verdict, second.verdict) == ("retrain", "dropped")
    assert first.agreement < 0.6 and "label agreement" in first.reasons[0]
    assert trainer.pool == [] and torch.equal(weights(trainer), before)
    assert trainer.clock.total == trainer.planned_steps


def test_a_refused_domain_is_learned_anew_once():
    trainer = guarded()
    plant(trainer, attempts=1)
    assert finish(trainer) == ["pretrained", "judged", "refused", "round", "round"]
    assert [report.verdict for report in trainer.reports][:2] == ["retrain", "accepted"]
    assert len(trainer.pool) == 2 and trainer.clock.total == trainer.planned_steps


def test_a_gate_that_records_refuses_nothing():
    trainer = guarded(gate__mode="record", rounds=1)
    plant(trainer, attempts=1)
    finish(trainer)
    assert trainer.reports[0].verdict == "recorded" and trainer.reports[0].agreement < 0.6
    assert len(trainer.pool) == 1


def test_a_collapsed_generator_is_warned_of_with_its_round():
    trainer = tiny_trainer(rounds=1)
    plant(trainer, attempts=1)
    finish(trainer)
    assert trainer.reports[0].diversity == 0
    assert "round 1: the generator has collapsed" in trainer.reports[0].warning


def test_collapse_is_warned_of_without_a_gate_too():
    trainer = tiny_trainer(gate__mode="off")
    plant(trainer, attempts=1)
    finish(trainer)
    (warning,) = trainer.take_warnings()
    assert "round 1: the generator has collapsed" in warning and trainer.take_warnings() == []


def test_a_blank_domain_is_refused_by_the_judge_whatever_answer_it_has_for_it():
    source = tiny_domain(90).take((torch.arange(90) % 3 != 2) | (torch.arange(90) < 30))  # 30, 30 and 10 of a class
    trainer = Trainer(tiny_config(gate__images=70, gate__judge_over_chance=1.2), source, source)
    plant(trainer, attempts=2)
    finish(trainer)
    refused = [each for each in trainer.reports if each.round == 1]
    assert [each.verdict for each in refused] == ["retrain", "dropped"]
    assert all("label agreement of the judge" in " ".join(each.reasons) for each in refused)


def test_the_source_chooses_segmentations_by_the_figure_that_is_reported():
    config = tiny_config(model__name="fcn-small", batch=4, pretrain_batch=4, gate__images=4)
    trainer = Trainer(config, tiny_dense(), tiny_dense(4, seed=1))
    finish(trainer, 6)
    assert trainer.best.value == pytest.approx(evaluate(trainer.task, trainer.validation).miou)


def test_no_rounds_is_training_on_the_source():
    expanding, plain = tiny_trainer(rounds=0), tiny_trainer(rounds=0, method="erm")
    assert finish(expanding) == finish(plain) == ["pretrained"]
    assert torch.equal(weights(expanding), weights(plain))


def test_a_run_stops_when_rounds_bring_nothing_new():
    trainer = tiny_trainer(rounds=6, stop__patience=2, stop__novelty=9.0)
    finish(trainer)
    assert len(trainer.pool) == 3 and trainer.stopped  # the first domain is new by definition
    whole = tiny_trainer(stop__patience=2, stop__novelty=0.0)
    finish(whole)
    assert not whole.stopped


def test_a_seed_names_a_run_and_another_seed_another_run():
    first, second, other = (tiny_trainer(seed=seed) for seed in (5, 5, 6))
    for trainer in (first, second, other):
        finish(trainer)
    assert torch.equal(weights(first), weights(second))
    assert not torch.equal(weights(first), weights(other))


def test_expansion_teaches_what_pretraining_does_not_know():
    trainer = guarded(rounds=3, round_steps=40, generator__lr=1e-2)
    finish(trainer)
    assert trainer.reports[-1].distance > 0.02 and trainer.best.value > 0.9


@pytest.mark.parametrize("contrast", ["none", "instance", "supervised", "barlow"])
def test_every_contrast_trains_to_finite_weights(contrast):
    trainer = tiny_trainer(loss__contrast=contrast, loss__contrast_weight=0.1)
    finish(trainer)
    assert torch.isfinite(weights(trainer)).all()
    assert ("contrast" in trainer.take_metrics()) == (contrast != "none")


@pytest.mark.parametrize("left_out", ["safety", "diversity", "cycle", "adversarial"])
def test_any_of_the_generators_losses_can_be_left_out(left_out):
    trainer = tiny_trainer(**{f"loss__{left_out}": 0.0}, gate__mode="off")
    finish(trainer)
    found = trainer.take_metrics()
    assert torch.isfinite(weights(trainer)).all()
    assert left_out == "diversity" or left_out not in found  # diversity is measured all the same


@pytest.mark.parametrize("kinds", [("geometric",), ("composite",), ("photometric", "geometric")])
def test_rounds_take_the_kinds_in_turn(kinds):
    trainer = tiny_trainer(generator__kinds=kinds)
    finish(trainer)
    assert [report.kind for report in trainer.reports] == [kinds[0], kinds[-1]]


def test_bf16_trains_close_to_fp32():
    config = tiny_config(gate__mode="off")
    full, half = (
        Trainer(config, tiny_domain(), tiny_domain(24, seed=1), dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16)
    )
    finish(full)
    finish(half)
    assert all(value.dtype == torch.float32 for value in half.task.state_dict().values())
    first, second = weights(full), weights(half)
    assert torch.isfinite(second).all() and not torch.equal(first, second)
    assert torch.nn.functional.cosine_similarity(first, second, dim=0) > 0.95


def test_segmentation_runs_through_the_same_loop():
    config = tiny_config(model__name="fcn-small", batch=4, pretrain_batch=4, gate__images=4)
    trainer = Trainer(config, tiny_dense(), tiny_dense(4, seed=1))
    assert finish(trainer)[-1] == "round"
    assert len(trainer.pool) == 2 and 0 < trainer.best.value <= 1


@pytest.mark.parametrize(
    ("source", "changes", "said"),
    [
        (tiny_domain(classes=3).take(torch.arange(0, 60, 3)), {}, "all images have one class"),
        (tiny_domain(), {"model__name": "fcn-small"}, "one label for each image"),
        (tiny_dense(), {}, "one label for each pixel"),
        (tiny_dense(), {"model__name": "fcn-small", "method": "augmix"}, "segmentation has pden and erm"),
        (tiny_dense(), {"model__name": "fcn-small", "generator__kinds": ("geometric",)}, "would move the labels"),
        (tiny_dense(), {"model__name": "fcn-small", "data__randaugment": 1.0}, "would move the labels"),
        (tiny_domain(channels=1), {}, "does not fit the source"),
    ],
)
def test_what_does_not_fit_is_refused(source, changes, said):
    held = tiny_dense(4) if source.dense else tiny_domain(24)
    with pytest.raises(UsageError) as error:
        Trainer(tiny_config(**changes), source, held)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"rounds": -1}, "rounds is -1"), ({"batch": 1}, "at least 2"), ({"generator__share": 0.0}, "generator.share")],
)
def test_impossible_settings_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        tiny_config(**changes)


def test_the_defaults_are_a_full_run():
    assert TrainConfig().learning_steps == 1500
