"""What SupCon's loss and method have to do whatever the numbers are."""

from __future__ import annotations

import argparse
import itertools
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfsight.backbones.registry import create
from selfsight.checkpoints.authors import read
from selfsight.checkpoints.supcon import backbone_weights, from_official
from selfsight.contracts import Batch
from selfsight.errors import UserError
from selfsight.losses.supcon import CONTRAST_MODES, DENOMINATORS, SUMMATIONS, by_image, supcon, supcon_per_anchor
from selfsight.methods.supce import SupCE
from selfsight.methods.supcon import SupCon

from ..small import SmallNet, assert_resumes, batches, prepare, train

SGD = partial(torch.optim.SGD, momentum=0.9, weight_decay=1e-4)
OPTIONS: dict[str, Any] = {"temperature": 0.1, "base_temperature": 0.07}
FAMILY = list(itertools.product(CONTRAST_MODES, SUMMATIONS, DENOMINATORS))


def unit_rows(N: int, V: int, D: int = 5, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(N, V, D, generator=g, dtype=torch.float64), dim=-1)


def method(**options: Any) -> SupCon:
    defaults: dict[str, Any] = {
        "supervised": True, "hidden_dim": None, "dim": 5, "last_bias": True, "init_std": None,
        "normalize_embedding": False, "contrast_mode": "all", "summation": "out", "denominator": "all",
        "positives_cap": None, "decay": "all",
    }  # fmt: skip
    return SupCon(options.pop("backbone", None) or SmallNet(), **(defaults | OPTIONS | options))


def labelled(sizes: list[int], B: int, count: int, classes: int = 3) -> list[Batch]:
    data = batches(sizes, B, count)
    return [Batch(b.views, b.indices, b.indices % classes) for b in data]


# --- loss ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "summation", "denominator"), FAMILY)
def test_loss_is_the_equation(mode: str, summation: str, denominator: str) -> None:
    N, V, T = 5, 3, 0.3
    f, y = unit_rows(N, V), [0, 1, 0, 2, 1]
    rows = [(n, v) for n in range(N) for v in range(V)]
    found = supcon_per_anchor(
        f, torch.tensor(y), temperature=T, base_temperature=None, contrast_mode=mode, summation=summation,
        denominator=denominator,
    )  # fmt: skip
    assert found.shape == (V if mode == "all" else 1, N)
    for n, v in rows:
        if mode == "one" and v > 0:
            continue
        e = {(m, u): math.exp(float(f[n, v] @ f[m, u]) / T) for m, u in rows if (m, u) != (n, v)}
        positive = [c for c in e if y[c[0]] == y[n]]
        negative = sum(e[c] for c in e if y[c[0]] != y[n])
        D = {c: {"all": sum(e.values()), "one_positive": e[c] + negative, "only_negatives": negative} for c in positive}
        shares = [e[c] / D[c][denominator] for c in positive]
        outside = -sum(map(math.log, shares)) / len(shares)
        expected = outside if summation == "out" else -math.log(sum(shares) / len(shares))
        assert float(found[v, n]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("mode", "summation", "denominator"), FAMILY)
def test_order_of_images_names_of_classes_and_rotation_do_not_matter(
    mode: str, summation: str, denominator: str
) -> None:
    f, y = unit_rows(7, 2), torch.tensor([0, 1, 2, 0, 1, 0, 4])
    loss = partial(supcon, contrast_mode=mode, summation=summation, denominator=denominator, **OPTIONS)
    expected, order = loss(f, y), torch.randperm(7, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(loss(f[order], y[order]), expected)
    torch.testing.assert_close(loss(f, 10**9 - 7 * y), expected)
    turn = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)).Q
    torch.testing.assert_close(loss(f @ turn, y), expected)
    if mode == "all":
        torch.testing.assert_close(loss(f.flip(1), y), expected)


def test_summation_inside_is_never_larger() -> None:
    for seed in range(5):
        f, y = unit_rows(8, 2, seed=seed), torch.arange(8) % 3
        inside, outside = (supcon_per_anchor(f, y, summation=s, **OPTIONS) for s in ("in", "out"))
        assert (inside <= outside + 1e-12).all()
        assert (inside < outside - 1e-3).any()


def test_base_temperature_is_a_scale_and_nothing_else() -> None:
    f, y = unit_rows(6, 2), torch.arange(6) % 2
    plain = supcon(f, y, temperature=0.2, base_temperature=None)
    for base in (0.07, 0.2, 1.0):
        torch.testing.assert_close(supcon(f, y, temperature=0.2, base_temperature=base), plain * 0.2 / base)


