"""Every head gives the tokens and log-probabilities that its definition says, and costs acceptance at most."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coral_spec import drafter, kernels
from coral_spec.backbone import Backbone
from coral_spec.drafter import Drafter, DrafterConfig, load_ranking
from coral_spec.grouping import EMPTY, make_grouping
from coral_spec.heads import FullHead, LowRankHead, RoutedHead, choose
from coral_spec.heads.choose import HeadChoice, spared_share
from coral_spec.heads.low_rank import LowRankFactors
from coral_spec.heads.routed import grouped_top
from coral_spec.model import load
from coral_spec.router import Router, Routing, choose_groups
from coral_spec.targets import Target
from coral_spec.tree import TreeShape
from drafting import PROMPT, SMALL, save_drafter
from expkit.checkpoint import load_tensors, read_metadata, save_tensors
from expkit.errors import UsageError
from tiny import tiny_target

WIDTH, VOCAB = 32, 259


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target()


def routing_for(target: Target, *, groups: int = 8, always: int = 1, active: int = 3, scores="renormalised") -> Routing:
    weight: Tensor = target.model.get_output_embeddings().weight  # type: ignore[no-untyped-call]
    grouping = make_grouping("kmeans", groups, always, torch.arange(len(weight)), weight=weight)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        router = Router(weight.shape[1], groups)
        with torch.no_grad():
            for parameter in router.parameters():
                parameter.mul_(30).add_(0.1 * torch.randn_like(parameter))
    return Routing(router.to(weight.device, weight.dtype).requires_grad_(False), grouping, active, scores)


@pytest.fixture
def folder(target: Target, tmp_path: Path) -> Path:
    """A random drafter with a router."""
    save_drafter(target, tmp_path)
    routing_for(target).save(tmp_path, target.tokenizer_hash)
    return tmp_path


@given(
    nodes=st.integers(1, 5),
    groups=st.integers(1, 6),
    rows=st.integers(1, 9),
    picked=st.integers(1, 6),
    padded=st.booleans(),
    hierarchical=st.booleans(),
    seed=st.integers(0, 50),
)
@settings(max_examples=60, deadline=None)
def test_grouped_top_is_what_its_formula_says(nodes, groups, rows, picked, padded, hierarchical, seed) -> None:
    picked = min(picked, groups)
    generator = torch.Generator().manual_seed(seed)
    features, slabs = torch.randn(nodes, 4, generator=generator), torch.randn(groups, rows, 4, generator=generator)
    active = torch.randperm(groups, generator=generator)[:picked]
    ids = torch.randperm(groups * rows, generator=generator).view(groups, rows)
    if padded and rows > 1:
        ids[:, -1] = EMPTY
    log_mass = torch.randn(nodes, picked, generator=generator).log_softmax(-1) if hierarchical else None
    count = int(torch.randint(1, int((ids[active] != EMPTY).sum()) + 1, (1,), generator=generator))
    found, tokens = grouped_top(features, slabs, active, count, ids=ids, log_mass=log_mass)
    for node in range(nodes):
        logits = {
            int(ids[group, row]): (place, float(slabs[group, row] @ features[node]))
            for place, group in enumerate(active.tolist())
            for row in range(rows)
            if ids[group, row] != EMPTY
        }
        whole = torch.tensor([logit for _, logit in logits.values()]).logsumexp(0)
        wanted = {}
        for token, (place, logit) in logits.items():
            if log_mass is None:
                wanted[token] = logit - float(whole)
            else:
                own = torch.tensor([other for at, other in logits.values() if at == place]).logsumexp(0)
                wanted[token] = float(log_mass[node, place]) + logit - float(own)
        best = sorted(wanted.values(), reverse=True)[:count]
        assert found[node].tolist() == pytest.approx(best, abs=1e-4)
        assert [wanted[token] for token in tokens[node].tolist()] == pytest.approx(best, abs=1e-4)


def test_a_level_reads_the_groups_with_most_of_its_probability() -> None:
    shares = torch.tensor([[0.1, 0.5, 0.3, 0.1], [0.1, 0.1, 0.2, 0.6]])
    paths = torch.tensor([0.9, 0.1]).log()
    assert choose_groups(shares.log(), paths, 0, 2).tolist() == [1, 2]
    assert choose_groups(shares.log(), paths.flip(0), 0, 2).tolist() == [2, 3]
    assert choose_groups(shares.log(), paths, 1, 1).tolist() == [0, 1]
    assert choose_groups(shares.log(), None, 0, 4).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_all_groups_renormalised_are_the_full_head(architecture: str) -> None:
    backbone = Backbone(tiny_target(architecture))
    features = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(1))
    wanted, tokens = FullHead(backbone).top(features, 7)
    found, same = RoutedHead(backbone, routing_for(backbone.target, active=7)).top(features, 7)
    assert torch.allclose(found, wanted, atol=1e-4) and torch.equal(tokens, same)


def test_hierarchical_scores_of_the_true_masses_are_the_full_heads(target: Target) -> None:
    backbone, routing = Backbone(target), routing_for(target)
    features = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(1))
    slabs = routing.grouping.slabs(backbone.output.weight)
    probabilities = backbone.head(features).softmax(-1)
    mass = torch.zeros(4, 8).index_add(1, routing.grouping.group_of, probabilities)
    active = torch.tensor([2, 5, 7])
    found, tokens = grouped_top(features, slabs, active, 9, ids=routing.grouping.slots, log_mass=mass.log()[:, active])
    assert torch.allclose(found.exp(), probabilities.gather(1, tokens), atol=1e-5)


def test_packed_and_plain_slabs_agree(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, routing = Backbone(target), routing_for(target, scores="hierarchical")
    features = torch.randn(1, 5, WIDTH, generator=torch.Generator().manual_seed(2))
    packed = RoutedHead(backbone, routing)
    monkeypatch.setattr("coral_spec.packing.pays", lambda _: False)
    plain = RoutedHead(backbone, routing)
    assert (packed._packed is None) != (packed._slabs is None) and plain._packed is None
    for mine, other in zip(packed.top(features, 6), plain.top(features, 6), strict=True):
        assert torch.allclose(mine.double(), other.double(), atol=1e-5)


@pytest.mark.parametrize("scores", ["renormalised", "hierarchical"])
@pytest.mark.parametrize("paths", [None, [-1.0, -0.1, -3.0, -2.0, -0.5]])
def test_the_routed_head_gives_the_same_on_its_kernels(
    scores: str, paths: list[float] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr("coral_spec.heads.routed._packable", lambda slabs: False)
    place = tiny_target(device="cuda" if torch.cuda.is_available() else "cpu")
    head = RoutedHead(Backbone(place), routing_for(place, scores=scores))
    features = torch.randn(1, 5, WIDTH, generator=torch.Generator().manual_seed(0)).to(place.device)
    level = None if paths is None else torch.tensor([paths], device=place.device)
    monkeypatch.setattr(kernels, "serve", lambda states: False)
    wanted, levels = head.top(features, 6, level), head._levels
    monkeypatch.setattr(kernels, "serve", lambda states: True)
    found = head.top(features, 6, level)
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(found[1], wanted[1])
    assert torch.equal(head._levels[-1], levels[-1] if paths is None else levels[0])


def test_low_rank_at_full_width_is_the_full_head(target: Target) -> None:
    backbone = Backbone(target)
    features = torch.randn(1, 3, WIDTH, generator=torch.Generator().manual_seed(1))
    wanted, tokens = FullHead(backbone).top(features, 7)
    head = LowRankHead(backbone, LowRankFactors.of_head(backbone.output.weight.detach(), WIDTH))
    found, same = head.top(features, 7)
    assert torch.allclose(found, wanted, atol=1e-3) and torch.equal(tokens, same)
    assert head.rows == VOCAB + WIDTH


def test_low_rank_factors_are_the_best_of_their_rank(target: Target) -> None:
    weight: Tensor = target.model.get_output_embeddings().weight.detach()  # type: ignore[no-untyped-call]
    factors = LowRankFactors.of_head(weight, 5)
    error = (factors.up.weight @ factors.down.weight - weight).square().sum()
    assert torch.allclose(error, torch.linalg.svdvals(weight)[5:].square().sum(), rtol=1e-3)
    with pytest.raises(UsageError, match="low rank is 33"):
        LowRankFactors.of_head(weight, WIDTH + 1)


@pytest.mark.parametrize("head", ["routed", "routed:1", "routed:2,hierarchical", "low-rank:6", "auto"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_head_changes_the_text(target: Target, folder: Path, head: str, temperature: float) -> None:
    limits = {"max_new_tokens": 40, "ignore_eos": True, "temperature": temperature, "seed": 3}
    plain = load(target, draft="none").generate(PROMPT, **limits)
    found = load(target, draft=str(folder), head=head, tree=SMALL).generate(PROMPT, **limits)
    assert found.token_ids == plain.token_ids


def test_small_groups_are_left_to_the_most_frequent_rows(
    target: Target, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kind() -> str:
        return load(target, draft=str(folder), tree=SMALL)._make_draft(SMALL).head.kind  # type: ignore[attr-defined, no-any-return]

    assert kind() == "frequency"
    with monkeypatch.context() as patch:
        patch.setattr(choose, "SMALLEST_GROUP", 33 * WIDTH)
        assert kind() == "routed"
        patch.setattr(choose, "SMALLEST_GROUP", 33 * WIDTH + 1)
        assert kind() == "frequency"
    (folder / "frequency.safetensors").unlink()
    assert kind() == "routed"  # all rows are the alternative


def test_a_ranking_of_another_vocabulary_is_refused(target: Target, folder: Path) -> None:
    save_tensors(folder / "frequency.safetensors", {"ranking": torch.tensor([0, VOCAB], dtype=torch.int32)}, None)
    with pytest.raises(UsageError, match="a vocabulary of 259 does not have"):
        load(target, draft=str(folder), head="frequency")
    save_tensors(folder / "frequency.safetensors", {"ranking": torch.tensor([3, 3], dtype=torch.int32)}, None)
    with pytest.raises(UsageError, match="more than once"):
        load(target, draft=str(folder), head="frequency")


@pytest.mark.parametrize("name", ["drafter.safetensors", "router.safetensors"])
def test_weights_of_a_training_that_diverged_are_refused(target: Target, folder: Path, name: str) -> None:
    weights, about = load_tensors(folder / name), read_metadata(folder / name)
    next(iter(weights.values())).view(-1)[3] = float("nan")
    save_tensors(folder / name, weights, about)
    with pytest.raises(UsageError, match=f"{name}: tensor .* not finite"):
        load(target, draft=str(folder), head="routed")


def test_tokens_that_a_ranking_leaves_out_come_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafter, "RANKED", 3)
    target, ranking = tiny_target("llama"), torch.randperm(VOCAB, generator=torch.Generator().manual_seed(0))
    Drafter(DrafterConfig.from_target(target)).save(tmp_path, model_card="", ranking=ranking.to(torch.int32))
    assert load_tensors(tmp_path / "frequency.safetensors")["ranking"].tolist() == ranking[:3].tolist()
    loaded = load_ranking(tmp_path, VOCAB)
    assert loaded is not None
    assert loaded.tolist() == [*ranking[:3].tolist(), *sorted(ranking[3:].tolist())]


def test_telemetry_says_rows_and_recall(target: Target, folder: Path) -> None:
    model = load(target, draft=str(folder), head="routed:7", tree=SMALL)
    router = -(-(WIDTH * WIDTH + WIDTH + 8 * WIDTH + 8) // WIDTH)  # its weights, as rows of the head
    assert model.head_rows == 8 * 33 + router
    statistics = model.generate(PROMPT, max_new_tokens=30, ignore_eos=True).statistics
    assert statistics.router_recall == 1.0  # all groups are read
    assert statistics.rows_per_round == SMALL.depth * (8 * 33 + router)
    few = model.with_draft(str(folder), head="routed:1", tree=SMALL)
    lower = few.generate(PROMPT, max_new_tokens=30, ignore_eos=True).statistics
    assert lower.router_recall is not None and lower.router_recall < 1.0
    assert lower.to_dict()["rows_per_round"] == SMALL.depth * (2 * 33 + router)
    full = model.with_draft(str(folder), head="full", tree=SMALL).generate(PROMPT, max_new_tokens=8).statistics
    assert full.router_recall is None and full.rows_per_round == SMALL.depth * VOCAB
    assert model.with_draft("none").generate(PROMPT, max_new_tokens=8).statistics.rows_per_round == 0


def test_recall_counts_what_the_target_drew_where_children_were_drafted(target: Target) -> None:
    head = RoutedHead(Backbone(target), routing_for(target, active=2))
    group_of = head._group_of
    inside, outside = (int((group_of == group).nonzero()[0]) for group in (0, 5))
    head._levels = [torch.tensor([0, 1, 2]), torch.tensor([0, 5, 6])]
    tokens = torch.tensor([[outside, outside, inside]])
    seen = [head.seen(tokens, torch.tensor([count])) for count in (1, 2, 3)]
    assert [each.tolist() for each in seen if each is not None] == [[0, 1], [1, 2], [1, 2]]


def test_without_its_router_a_folder_is_a_drafter_like_any_other(target: Target, folder: Path, tmp_path: Path) -> None:
    (folder / "router.safetensors").unlink()
    (folder / "grouping.safetensors").unlink()
    assert load(target, draft=str(folder), tree=SMALL).head_rows == VOCAB  # frequency: all there are
    with pytest.raises(UsageError, match=r"no router\.safetensors"):
        load(target, draft=str(folder), head="routed")


def test_a_router_for_something_else_is_refused(target: Target, folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(folder, other, ignore=shutil.ignore_patterns("other"))
    weight: Tensor = target.model.get_output_embeddings().weight  # type: ignore[no-untyped-call]
    make_grouping("contiguous", 8, 1, torch.arange(len(weight))).save(other)
    with pytest.raises(UsageError, match="another grouping"):
        load(target, draft=str(other), head="routed")
    with pytest.raises(UsageError, match=r"vocabulary of 259.*300 rows"):
        Routing.load(folder, tiny_target(vocab=300), 300, WIDTH)
    with pytest.raises(UsageError, match="vocabulary of 259"):
        Routing.load(folder, target, 260, WIDTH)
    (other / "router.safetensors").write_bytes(b"nothing")
    with pytest.raises(UsageError, match=r"router\.safetensors"):
        load(target, draft=str(other), head="routed")


@pytest.mark.parametrize(
    ("head", "said"),
    [
        ("routed:8", "8 active groups, but the router has 7"),
        ("routed:0", "0 active groups"),
        ("routed:2,sideways", "hierarchical or renormalised"),
        ("low-rank:2,hierarchical", "needed auto, full"),
        ("low-rank:99", "low rank is 99"),
        ("full:3", "needed auto, full"),
        ("63", "from 64 on"),
    ],
)
def test_a_head_that_cannot_be_is_told_in_one_line(target: Target, folder: Path, head: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as refused:
        load(target, draft=str(folder), head=head)
    assert "\n" not in str(refused.value)


def test_trees_are_no_wider_than_the_tokens_of_the_smallest_groups(target: Target, tmp_path: Path) -> None:
    folder = save_drafter(target, tmp_path)
    routing_for(target, groups=60, active=2).save(folder, target.tokenizer_hash)  # of 4 or 5 tokens in 5 places
    with pytest.raises(UsageError, match="tree width is 14, but the head has only 13 rows"):
        load(target, draft=str(folder), head="routed", tree=TreeShape(2, 14, 20))
    widest = load(target, draft=str(folder), head="routed", tree=TreeShape(2, 13, 20))
    assert len(widest.generate(PROMPT, max_new_tokens=8, ignore_eos=True).token_ids) == 8
    assert load(target, draft=str(folder), head="routed").tuner is not None  # times what there is, and no more


def test_heads_are_read_from_text() -> None:
    assert HeadChoice.parse(128) == HeadChoice("frequency", 128)
    assert HeadChoice.parse("routed:4,renormalised") == HeadChoice("routed", 4, "renormalised")
    assert HeadChoice.parse("low-rank:96") == HeadChoice("low-rank", 96)


def test_a_head_too_small_to_route_is_warned_about(target: Target, folder: Path) -> None:
    with pytest.warns(UserWarning, match=r"spares about .*--head full"):
        load(target, draft=str(folder), head="routed:6")
    routing = routing_for(target, active=3)
    weights = sum(part.numel() for part in Drafter(DrafterConfig.from_target(target)).parameters())
    router = WIDTH * WIDTH + WIDTH + 8 * WIDTH + 8
    full = weights + VOCAB * WIDTH
    assert spared_share(routing, weights, WIDTH) == pytest.approx(1 - (weights + router + 4 * 33 * WIDTH) / full)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(target, draft=str(folder), head="routed:1")
