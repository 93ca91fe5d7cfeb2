"""What BYOL, SimSiam and MoCo v3 have to do whatever the numbers are."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfsight.backbones.registry import create
from selfsight.contracts import Batch
from selfsight.errors import UserError
from selfsight.losses.byol import byol, distances
from selfsight.losses.mocov3 import contrast
from selfsight.losses.simsiam import simsiam
from selfsight.methods.base import Method
from selfsight.methods.byol import BYOL
from selfsight.methods.mocov3 import MoCoV3
from selfsight.methods.simsiam import SimSiam
from selfsight.nn.collapse import embedding_std
from selfsight.optim.schedule import Cosine

from ..small import SmallNet, assert_resumes, batches, prepare, train

SGD = partial(torch.optim.SGD, momentum=0.9, weight_decay=1e-4)
SIZES: dict[str, dict[str, Any]] = {
    "byol": {"hidden_dim": 9, "dim": 5},
    "simsiam": {"dim": 8, "predictor_dim": 3},
    "mocov3": {"hidden_dim": 9, "dim": 5, "temperature": 0.2},
}
CLASSES: dict[str, Callable[..., Method]] = {"byol": BYOL, "simsiam": SimSiam, "mocov3": MoCoV3}


def make(name: str, backbone: nn.Module | None = None, **options: Any) -> Method:
    return CLASSES[name](backbone or SmallNet(), **(SIZES[name] | options))


def prepared(name: str, steps: int = 6, **options: Any) -> Method:
    return prepare(make(name, **options), SGD, 0.1, steps // 2, 2, teacher_momentum=Cosine(0.9, 1.0))


def rows(n: int = 6, D: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- losses ----------------------------------------------------------------------------------------------------------


def test_byol_is_the_equation_and_symmetric() -> None:
    p1, p2, z1, z2 = (rows(seed=s) for s in range(4))
    expected = 0.0
    for p, z in ((p1, z2), (p2, z1)):
        for a, b in zip(p, z, strict=True):
            expected += float((a / a.norm() - b / b.norm()).square().sum()) / len(p)
    assert float(byol(p1, p2, z1, z2)) == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(byol(p2, p1, z2, z1), byol(p1, p2, z1, z2))
    torch.testing.assert_close(byol(3 * p1, p2, z1, 0.2 * z2), byol(p1, p2, z1, z2))


def test_what_equal_orthogonal_and_opposite_directions_cost() -> None:
    z = rows()
    assert float(byol(z, z, z, z)) == pytest.approx(0, abs=1e-12)
    assert float(byol(-z, -z, z, z)) == pytest.approx(8)
    assert float(simsiam(z, z, z, z)) == pytest.approx(-1)
    assert float(simsiam(-z, -z, z, z)) == pytest.approx(1)
    e = torch.eye(4, dtype=torch.float64)
    assert float(byol(e[:2], e[:2], e[2:], e[2:])) == pytest.approx(make("byol").chance_loss())
    assert float(simsiam(e[:2], e[:2], e[2:], e[2:])) == pytest.approx(make("simsiam").chance_loss(), abs=1e-12)


@pytest.mark.parametrize("loss", [byol, simsiam])
def test_no_gradient_reaches_the_targets_or_a_row_of_zeros_breaks_it(loss: Callable[..., Tensor]) -> None:
    p, z = rows().requires_grad_(), rows(seed=1).requires_grad_()
    loss(p, p, z, z).backward()
    assert z.grad is None
    with torch.no_grad():
        p[0] = 0
    assert torch.isfinite(loss(p, p, z, z))


def test_contrast_is_the_equation() -> None:
    q, k, T = rows(seed=1), rows(seed=2), 0.3
    u, v = F.normalize(q, dim=1), F.normalize(k, dim=1)
    expected = 0.0
    for i in range(len(q)):
        e = [math.exp(float(u[i] @ v[j]) / T) for j in range(len(k))]
        expected -= 2 * T * math.log(e[i] / sum(e)) / len(q)
    assert float(contrast(q, k, temperature=T)) == pytest.approx(expected, rel=1e-12)


def test_contrast_follows_the_order_of_the_images_and_costs_ln_n_when_all_keys_agree() -> None:
    q, k = rows(), rows(seed=1)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(contrast(q[order], k[order], temperature=0.2), contrast(q, k, temperature=0.2))
    method = prepare(make("mocov3"), SGD, 0.1, 1, 1, teacher_momentum=Cosine(0.9, 1.0))
    method.clock = type(method.clock)(6, 6, 1, 1)
    same = k[:1].expand_as(k)
    both = 2 * contrast(q, same, temperature=0.2)
    assert float(both) == pytest.approx(method.chance_loss())
    with pytest.raises(UserError, match="temperature"):
        contrast(q, k, temperature=0.0)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_losses_of_half_precision_are_computed_in_float32(half: torch.dtype) -> None:
    p, z = rows().to(half), rows(seed=1).to(half)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for loss in (byol(p, p, z, z), simsiam(p, p, z, z), contrast(p, z, temperature=0.02)):
            assert loss.dtype == torch.float32
    torch.testing.assert_close(distances(p, z), distances(p.float(), z.float()), atol=0, rtol=0)


def test_spread_tells_a_sphere_from_a_point() -> None:
    assert float(embedding_std(rows(2000, 16))) == pytest.approx(1, abs=0.02)
    assert float(embedding_std(torch.ones(10, 16))) == pytest.approx(0, abs=1e-6)
    assert float(embedding_std(5 * rows(2000, 16))) == pytest.approx(float(embedding_std(rows(2000, 16))))


# --- networks and steps ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(CLASSES))
def test_each_view_passes_by_itself(name: str) -> None:
    method, (batch,) = prepared(name), batches([16, 16], 4, 1)
    method.begin_step(0)
    method.training_step(batch, 0)
    norm = method.backbone.get_submodule("stages.1")
    assert int(norm.num_batches_tracked) == 2
    hidden = method.projector[1]
    assert int(hidden.num_batches_tracked) == 2


@pytest.mark.parametrize("name", list(CLASSES))
def test_exchanged_views_give_the_same_loss(name: str) -> None:
    method, (batch,) = prepared(name).double().eval(), batches([16, 16], 4, 1, dtype=torch.float64)
    method.begin_step(0)
    loss = method.training_step(batch, 0)["loss"]
    exchanged = method.training_step(Batch(batch.views[::-1], batch.indices), 0)["loss"]
    torch.testing.assert_close(exchanged, loss)


@pytest.mark.parametrize("name", list(CLASSES))
def test_a_run_stopped_and_loaded_goes_on_bit_for_bit(name: str) -> None:
    assert_resumes(partial(prepared, name), batches([16, 16], 4, 3), stop=4, steps=6)


@pytest.mark.parametrize("name", list(CLASSES))
def test_a_collapsed_network_is_seen(name: str) -> None:
    class Constant(SmallNet):
        def forward(self, x: Tensor) -> Tensor:
            return 0 * super().forward(x) + 1

    torch.manual_seed(0)
    method, (batch,) = prepared(name, backbone=Constant()).eval(), batches([16, 16], 8, 1)
    method.begin_step(0)
    found = method.training_step(batch, 0)
    (spread,) = (value for key, value in found.items() if key.endswith("_std"))
    assert float(spread) < 1e-3
    healthy = prepared(name)
    healthy.begin_step(0)
    (spread,) = (v for key, v in healthy.training_step(batch, 0).items() if key.endswith("_std"))
    assert float(spread) > 0.1


@pytest.mark.parametrize("name", list(CLASSES))
def test_refuses_a_frozen_backbone(name: str) -> None:
    with pytest.raises(UserError, match="frozen backbone"):
        make(name, backbone=SmallNet().requires_grad_(False))


@pytest.mark.parametrize("name", ["byol", "mocov3"])
def test_the_average_follows_with_its_momentum_and_keeps_its_own_statistics(name: str) -> None:
    torch.manual_seed(0)
    method = prepared(name)
    teacher = method.target if name == "byol" else method.momentum_encoder
    online = method.online if name == "byol" else method.base_encoder
    data, optimizer = batches([16, 16], 4, 2), method.configure_optimizers()
    train(method, optimizer, data, range(1))
    slow = [p.clone() for p in teacher.parameters()]
    fast = [p.detach().clone() for p in online.parameters()]
    before = teacher.module[0].stages[1].running_mean.clone()
    train(method, optimizer, data, range(1, 2))
    m = method.scheduled["teacher_momentum"]
    if name == "byol":  # towards the weights after the step
        fast = [p.detach() for p in online.parameters()]
    for t, s, now in zip(slow, fast, teacher.parameters(), strict=True):
        torch.testing.assert_close(now, m * t + (1 - m) * s)
    assert (teacher.module[0].stages[1].running_mean - before).abs().max() > 1e-4
    assert not any(p.requires_grad for p in teacher.parameters())


def test_simsiams_bias_stays_and_the_predictors_rate_does_not_fall() -> None:
    torch.manual_seed(0)
    method = prepared("simsiam")
    bias = method.projector[-2].bias
    start, optimizer = bias.clone(), method.configure_optimizers()
    train(method, optimizer, batches([16, 16], 4, 3), range(6))
    assert torch.equal(bias, start)
    assert start.abs().max() > 0.01, "it stays at its random first value, not at 0"
    falling, constant = optimizer.param_groups
    assert falling["lr"] < constant["lr"] == 0.1
    assert {id(p) for p in constant["params"]} == {id(p) for p in method.predictor.parameters()}
    (single,) = make("simsiam", constant_predictor_lr=False).param_groups()
    assert len(single["params"]) == sum(p.requires_grad for p in method.parameters())


def test_byols_classifier_is_trained_and_not_noticed() -> None:
    data = [Batch(b.views, b.indices, b.indices % 3) for b in batches([16, 16], 6, 2)]
    ends = []
    for classes in (0, 3):
        torch.manual_seed(0)
        method = prepared("byol", online_classes=classes)
        method.load_state_dict(make_like(method), strict=False)
        found = train(method, method.configure_optimizers(), data, range(4))
        ends.append(method.backbone.state_dict())
    assert {"online_accuracy"} <= set(found[-1])
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, atol=0, rtol=0)


def make_like(method: Method) -> dict[str, Tensor]:
    """First weights that do not depend on how many layers were made."""
    g = torch.Generator().manual_seed(1)
    state = {n: v for n, v in sorted(method.state_dict().items()) if not n.startswith("classifier")}
    return {n: torch.randn(v.shape, generator=g) * 0.3 if n.endswith("weight") else v for n, v in state.items()}


# --- transformers ----------------------------------------------------------------------------------------------------


def vit(**options: Any) -> nn.Module:
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 3}
    return create("vit_tiny_moco", **(sizes | options))


def test_heads_and_decay_fit_the_backbone() -> None:
    small, large = make("mocov3"), make("mocov3", backbone=vit())
    assert sum(isinstance(m, nn.Linear) for m in small.projector) == 2
    assert sum(isinstance(m, nn.Linear) for m in large.projector) == 3
    assert isinstance(small.predictor[-1], nn.Linear)
    assert isinstance(large.predictor[-1], nn.BatchNorm1d)
    assert len(small.param_groups()) == 2
    assert len(large.param_groups()) == 1
    with pytest.raises(UserError, match="Did you mean 'vit'"):
        make("mocov3", heads="vits")


def test_the_patches_stay_at_their_first_values_unless_asked() -> None:
    torch.manual_seed(0)
    for frozen in (True, False):
        method = make("mocov3", backbone=vit(), freeze_patches=frozen)
        prepare(method, partial(torch.optim.AdamW, weight_decay=0.1), 0.01, 2, 2, teacher_momentum=Cosine(0.9, 1.0))
        start = method.backbone.patch_embed.proj.weight.clone()
        train(method, method.configure_optimizers(), batches([16, 16], 4, 2), range(2))
        assert torch.equal(method.backbone.patch_embed.proj.weight, start) == frozen
        assert not method.backbone.pos_embed.requires_grad
    assert create("vit_conv_small_moco", depth=1).patch_embed.proj[0].weight.requires_grad
    with pytest.raises(UserError, match="patches of 16"):
        create("vit_conv_small_moco", patch_size=8)
