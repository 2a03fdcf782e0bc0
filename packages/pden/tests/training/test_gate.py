"""The gate's figures and verdicts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pden.data import Domain
from pden.generators import Photometric
from pden.models import TaskModel, build_model
from pden.training.config import GateConfig
from pden.training.gate import DomainReport, Measures, distance, judge_domain, judge_limit, measure
from pden.training.stream import Stream
from tiny_domains import tiny_domain

CPU = torch.device("cpu")


def models() -> tuple[TaskModel, TaskModel]:
    torch.manual_seed(0)
    return tuple(build_model("digits", classes=3, size=16, width=0.1).eval() for _ in range(2))


def batch(domain: Domain) -> tuple[torch.Tensor, torch.Tensor]:
    return domain.batch(torch.arange(len(domain)))


def measures(
    features: list[list[float]], agreement: float = 1.0, judge: float = 1.0, diversity: float = 0.2
) -> Measures:
    return Measures(torch.tensor(features), agreement, judge, diversity, 0.1)


def verdict(found: Measures, earlier=(), attempt: int = 0, **settings) -> DomainReport:
    source = measures([[1.0, 0.0]])
    return judge_domain(found, source, earlier, GateConfig(**settings), round=4, attempt=attempt, kind="x")


def test_agreement_is_counted_image_by_image():
    task, judge = models()
    images, labels = batch(tiny_domain(300))
    found = measure(task, judge, None, images, labels, Stream(CPU, 0))
    assert found.agreement == pytest.approx(float((task(images).argmax(1) == labels).float().mean()))
    assert found.judge_agreement == pytest.approx(float((judge(images).argmax(1) == labels).float().mean()))
    assert found.diversity == 0


def test_the_worst_class_is_counted_where_it_has_images_enough_and_chance_is_the_best_single_answer():
    task, judge = models()
    images, labels = batch(tiny_domain(300))
    keep = (labels != 2) | (torch.arange(300) < 30)  # 100 of two classes, 10 of the third
    images, labels = images[keep], labels[keep]
    found = measure(task, judge, None, images, labels, Stream(CPU, 0))
    right = task(images).argmax(1) == labels
    assert found.worst_class == pytest.approx(min(float(right[labels == each].float().mean()) for each in (0, 1)))
    assert found.chance == pytest.approx(100 / 210)
    assert measure(task, judge, None, images[:9], labels[:9], Stream(CPU, 0)).worst_class is None


def test_diversity_is_that_of_two_draws_and_repeats_with_the_stream():
    task, judge = models()
    images, labels = batch(tiny_domain(9))
    generator = Photometric()
    first, second = (measure(task, judge, generator, images, labels, Stream(CPU, 7)) for _ in range(2))
    assert first.diversity == second.diversity > 0 and torch.equal(first.features, second.features)


def test_the_distance_is_one_minus_cosine():
    source = measures([[1.0, 0.0], [0.0, 1.0]])
    assert distance(source, source) == pytest.approx(0, abs=1e-6)
    assert distance(source, measures([[0.0, 1.0], [0.0, 1.0]])) == pytest.approx(0.5)
    assert distance(source, measures([[-1.0, 0.0], [0.0, -1.0]])) == pytest.approx(2)


def test_novelty_is_the_distance_from_the_nearest_earlier_domain():
    report = verdict(measures([[0.0, 1.0]]), [measures([[1.0, 0.0]]), measures([[0.6, 0.8]])])
    assert report.distance == pytest.approx(1) and report.novelty == pytest.approx(0.2)
    assert verdict(measures([[0.0, 1.0]])).novelty is None


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (measures([[0.0, 1.0]], agreement=0.5), "label agreement 0.500 < 0.7"),
        (measures([[0.0, 1.0]], judge=0.1), "label agreement of the judge 0.100 < 0.12"),
        (replace(measures([[0.0, 1.0]]), worst_class=0.05), "label agreement of the worst class 0.050 < 0.1"),
        (measures([[1.0, 0.0]]), "distance from the source 0.000 < 0.02"),
    ],
)
def test_a_domain_falls_short_for_a_reason(found, reason):
    report = verdict(found)
    assert report.verdict == "retrain" and report.reasons == (reason,)
    assert verdict(found, attempt=1).verdict == "dropped"
    assert verdict(found, mode="record").verdict == "recorded"


def test_a_good_domain_is_accepted_and_a_known_one_may_be_refused():
    found = measures([[0.0, 1.0]])
    assert verdict(found).verdict == "accepted" and not verdict(found).warning
    assert verdict(found, [found], novelty=0.1).reasons == ("novelty 0.000 < 0.1",)


def test_collapse_names_the_round():
    assert verdict(measures([[0.0, 1.0]], diversity=0.001)).warning.startswith("round 4: the generator has collapsed")


def test_a_report_survives_json():
    report = verdict(measures([[1.0, 0.0]], agreement=0.1))
    assert DomainReport.from_plain(report.plain()) == report


def test_the_judge_can_meet_its_limit_however_frequent_one_class_is():
    gate = GateConfig()
    assert judge_limit(gate, 0.1) == pytest.approx(0.12) and judge_limit(gate, 0.9) == pytest.approx(0.95)
    for chance in (0.1, 0.5, 0.8, 0.9, 0.99):
        assert chance < judge_limit(gate, chance) < 1


@pytest.mark.parametrize("key", ["agreement", "worst_class", "judge_over_chance", "distance", "novelty", "collapse"])
def test_a_limit_that_is_no_number_is_refused(key):
    for value in (float("nan"), float("inf"), -0.1):
        with pytest.raises(ValueError, match=f"gate.{key} is"):
            GateConfig(**{key: value})