def test_a_mask_of_labels_and_no_labels_at_all() -> None:
    f, y = unit_rows(6, 3), torch.tensor([0, 1, 0, 2, 2, 2])
    torch.testing.assert_close(supcon(f, mask=(y[:, None] == y).double(), **OPTIONS), supcon(f, y, **OPTIONS))
    torch.testing.assert_close(supcon(f, **OPTIONS), supcon(f, torch.arange(6), **OPTIONS))


def test_weights_of_a_mask_say_how_much_each_pair_counts() -> None:
    f = unit_rows(4, 1)
    mask = torch.zeros(4, 4, dtype=torch.float64)
    mask[0, 1], mask[0, 2] = 3, 1
    alone = [supcon_per_anchor(f, mask=F.one_hot(torch.tensor([c] * 4), 4).double(), **OPTIONS)[0, 0] for c in (1, 2)]
    torch.testing.assert_close(supcon_per_anchor(f, mask=mask, **OPTIONS)[0, 0], (3 * alone[0] + alone[1]) / 4)


@pytest.mark.parametrize(("mode", "summation", "denominator"), FAMILY)
def test_lonely_anchors_cost_nothing_and_pull_nowhere(mode: str, summation: str, denominator: str) -> None:
    options = OPTIONS | {"contrast_mode": mode, "summation": summation, "denominator": denominator}
    for f, y in (
        (unit_rows(1, 1), torch.tensor([3])),  # nothing to compare with
        (unit_rows(4, 1), torch.arange(4)),  # nothing to attract
    ):
        f.requires_grad_()
        per_anchor = supcon_per_anchor(f, y, **options)
        per_anchor.sum().backward()
        assert f.grad is not None
        assert not per_anchor.any()
        assert not f.grad.any()
    f, y = unit_rows(4, 1).requires_grad_(), torch.tensor([0, 0, 0, 5])
    per_anchor = supcon_per_anchor(f, y, **options)
    per_anchor.mean().backward()
    assert f.grad is not None
    assert per_anchor[0, 3] == 0
    assert (per_anchor[0, :3] != 0).all()
    assert f.grad[3].any(), "it still repels the others"
    torch.testing.assert_close(supcon(f, y, **options), per_anchor[0, :3].sum() / 4, msg="and dilutes the mean")


def test_no_negatives_is_no_number_for_only_negatives() -> None:
    f, y = unit_rows(3, 2).requires_grad_(), torch.zeros(3, dtype=torch.int64)
    for summation in SUMMATIONS:
        loss = supcon(f, y, summation=summation, denominator="only_negatives", **OPTIONS)
        (gradient,) = torch.autograd.grad(loss, f)
        assert loss == 0
        assert not gradient.any()
        assert supcon(f, y, summation=summation, denominator="one_positive", **OPTIONS).abs() < 1e-12


