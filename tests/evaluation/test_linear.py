from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from selfsight.datamodules import ImageSet, digits
from selfsight.errors import UserError
from selfsight.evaluation.features import Features
from selfsight.evaluation.probes.linear import FewShot, LinearProbe, SGDProbe, Standardise, folds, hold_out, per_class
from selfsight.evaluation.probes.logistic import Linear, fit_lbfgs, fit_sgd

from .conftest import clusters


def objective(head: Linear, x: Tensor, y: Tensor, penalty: float) -> float:
    loss = F.cross_entropy(head(x)[:, 0], y) + penalty / 2 * head.weight.square().sum()
    return float(loss)


@pytest.mark.parametrize("shape", [(200, 6), (30, 50)], ids=["more images", "more dimensions"])
def test_each_penalty_reaches_sklearns_optimum(shape: tuple[int, int]) -> None:
    data = clusters(shape[0], 4, shape[1], spread=2.0)
    x = Standardise.of(data.x.double())(data.x.double())
    y, penalties = data.known_labels, [1e-3, 1e-1]
    heads = fit_lbfgs(x, y, 4, penalties, tolerance=1e-10, max_steps=2000)
    for i, penalty in enumerate(penalties):
        peer = LogisticRegression(C=1 / (penalty * len(x)), tol=1e-10, max_iter=10_000).fit(x.numpy(), y.numpy())
        np.testing.assert_allclose(heads.weight[i].T.numpy(), peer.coef_, atol=2e-5)
        bias = heads.bias[i] - heads.bias[i].mean()
        np.testing.assert_allclose(bias.numpy(), peer.intercept_ - peer.intercept_.mean(), atol=2e-5)


def test_heads_do_not_disturb_each_other_and_a_start_at_the_end_stays_there() -> None:
    data = clusters(150, 3, 8, spread=1.5)
    x, y = Standardise.of(data.x)(data.x).double(), data.known_labels
    together = fit_lbfgs(x, y, 3, [1e-4, 1e-2, 1.0], tolerance=1e-9, max_steps=1000)
    for i, penalty in enumerate([1e-4, 1e-2, 1.0]):
        alone = fit_lbfgs(x, y, 3, [penalty], tolerance=1e-9, max_steps=1000)
        torch.testing.assert_close(together.weight[i : i + 1], alone.weight, atol=1e-4, rtol=1e-4)
        again = fit_lbfgs(x, y, 3, [penalty], start=alone, max_steps=0)
        torch.testing.assert_close(again.weight, alone.weight, atol=1e-9, rtol=1e-6)
        torch.testing.assert_close(again.bias, alone.bias)


def test_float32_default_tolerance_is_at_the_optimum_for_all_purposes() -> None:
    data = clusters(400, 5, 20, spread=2.0)
    x, y = Standardise.of(data.x)(data.x), data.known_labels
    quick = fit_lbfgs(x, y, 5, [1e-3])
    exact = fit_lbfgs(x.double(), y, 5, [1e-3], tolerance=1e-10, max_steps=2000)
    assert objective(quick, x, y, 1e-3) - objective(exact, x.double(), y, 1e-3) < 1e-4


