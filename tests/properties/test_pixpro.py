"""What PixPro's pairs, propagation, losses and target have to do whatever the numbers are."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from selfsight.backbones.registry import create
from selfsight.contracts import Batch
from selfsight.errors import UserError
from selfsight.losses.pixpro import pixel_consistency, pixel_contrast, pixel_distances, positives
from selfsight.methods.pixpro import PixPro
from selfsight.nn.boxes import corners
from selfsight.nn.propagation import PixelPropagation
from selfsight.optim import lars
from selfsight.optim.schedule import Constant, Cosine

from ..small import SmallNet, assert_resumes, batches, boxes_of, prepare, train

LARS = partial(lars.LARS, momentum=0.9, weight_decay=1e-4, eps=1e-8, variant="torch")
SIZE = (4, 5)


def pixpro(**options: Any) -> PixPro:
    defaults: dict[str, Any] = {
        "hidden_dim": 9, "dim": 6, "loss": "pixpro", "exponent": 2.0, "clamp": 0.0, "transform_layers": 1,
        "normalise_value": True, "pos_ratio": 0.7, "skip_empty": False, "temperature": 0.3, "instance_weight": 0.0,
        "decay": "kernels",
    }  # fmt: skip
    return PixPro(options.pop("backbone", None) or SmallNet(), **(defaults | options))


def ready(method: PixPro, momentum: float = 0.9) -> PixPro:
    prepare(method, LARS, 0.1, 3, 2, teacher_momentum=Constant(momentum))
    method.begin_step(0)
    return method


def unit_maps(B: int, seed: int = 0, C: int = 6) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(B, C, *SIZE, generator=g, dtype=torch.float64), dim=1)


def two_places(B: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return boxes_of(B, g).double(), boxes_of(B, g).double()


def pairs(boxes_q: Tensor, boxes_k: Tensor, pos_ratio: float = 0.7) -> Tensor:
    return positives(corners(boxes_q), corners(boxes_k), SIZE, pos_ratio=pos_ratio)


def mirrored(boxes: Tensor, axis: str) -> Tensor:
    boxes, column = boxes.clone(), 6 if axis == "h" else 7
    boxes[:, column] = 1 - boxes[:, column]
    return boxes


# --- pairs ---------------------------------------------------------------------------------------------------------


def test_pairs_are_symmetric() -> None:
    a, b = two_places(6)
    assert pairs(a, b).any()
    assert torch.equal(pairs(a, b), pairs(b, a).transpose(1, 2))


@pytest.mark.parametrize("axis", ["h", "v"])
def test_a_mirrored_view_is_the_mirrored_map(axis: str) -> None:
    a, b = two_places(6)
    q, k, direction = unit_maps(6), unit_maps(6, 1), 3 if axis == "h" else 2
    A = pairs(a, b)
    mirrored_A = pairs(mirrored(a, axis), b)
    as_map = A.unflatten(1, SIZE)
    assert torch.equal(mirrored_A.unflatten(1, SIZE), as_map.flip(direction - 1))
    assert not torch.equal(mirrored_A, A)
    torch.testing.assert_close(pixel_consistency(q.flip(direction), k, mirrored_A), pixel_consistency(q, k, A))
    # both mirrored: the same pairs in mirrored maps
    both = pairs(mirrored(a, axis), mirrored(b, axis))
    flipped = pixel_consistency(q.flip(direction), k.flip(direction), both)
    torch.testing.assert_close(flipped, pixel_consistency(q, k, A))


def test_distances_by_hand() -> None:
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]], dtype=torch.float64)
    left = torch.tensor([[0.0, 0.0, 0.5, 1.0]], dtype=torch.float64)
    distances, diagonal = pixel_distances(whole, left, (1, 2))
    # pixel centres: whole at x = 1/4, 3/4; left half at 1/8, 3/8; all at y = 1/2
    assert float(diagonal) == pytest.approx(math.hypot(0.5, 1))
    expected = torch.tensor([[[1 / 8, 1 / 8], [5 / 8, 3 / 8]]], dtype=torch.float64) / math.hypot(0.5, 1)
    torch.testing.assert_close(distances, expected)


def test_the_place_in_the_image_does_not_matter() -> None:
    a, b = two_places(6)
    moved = torch.tensor([3.0, -2.0, 0, 0, 0, 0, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(
        pixel_distances(corners(a + moved), corners(b + moved), SIZE)[0],
        pixel_distances(corners(a), corners(b), SIZE)[0],
    )


def test_pixels_match_themselves_and_more_with_a_larger_ratio() -> None:
    a, b = two_places(6)
    same = pairs(a, a)
    assert same.diagonal(dim1=1, dim2=2).all()
    few, many = pairs(a, b, 0.3), pairs(a, b, 1.5)
    assert (many | ~few).all()
    assert many.sum() > few.sum()


def test_half_precision_corners_are_compared_in_float32() -> None:
    a, b = two_places(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert pixel_distances(corners(a.float()), corners(b.float()), SIZE)[0].dtype == torch.float32


# --- propagation ---------------------------------------------------------------------------------------------------


def propagate(x: Tensor, **options: Any) -> Tensor:
    torch.manual_seed(0)
    defaults: dict[str, Any] = {"exponent": 2.0, "clamp": 0.0, "layers": 0}
    return PixelPropagation(x.shape[1], **(defaults | options)).double()(x)


@pytest.mark.parametrize("layers", [0, 1])
def test_propagation_follows_the_order_of_pixels(layers: int) -> None:
    x, order = unit_maps(2), torch.randperm(20, generator=torch.Generator().manual_seed(0))
    shuffled = x.flatten(2)[..., order].unflatten(2, SIZE)
    expected = propagate(x, layers=layers).flatten(2)[..., order]
    torch.testing.assert_close(propagate(shuffled, layers=layers).flatten(2), expected)


def test_propagation_ignores_lengths_and_gathers_what_is_alike() -> None:
    x = unit_maps(2)
    lengths = torch.rand(2, 1, *SIZE, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    torch.testing.assert_close(propagate(x * lengths), propagate(x))
    # a high power leaves each pixel to itself, no power sums all of them
    torch.testing.assert_close(propagate(x, exponent=2000.0), x, atol=1e-6, rtol=0)
    everyone = x.sum((2, 3), keepdim=True).expand_as(x)
    torch.testing.assert_close(propagate(x, exponent=0.0, clamp=0.1), everyone, atol=1e-4, rtol=0)
    # opposite pixels do not mix
    two = torch.stack([torch.ones(1, 3, 1), -torch.ones(1, 3, 1)], dim=-1).double()
    torch.testing.assert_close(propagate(two), F.normalize(two, dim=1))


def test_values_may_keep_their_length() -> None:
    x = 3 * unit_maps(1)
    torch.testing.assert_close(propagate(x, normalise_value=False), 3 * propagate(x))


def test_propagation_is_float32_under_autocast() -> None:
    module = PixelPropagation(6, exponent=2.0, clamp=0.0, layers=0)
    x = unit_maps(2).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(x)
    torch.testing.assert_close(y, module(x), atol=0, rtol=0)


@pytest.mark.parametrize("wrong", [{"layers": 3}, {"clamp": -1.0, "exponent": 1.5}])
def test_propagation_refuses(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="PixPro"):
        propagate(unit_maps(1), **wrong)


# --- losses --------------------------------------------------------------------------------------------------------


def test_consistency_is_the_equation() -> None:
    q, k, A = unit_maps(4), unit_maps(4, 1), pairs(*two_places(4))
    total = 0.0
    for n in range(4):
        found = [
            float(q[n].flatten(1)[:, i] @ k[n].flatten(1)[:, j]) for i in range(20) for j in range(20) if A[n, i, j]
        ]
        total += sum(found) / (len(found) + 1e-6)
    assert float(pixel_consistency(q, k, A)) == pytest.approx(-2 * total / 4, rel=1e-12)
    perfect = F.normalize(torch.ones(4, 6, *SIZE, dtype=torch.float64), dim=1)
    assert float(pixel_consistency(perfect, perfect, A)) == pytest.approx(-2, abs=1e-5)


@pytest.mark.parametrize("loss", [pixel_consistency, partial(pixel_contrast, temperature=0.3)])
def test_images_without_pairs(loss: Any) -> None:
    q, k, A = unit_maps(3).requires_grad_(), unit_maps(3, 1), pairs(*two_places(3))
    A[1] = False
    value = loss(q, k, A)
    value.backward()
    assert q.grad is not None
    assert not q.grad[1].any()
    assert q.grad[[0, 2]].any()
    kept = loss(q[[0, 2]], k[[0, 2]], A[[0, 2]])
    torch.testing.assert_close(value, kept * 2 / 3)
    torch.testing.assert_close(loss(q, k, A, skip_empty=True), kept)
    nothing = loss(q, k, torch.zeros_like(A), skip_empty=True)
    assert nothing.item() == 0


@pytest.mark.parametrize("loss", [pixel_consistency, partial(pixel_contrast, temperature=0.3)])
def test_the_order_of_images_does_not_matter(loss: Any) -> None:
    q, k, A, order = unit_maps(4), unit_maps(4, 1), pairs(*two_places(4)), [2, 0, 3, 1]
    torch.testing.assert_close(loss(q[order], k[order], A[order]), loss(q, k, A))


def test_contrast_is_the_equation() -> None:
    q, k, A, t = unit_maps(2), unit_maps(2, 1), pairs(*two_places(2)), 0.3
    means = []
    for n in range(2):
        e = (q[n].flatten(1).T @ k[n].flatten(1) / t).exp()
        rows = [-math.log(float(e[i][A[n, i]].sum() / e[i].sum())) for i in range(20) if A[n, i].any()]
        means.append(sum(rows) / len(rows))
    assert float(pixel_contrast(q, k, A, temperature=t)) == pytest.approx(sum(means) / 2, rel=1e-10)


def test_contrast_in_cases_with_an_answer() -> None:
    same = F.normalize(torch.ones(1, 6, *SIZE, dtype=torch.float64), dim=1)
    A = torch.zeros(1, 20, 20, dtype=torch.bool)
    A[:, :7, :5] = True
    assert float(pixel_contrast(same, same, A, temperature=0.3)) == pytest.approx(math.log(20 / 5))
    assert float(pixel_contrast(unit_maps(1), unit_maps(1, 1), torch.ones_like(A), temperature=0.3)) == 0
    cold = unit_maps(1).float().requires_grad_()
    value = pixel_contrast(cold, cold.detach(), torch.eye(20, dtype=torch.bool)[None], temperature=1e-3)
    value.backward()
    assert float(value.detach()) == pytest.approx(0, abs=1e-6), "every pixel is most like itself"
    assert cold.grad is not None
    assert cold.grad.isfinite().all()


# --- method --------------------------------------------------------------------------------------------------------


def test_order_of_views_does_not_matter() -> None:
    torch.manual_seed(0)
    method = ready(pixpro(instance_weight=1.0)).eval()
    (batch,) = batches([16, 16], 4, 1)
    assert batch.boxes is not None
    swapped = Batch(batch.views[::-1], batch.indices, boxes=batch.boxes[::-1])
    torch.testing.assert_close(method.training_step(swapped, 0)["loss"], method.training_step(batch, 0)["loss"])


def test_mirroring_views_and_boxes_leaves_the_loss_of_a_mirror_symmetric_network() -> None:
    torch.manual_seed(0)
    method = ready(pixpro()).eval()
    for module in method.modules():  # symmetric kernels, and stride 1, so that maps of mirrored images are mirrored
        if isinstance(module, torch.nn.Conv2d):
            module.stride = (1, 1)
            with torch.no_grad():
                module.weight.add_(module.weight.flip(3)).div_(2)
    (batch,) = batches([8, 8], 4, 1)
    assert batch.boxes is not None
    expected = method.training_step(batch, 0)["loss"]
    other = Batch([batch.views[0].flip(3), batch.views[1]], batch.indices, boxes=list(batch.boxes))
    assert other.boxes is not None
    other.boxes[0] = mirrored(batch.boxes[0], "h")
    torch.testing.assert_close(method.training_step(other, 0)["loss"], expected)
    other.boxes[0] = batch.boxes[0]
    assert not torch.allclose(method.training_step(other, 0)["loss"], expected, rtol=1e-3)


@pytest.mark.parametrize("options", [{}, {"instance_weight": 0.5}, {"loss": "pixcontrast"}, {"transform_layers": 2}])
def test_every_option_reaches_every_trained_weight(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    method = ready(pixpro(**options))
    (batch,) = batches([16, 16], 4, 1)
    method.training_step(batch, 0)["loss"].backward()
    without = [name for name, p in method.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    assert all(p.grad is None and not p.requires_grad for p in method.target_backbone.parameters())


def test_target_moves_once_a_step_and_gathers_its_own_statistics() -> None:
    torch.manual_seed(0)
    method = pixpro()
    prepare(method, LARS, 0.1, 3, 2, teacher_momentum=Constant(0.75))
    (batch,) = batches([16, 16], 4, 1)
    with torch.no_grad():
        for p in method.backbone.parameters():
            p.add_(1)
    old = [p.clone() for p in method.target_backbone.parameters()]
    for _ in range(2):  # as many batches as are accumulated for one step
        method.begin_step(0)
        method.training_step(batch, 0)
    for before, after, online in zip(
        old, method.target_backbone.parameters(), method.backbone.parameters(), strict=True
    ):
        torch.testing.assert_close(after, 0.75 * before + 0.25 * online)
    method.end_step()
    method.begin_step(1)
    method.training_step(batch, 0)
    weight = method.target_backbone.module.stages[0].weight  # type: ignore[index, union-attr]
    torch.testing.assert_close(weight, old[0] + (1 - 0.75**2))
    online_norm, target_norm = method.backbone.stages[1], method.target_backbone.module.stages[1]  # type: ignore[index]
    assert int(target_norm.num_batches_tracked) == 6, "two views in each of three batches"
    assert not torch.allclose(target_norm.running_mean, online_norm.running_mean)


def test_monitors_tell_collapse_from_health() -> None:
    method = pixpro()
    A = torch.eye(20, dtype=torch.bool).expand(3, 20, 20).clone()
    A[2] = False
    x = unit_maps(3).float()
    found = method.monitors(x, x, x, A)
    assert float(found["projection_std"]) > 0.9
    assert float(found["positives"]) == pytest.approx(40 / 3)
    assert float(found["empty"]) == pytest.approx(1 / 3)
    assert float(found["correspondence"]) == 1
    same = torch.ones(3, 6, *SIZE)
    assert float(method.monitors(same, same, same, A)["projection_std"]) < 1e-6


def test_refuses_what_it_cannot_learn_from() -> None:
    (batch,) = batches([16, 16], 4, 1)
    with pytest.raises(UserError, match="places of the views"):
        ready(pixpro()).training_step(Batch(batch.views, batch.indices), 0)
    with pytest.raises(UserError, match="'teacher_momentum', and the one chosen has none"):
        prepare(pixpro(), LARS, 0.1, 3, 2)
    (tiny,) = batches([4, 4], 4, 1)
    with pytest.raises(UserError, match="1 x 1 and 1 x 1"):
        ready(pixpro()).training_step(tiny, 0)
    (uneven,) = batches([16, 8], 4, 1)
    with pytest.raises(UserError, match="4 x 4 and 2 x 2"):
        ready(pixpro()).training_step(uneven, 0)
    with pytest.raises(UserError, match="Did you mean 'pixcontrast'"):
        pixpro(loss="pixcontrst")


def test_training_aligns_pairs() -> None:
    torch.manual_seed(0)
    method = prepare(pixpro(), LARS, 4.0, 2, 15, teacher_momentum=Cosine(0.9, 1.0))
    found = train(method, method.configure_optimizers(), batches([16, 16], 8, 2), range(30))
    start, end = (float(torch.stack([r["loss"] for r in found[s]]).mean()) for s in (slice(2), slice(-2, None)))
    assert end < start - 0.3
    assert end >= -4


@pytest.mark.parametrize("options", [{"transform_layers": 2}, {"instance_weight": 1.0}])
def test_resumed_run_equals_an_uninterrupted_one(options: dict[str, Any]) -> None:
    def make() -> Any:
        return prepare(pixpro(**options), LARS, 1.0, 3, 3, teacher_momentum=Cosine(0.9, 1.0))

    assert_resumes(make, batches([16, 16], 4, 3), 4, 9)


def test_a_norm_after_pooling_waits_for_no_gradient() -> None:
    """PixPro reads the map; data-parallel training would wait for the gradient of what comes after it."""
    method = pixpro(backbone=create("convnext_atto"))
    assert not method.backbone.head.norm.weight.requires_grad
    features = method.dense(torch.randn(2, 3, 64, 64))
    features.sum().backward()
    assert all(p.grad is not None for p in method.backbone.parameters() if p.requires_grad)