@pytest.mark.parametrize(("mode", "summation", "denominator"), FAMILY)
@pytest.mark.parametrize("temperature", [1e-3, 1e4])
def test_extreme_temperatures_in_float32(mode: str, summation: str, denominator: str, temperature: float) -> None:
    y = torch.arange(6) % 3
    options = {
        "temperature": temperature, "base_temperature": None, "contrast_mode": mode, "summation": summation,
        "denominator": denominator,
    }  # fmt: skip
    single, double = unit_rows(6, 2).float().requires_grad_(), unit_rows(6, 2).float().double().requires_grad_()
    losses = [supcon(f, y, **options) for f in (single, double)]
    gradients = [torch.autograd.grad(loss, f)[0] for loss, f in zip(losses, (single, double), strict=True)]
    torch.testing.assert_close(losses[0].double(), losses[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradients[0].double(), gradients[1], rtol=1e-3, atol=1e-3 / temperature)


def test_capped_positives_are_the_first_and_leave_the_denominator() -> None:
    f, y = unit_rows(6, 2), torch.tensor([0, 0, 0, 0, 1, 1])
    loss = partial(supcon_per_anchor, **OPTIONS)
    torch.testing.assert_close(loss(f, y, positives_cap=6), loss(f, y))
    kept = loss(f, y, positives_cap=2)
    for anchor, other in ((0, 1), (1, 0), (3, 0)):
        present = [anchor, other, 4, 5]  # of class 0 only the first other one
        torch.testing.assert_close(kept[:, anchor], loss(f[present], y[present])[:, 0])
    views_alone = loss(f, y, positives_cap=0)
    present = [2, 4, 5]
    torch.testing.assert_close(views_alone[:, 2], loss(f[present], y[present])[:, 0])


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(half: torch.dtype) -> None:
    f, y = unit_rows(6, 2).to(half), torch.arange(6) % 2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = supcon(f, y, **OPTIONS)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, supcon(f.float(), y, **OPTIONS))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"labels": torch.zeros(4), "mask": torch.eye(4)}, "labels and a mask"),
        ({"labels": torch.zeros(3)}, r"labels \[3\] for 4 images"),
        ({"mask": torch.eye(3)}, "one row an image"),
        ({"mask": torch.ones(4, 5)}, "a column for each"),
        ({"contrast_mode": "onee"}, "Did you mean 'one'"),
        ({"summation": "outside"}, "summation is 'outside'"),
        ({"denominator": "only_negative"}, "Did you mean 'only_negatives'"),
        ({"temperature": 0.0}, "above 0"),
        ({"base_temperature": -1.0}, "above 0"),
        ({"positives_cap": 3}, "multiple of the 2 views"),
    ],
)
def test_refusals(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        supcon(unit_rows(4, 2), **(OPTIONS | arguments))


def test_refuses_rows_that_are_not_sorted_by_image() -> None:
    with pytest.raises(UserError, match="by_image"):
        supcon(unit_rows(4, 2).flatten(0, 1), **OPTIONS)


# --- method --------------------------------------------------------------------------------------------------------


def test_views_of_an_image_stay_together_through_the_network() -> None:
    (batch,) = labelled([16, 16, 8], 4, 1)
    torch.manual_seed(0)
    made = method().eval()
    result = made.training_step(batch, 0)
    z = torch.stack([made.project(made.backbone(v)) for v in batch.views], dim=1)  # [B, V, D]
    torch.testing.assert_close(result["loss"], supcon(z, batch.labels, **OPTIONS))
    torch.testing.assert_close(z.norm(dim=-1), torch.ones(4, 3))
    assert torch.equal(by_image(torch.arange(6)[:, None], 2)[..., 0], torch.tensor([[0, 3], [1, 4], [2, 5]]))


def test_heads() -> None:
    net = SmallNet(8)
    assert [tuple(p.shape) for p in method(backbone=net).projector.parameters()] == [(8, 8), (8,), (5, 8), (5,)]
    assert [tuple(p.shape) for p in method(backbone=net, hidden_dim=0).projector.parameters()] == [(5, 8), (5,)]
    small = method(backbone=net, hidden_dim=64, last_bias=False, init_std=0.01).projector
    assert [tuple(p.shape) for p in small.parameters()] == [(64, 8), (64,), (5, 64)]
    assert float(small[0].weight.detach().std()) == pytest.approx(0.01, rel=0.2)
    assert not small[0].bias.any()
    h = torch.randn(3, 8)
    made = method(backbone=net, normalize_embedding=True)
    torch.testing.assert_close(made.project(h), made.project(7 * h))
    assert not torch.allclose(method(backbone=net).project(h), method(backbone=net).project(7 * h))


def test_without_labels_it_is_simclr_and_only_then_does_without() -> None:
    (plain,), (batch,) = batches([16, 16], 4, 1), labelled([16, 16], 4, 1)
    with pytest.raises(UserError, match="supervised=false"):
        method().training_step(plain, 0)
    torch.manual_seed(0)
    made = method(supervised=False).eval()
    assert torch.equal(made.training_step(plain, 0)["loss"], made.training_step(batch, 0)["loss"])


def test_unlabelled_images_belong_to_no_class() -> None:
    (batch,) = labelled([16, 16], 6, 1)
    assert batch.labels is not None
    batch.labels[3:] = -1
    torch.manual_seed(0)
    made = method().eval()
    expected = Batch(batch.views, batch.indices, torch.tensor([0, 1, 2, 3, 4, 5]))
    assert torch.equal(made.training_step(batch, 0)["loss"], made.training_step(expected, 0)["loss"])


def test_chance_is_the_loss_of_collapsed_embeddings() -> None:
    data = labelled([16, 16, 16], 4, 1)
    made = prepare(method(summation="in"), SGD, 0.1, 1, 1)
    made.clock = made.clock.__class__(4, 4, 1, 1)
    for p in made.projector.parameters():
        nn.init.zeros_(p)
    nn.init.ones_(made.projector[2].bias)
    result = made.training_step(data[0], 0)
    assert float(result["loss"].detach()) == pytest.approx(made.chance_loss(), rel=1e-5)
    assert float(result["loss"].detach()) == pytest.approx(0.1 / 0.07 * math.log(3 * 4 - 1), rel=1e-5)
    assert float(result["embedding_std"]) < 1e-3
    assert method(denominator="only_negatives").chance_loss() is None
    assert method(positives_cap=2).chance_loss() is None


def test_monitors() -> None:
    z = F.one_hot(torch.tensor([[0, 0], [1, 1], [0, 3], [2, 2]]), 4).double()  # [4, 2, 4]; image 2: two different views
    made = method()
    found = made.monitors(z, torch.tensor([7, 8, 7, 8]))
    assert float(found["positives"]) == 1
    assert float(found["nearest_agrees"]) == 1
    # image 2 is nearest to a view of image 0, whose own other view is as near as image 2
    found = made.monitors(z, torch.tensor([7, 8, 9, 8]))
    assert float(found["nearest_agrees"]) == 0.75
    found = made.monitors(z, None)
    assert float(found["positives"]) == 0
    assert float(found["nearest_agrees"]) == 0.75
    sphere = F.normalize(torch.randn(4000, 1, 6, dtype=torch.float64), dim=-1)
    assert float(made.monitors(sphere, None)["embedding_std"]) == pytest.approx(1, abs=0.02)


def test_it_learns_the_classes() -> None:
    torch.manual_seed(0)
    data = labelled([16, 16], 12, 2)
    for batch in data:  # a class is a colour
        assert batch.labels is not None
        batch.views = [v + 2 * F.one_hot(batch.labels, 3)[..., None, None] for v in batch.views]
    made = prepare(method(), SGD, 0.05, 2, 10)
    found = train(made, made.configure_optimizers(), data, range(20))
    best = 0.1 / 0.07 * math.log(7)  # every class in one point: 7 positives share the denominator
    assert found[0]["loss"] > 1.3 * best
    assert best < found[-1]["loss"] < 1.1 * best
    assert found[-1]["nearest_agrees"] == 1


def test_groups() -> None:
    assert len(method().param_groups()) == 1
    kernels, plain = method(decay="kernels").param_groups()
    assert all(p.ndim > 1 for p in kernels["params"])
    assert all(p.ndim == 1 for p in plain["params"])
    assert plain["weight_decay"] == 0


def test_resumed_run_equals_an_uninterrupted_one() -> None:
    assert_resumes(lambda: prepare(method(), SGD, 0.1, 3, 3), labelled([16, 16, 8], 4, 3), 4, 8)


# --- SupCE ---------------------------------------------------------------------------------------------------------


def supce(**options: Any) -> SupCE:
    return SupCE(SmallNet(), **({"num_classes": 3, "label_smoothing": 0.0, "decay": "all"} | options))


def test_cross_entropy_over_all_views_of_labelled_images() -> None:
    (batch,) = labelled([16, 8], 6, 1)
    assert batch.labels is not None
    torch.manual_seed(0)
    made = supce(label_smoothing=0.1).eval()
    by_view = [
        F.cross_entropy(made.classifier(made.backbone(v)), batch.labels, label_smoothing=0.1) for v in batch.views
    ]
    torch.testing.assert_close(made.training_step(batch, 0)["loss"], torch.stack(by_view).mean())
    batch.labels[4:] = -1
    known = Batch([v[:4] for v in batch.views], batch.indices[:4], batch.labels[:4])
    for name, value in made.training_step(batch, 0).items():
        torch.testing.assert_close(value, made.training_step(known, 0)[name])
    nn.init.zeros_(made.classifier.weight)
    nn.init.zeros_(made.classifier.bias)
    assert float(made.training_step(known, 0)["loss"].detach()) == pytest.approx(made.chance_loss(), rel=1e-6)
    batch.labels[:] = -1
    assert made.training_step(batch, 0)["loss"] == 0


def test_supce_refuses_images_without_labels() -> None:
    with pytest.raises(UserError, match="have none"):
        supce().training_step(batches([16], 4, 1)[0], 0)
    with pytest.raises(UserError, match="images have 0"):
        supce(num_classes=0)


def test_supce_resumes() -> None:
    assert_resumes(lambda: prepare(supce(), SGD, 0.1, 3, 3), labelled([16], 4, 3), 4, 8)


# --- authors' checkpoints ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hidden", "gpus"), [(None, 1), (0, 1), (None, 2)])
def test_authors_names_are_understood(hidden: int | None, gpus: int, tmp_path: Path) -> None:
    made = method(backbone=create("resnet18", stem="cifar"), hidden_dim=hidden)
    state, encoder = {}, "encoder.module." if gpus > 1 else "encoder."
    for name, value in made.state_dict().items():
        theirs = name.replace("backbone.", encoder).replace("downsample", "shortcut")
        state[theirs.replace("projector." if hidden is None else "projector.0.", "head.")] = value
    torch.save({"opt": argparse.Namespace(model="resnet18"), "model": state, "epoch": 1000}, tmp_path / "last.pth")
    checkpoint = read(tmp_path / "last.pth")
    found = from_official(checkpoint)
    assert found.keys() == made.state_dict().keys()
    assert all(torch.equal(found[name], value) for name, value in made.state_dict().items())
    assert backbone_weights(checkpoint).keys() == made.backbone.state_dict().keys()


def test_authors_supervised_networks_and_other_files() -> None:
    found = from_official({"module.encoder.conv1.weight": torch.ones(1), "module.fc.bias": torch.zeros(1)})
    assert found.keys() == {"backbone.conv1.weight", "classifier.bias"}
    with pytest.raises(UserError, match="no checkpoint of HobbitLong"):
        from_official({"conv1.weight": torch.ones(1)})