def test_batched_sgd_equals_torch_sgd_head_by_head() -> None:
    data = clusters(64, 3, 5, spread=1.0)
    x, y = data.x, data.known_labels
    grid = [(0.5, 0.0), (0.1, 1e-2)]
    rates, decays = zip(*grid, strict=True)
    heads = fit_sgd(x, y, 3, rates, decays, epochs=3, batch_size=20, momentum=0.9, seed=4)
    for i, (rate, decay) in enumerate(grid):
        layer = torch.nn.Linear(5, 3)
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
        optimizer = torch.optim.SGD(layer.parameters(), lr=rate, momentum=0.9, weight_decay=decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=9)
        generator = torch.Generator().manual_seed(4)
        # a falling rate enters before or after momentum: torch multiplies the velocity by the rate of the step, as here
        for _ in range(3):
            order = torch.randperm(64, generator=generator)
            for rows in order[:60].split(20):
                optimizer.zero_grad()
                F.cross_entropy(layer(x[rows]), y[rows]).backward()
                optimizer.step()
                schedule.step()
        torch.testing.assert_close(heads.weight[i].T, layer.weight.data, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(heads.bias[i], layer.bias.data, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "probe", [LinearProbe(), LinearProbe(folds=3), SGDProbe(epochs=10)], ids=["lbfgs", "folds", "sgd"]
)
def test_separable_clouds_are_separated_and_noise_is_not(probe: LinearProbe | SGDProbe) -> None:
    results = probe(clusters(600, 6, 12), clusters(300, 6, 12, seed=1))
    assert results["linear_top1"] == 1
    assert results["linear_top5"] == 1
    generator = torch.Generator().manual_seed(0)
    noise = [Features(torch.randn(n, 4, generator=generator), torch.arange(n) % 6, torch.arange(n)) for n in (600, 300)]
    assert probe(*noise)["linear_top1"] < 0.27


@pytest.mark.parametrize("probe", [LinearProbe(), SGDProbe(epochs=5)], ids=["lbfgs", "sgd"])
def test_nothing_is_chosen_on_the_test_set(probe: LinearProbe | SGDProbe) -> None:
    train, test = clusters(300, 6, 8, spread=2.0), clusters(60, 6, 8, spread=2.0, seed=1)
    shuffled = Features(test.x, test.known_labels.flip(0), test.indices)

    def chosen(against: Features) -> dict[str, float]:
        return {k: v for k, v in probe(train, against).items() if not k.startswith("linear_top")}

    assert chosen(test) == chosen(shuffled)
    alone = probe(train, test.take(torch.arange(1)))["linear_top1"]
    assert alone in (0.0, 1.0), "a prediction may not depend on the other test images"


def test_the_unit_of_the_features_does_not_matter() -> None:
    train, test = clusters(300, 6, 8, spread=2.0), clusters(200, 6, 8, spread=2.0, seed=1)
    scaled = [Features(1000 * f.x + 7, f.labels, f.indices) for f in (train, test)]
    assert LinearProbe()(train, test)["linear_top1"] == pytest.approx(LinearProbe()(*scaled)["linear_top1"], abs=0.011)


def test_rounding_of_the_features_does_not_choose_the_penalty() -> None:
    """What another number of threads or another processor does to features: in the last bit of each."""
    data = digits(image_size=16)

    def pixels(images: ImageSet, generator: torch.Generator) -> Features:
        x = torch.stack([torch.as_tensor(images.pixels[i]) for i in range(len(images))]).flatten(1) / 255
        last_bit = torch.randint(-1, 2, x.shape, generator=generator) * torch.finfo(torch.float32).eps
        return Features(x * (1 + last_bit), images.labels, torch.arange(len(x)))

    found = set()
    for draw in range(4):
        generator = torch.Generator().manual_seed(draw)
        figures = LinearProbe()(pixels(data.train, generator), pixels(data.test, generator))
        found.add((figures["linear_penalty"], figures["linear_top1"]))
    assert found == {(0.01, 355 / 360)}


def test_constant_features_give_chance_and_no_error() -> None:
    train = Features(torch.ones(60, 4), torch.arange(60) % 3, torch.arange(60))
    assert LinearProbe()(train, train)["linear_top1"] == pytest.approx(1 / 3)


def test_held_out_share_of_every_class_and_nothing_twice() -> None:
    labels = torch.tensor([0] * 50 + [1] * 20 + [2] * 3 + [3])
    fitting, held = hold_out(labels, 0.1, seed=0)
    assert sorted(fitting.tolist() + held.tolist()) == list(range(74))
    assert torch.bincount(labels[held], minlength=4).tolist() == [5, 2, 1, 0]
    lonely_fit, lonely_held = hold_out(torch.arange(5), 0.1, seed=0)
    assert sorted(lonely_fit.tolist()) == sorted(lonely_held.tolist()) == list(range(5))


def test_folds_hold_every_row_out_once_and_keep_the_classes_even() -> None:
    labels = torch.tensor([0] * 31 + [1] * 9)
    parts = folds(labels, 3, seed=0)
    assert sorted(row for _, held in parts for row in held.tolist()) == list(range(40))
    for fitting, held in parts:
        assert sorted(fitting.tolist() + held.tolist()) == list(range(40))
        assert (labels[held] == 1).sum() == 3


def test_cross_validation_chooses_as_sklearn_does() -> None:
    train, test = clusters(120, 3, 30, spread=4.0), clusters(300, 3, 30, spread=4.0, seed=1)
    penalties = (1e-3, 1e-1, 10.0)
    x, y = Standardise.of(train.x)(train.x), train.known_labels
    merits = []
    for penalty in penalties:
        correct = 0.0
        for fitting, held in folds(y, 4, seed=0):
            peer = LogisticRegression(C=1 / (penalty * len(fitting)), max_iter=5000).fit(x[fitting], y[fitting])
            correct += peer.score(x[held], y[held]) * len(held)
        merits.append(correct)
    assert len({round(m) for m in merits}) == 3, "the case has to tell the penalties apart"
    chosen = LinearProbe(penalties, folds=4)(train, test)["linear_penalty"]
    assert chosen == penalties[int(np.argmax(merits))]


def test_per_class_draws_exactly_n_and_differ_by_seed() -> None:
    labels = torch.arange(90) % 9
    rows = per_class(labels, 4, seed=0)
    assert torch.bincount(labels[rows]).tolist() == [4] * 9
    assert len(rows.unique()) == 36
    assert not torch.equal(rows, per_class(labels, 4, seed=1))
    with pytest.raises(UserError, match="smallest class has 10"):
        per_class(labels, 11, seed=0)


def test_few_shot_reports_every_shot_and_more_labels_help() -> None:
    train, test = clusters(400, 8, 16, spread=1.5), clusters(400, 8, 16, spread=1.5, seed=1)
    found = FewShot()(train, test)["few_shot"]
    assert list(found) == ["1", "5", "20"]
    assert found["1"]["mean"] < found["5"]["mean"] < found["20"]["mean"]
    assert all(0 < each["std"] < 0.2 for each in found.values())
    assert FewShot()(train, test)["few_shot"] == found, "the draws are fixed by the seed"


def test_standard_shots_a_class_cannot_give_are_left_out_and_asked_for_ones_refused() -> None:
    small = clusters(24, 4, 8)
    assert list(FewShot()(small, small)["few_shot"]) == ["1", "5"]
    with pytest.raises(UserError, match="smallest class has 6"):
        FewShot(shots=[7])(small, small)


def test_few_shot_draws_the_same_images_for_two_backbones() -> None:
    """On features that only say which training images they belong to, two permuted copies give the same accuracy."""
    train, test = clusters(100, 4, 8, spread=1.0), clusters(80, 4, 8, spread=1.0, seed=1)
    mirrored = [Features(f.x.flip(1), f.labels, f.indices) for f in (train, test)]
    a, b = FewShot(shots=[5])(train, test), FewShot(shots=[5])(*mirrored)
    assert a["few_shot"]["5"]["mean"] == pytest.approx(b["few_shot"]["5"]["mean"], abs=0.005)


def test_protocols_are_one_line() -> None:
    for evaluator in (LinearProbe(), SGDProbe(), FewShot()):
        assert "\n" not in evaluator.protocol
        assert "10% of the training" in evaluator.protocol or isinstance(evaluator, FewShot)
