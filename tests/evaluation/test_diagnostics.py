from __future__ import annotations

import math

import pytest
import timm
import torch

from selfsight.evaluation.features import Features
from selfsight.evaluation.probes import diagnostics as d


def orthonormal(n: int, k: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(n, k, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]


def test_spread_of_one_point_is_zero_and_of_signed_axes_one() -> None:
    assert d.feature_std(torch.randn(1, 6).expand(10, 6) * torch.linspace(1, 9, 10)[:, None]) < 1e-6
    axes = torch.cat([torch.eye(8), -torch.eye(8)])  # mean 0, every coordinate's mean square 1/8
    assert d.feature_std(axes) == pytest.approx(1)


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_effective_rank_of_equal_singular_values_is_their_number(rank: int) -> None:
    x = orthonormal(40, rank) @ orthonormal(9, rank).T
    assert d.rankme(x) == pytest.approx(rank, rel=1e-4)
    assert d.rankme(1000 * x) == pytest.approx(rank, rel=1e-4)
    assert d.rankme(x[:, :9].T) == pytest.approx(rank, rel=1e-4)


def test_effective_rank_of_two_unequal_singular_values() -> None:
    x = orthonormal(20, 2) @ torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64)) @ orthonormal(5, 2).T
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert d.rankme(x) == pytest.approx(math.exp(entropy), rel=1e-4)
    assert d.rankme(torch.zeros(4, 3)) == 0


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_alpha_of_an_exact_power_law(alpha: float) -> None:
    basis = orthonormal(60, 13)
    centred = torch.linalg.qr(basis - basis.mean(dim=0))[0][:, :12]
    centred = torch.linalg.qr(centred - centred.mean(dim=0))[0]
    spectrum = torch.arange(1, 13, dtype=torch.float64) ** (-alpha / 2)  # singular values: eigenvalues' roots
    assert d.alpha_req(centred * spectrum) == pytest.approx(alpha, abs=1e-6)


def test_alignment_of_equal_opposite_and_orthogonal_views() -> None:
    a = torch.eye(4)
    assert d.alignment(a, 5 * a) == pytest.approx(0)
    assert d.alignment(a, -a) == pytest.approx(4)
    assert d.alignment(a, a.roll(1, 0)) == pytest.approx(2)


def test_uniformity_closed_forms() -> None:
    assert d.uniformity(torch.ones(5, 3)) == pytest.approx(0, abs=1e-9)
    assert d.uniformity(torch.eye(6)) == pytest.approx(-4)  # every squared distance is 2
    two = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])  # distances squared 4, 2, 2
    assert d.uniformity(two) == pytest.approx(math.log((math.exp(-8) + 2 * math.exp(-4)) / 3))
    assert math.isnan(d.uniformity(torch.ones(1, 3)))


def test_knn_of_views() -> None:
    a = torch.eye(5)
    assert d.view_knn_top1(a, 3 * a) == 1
    swapped = a[[1, 0, 2, 3, 4]]
    assert d.view_knn_top1(a, swapped) == pytest.approx(0.6)
    assert d.view_knn_top1(torch.ones(5, 3), torch.ones(5, 3)) == 0, "a collapsed embedding finds nothing"


def test_prototype_figures() -> None:
    even = torch.eye(4).repeat(3, 1)
    assert d.code_entropy(even) == pytest.approx(1)
    assert d.live_prototypes(even) == 1
    one = torch.eye(4)[[2, 2, 2]]
    assert d.code_entropy(one) == pytest.approx(0)
    assert d.live_prototypes(one) == 0.25
    rare = torch.eye(2)[[0] * 99 + [1]]  # a fair share is 50, a tenth of it 5
    assert d.live_prototypes(rare) == 0.5
    assert d.live_prototypes(torch.eye(2)[[0] * 95 + [1] * 5]) == 1
    halves = torch.eye(4)[[0, 1]]
    assert d.code_entropy(halves) == pytest.approx(math.log(2) / math.log(4))


def figures(x: torch.Tensor) -> dict[str, float]:
    features = Features(x, None, torch.arange(len(x)))
    return d.Diagnostics()(features, features)


def test_the_alarm_rings_for_collapse_and_is_silent_for_health() -> None:
    generator = torch.Generator().manual_seed(0)
    healthy = torch.randn(500, 64, generator=generator).relu()  # all-positive, as pooled features are
    assert d.judge(figures(healthy)) is None
    point = torch.randn(64, generator=generator) + 1e-3 * torch.randn(500, 64, generator=generator)
    sentence = d.judge(figures(point))
    assert sentence is not None
    assert sentence.startswith("Collapse:")
    assert "learning rate" in sentence
    line = torch.randn(500, 1, generator=generator) * torch.randn(1, 400, generator=generator)
    sentence = d.judge(figures(line))
    assert sentence is not None
    assert sentence.startswith("Dimensional collapse:")
    assert sentence.count(". ") == 0, "one sentence"


def test_alarms_on_codes_and_on_figures_that_are_no_number() -> None:
    assert "prototypes" in (d.judge({"code_entropy": 0.2}) or "")
    assert "prototypes" in (d.judge({"live_prototypes": 0.05}) or "")
    assert d.judge({"code_entropy": 0.99, "live_prototypes": 0.9}) is None
    assert "codes say nothing" in (d.judge({"code_softness": 0.999}) or "")
    assert d.judge({"code_softness": 0.2, "mask_rate": 0.001}) is None
    assert "pseudo-label" in (d.judge({"mask_rate": 0.0}) or "")
    assert d.judge({"feature_std": math.nan}) is not None
    assert d.judge({"uniformity": math.nan, "loss": math.nan}) is None, "no bounds, no alarm"


def test_pseudo_labels_that_all_count_from_the_start_ring() -> None:
    assert "Every pseudo-label" in (d.judge_mask(1.0, behind=0.1) or "")
    assert d.judge_mask(1.0, behind=0.13) is None, "late in a training all may be confident"
    assert d.judge_mask(0.99, behind=0.03) is None


def test_an_untrained_network_does_not_ring() -> None:
    images = torch.nn.functional.interpolate(torch.rand(200, 3, 4, 4, generator=torch.Generator().manual_seed(0)), 32)
    for name in ("resnet18", "convnext_atto"):
        torch.manual_seed(0)
        backbone = timm.create_model(name, num_classes=0).eval()
        with torch.no_grad():
            assert d.judge(figures(backbone(images))) is None, name


def test_every_figure_with_an_alarm_has_one_sentence_of_remedy() -> None:
    for name, figure in d.FIGURES.items():
        assert bool(figure.remedy) == (figure.below is not None or figure.above is not None), name
        assert figure.meaning
        assert figure.normal
        if figure.remedy:
            sentence = figure.remedy.format(value=0.001)
            assert sentence.endswith(".")
            assert sentence.count(". ") == 0


def test_a_loss_at_chance_is_said_once_it_stays_there() -> None:
    chance = math.log(512)
    assert d.judge_loss([chance, chance], chance) is None
    assert "guessing" in (d.judge_loss([9.0, chance, chance * 1.002, chance * 0.998], chance) or "")
    assert d.judge_loss([chance, chance, 0.9 * chance], chance) is None
    above = [chance + 2, chance + 1, chance + 0.5]
    assert d.judge_loss(above, chance, behind=0.4) is None, "where contrastive losses begin"
    assert "never below" in (d.judge_loss(above, chance, behind=0.5) or "")
    assert d.judge_loss([*above, chance - 0.5, chance + 0.5], chance, behind=1.0) is None
    assert d.judge_loss([0.004, -0.003, 0.0], 0.0) is not None, "SimSiam guesses at 0"
    assert d.judge_loss([0.0, -0.01, -0.05], 0.0) is None


@pytest.mark.parametrize("name", ["key_std", "projection_std", "embedding_std", "embedding_scale", "teacher_entropy"])
def test_a_collapse_that_a_method_watches_for_is_said(name: str) -> None:
    assert (d.judge({name: 1e-4}) or "").startswith("Collapse:")
    assert d.judge({name: 0.6}) is None


def test_labels_are_not_needed() -> None:
    assert not d.Diagnostics().needs_labels
    assert set(figures(torch.randn(20, 5))) == {"feature_std", "rank", "rank_share", "alpha_req"}
