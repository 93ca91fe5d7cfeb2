"""What SwAV's codes, loss, queue and freezing have to do whatever the numbers are."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from selfsight.checkpoints.swav import backbone_weights, from_official
from selfsight.contracts import Batch
from selfsight.errors import UserError
from selfsight.losses.deepclusterv2 import UNASSIGNED, cluster_prediction, spherical_kmeans
from selfsight.losses.swav import sinkhorn, swapped_prediction
from selfsight.methods.deepclusterv2 import DeepClusterV2
from selfsight.methods.swav import SwAV
from selfsight.nn.multicrop import multi_crop
from selfsight.optim import lars

from ..small import SmallNet, assert_resumes, batches, prepare, train

LARC = partial(lars.LARC, momentum=0.9, weight_decay=1e-4)


def cosines(B: int, K: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    z, c = torch.randn(B, 6, generator=g, dtype=torch.float64), torch.randn(K, 6, generator=g, dtype=torch.float64)
    return nn.functional.normalize(z, dim=1) @ nn.functional.normalize(c, dim=1).T


def swav(**options: Any) -> SwAV:
    defaults: dict[str, Any] = {
        "hidden_dim": 8, "dim": 5, "num_prototypes": 7, "temperature": 0.1, "epsilon": 0.05, "sinkhorn_iterations": 3,
        "hard_codes": False, "crops_for_assign": [0, 1], "freeze_prototypes_steps": 0, "queue_length": 0,
        "queue_start_epoch": 0, "batch_size": 4,
    }  # fmt: skip
    return SwAV(options.pop("backbone", None) or SmallNet(), **(defaults | options))


# --- codes ---------------------------------------------------------------------------------------------------------


def test_codes_share_the_samples() -> None:
    codes = sinkhorn(cosines(30, 6), epsilon=0.05, iterations=3)
    torch.testing.assert_close(codes.sum(1), torch.ones(30, dtype=torch.float64))
    converged = sinkhorn(cosines(30, 6), epsilon=0.05, iterations=300)
    torch.testing.assert_close(converged.sum(0), torch.full((6,), 5.0, dtype=torch.float64))


def test_codes_follow_samples_and_prototypes() -> None:
    scores, g = cosines(12, 9), torch.Generator().manual_seed(1)
    rows, columns = torch.randperm(12, generator=g), torch.randperm(9, generator=g)
    codes = sinkhorn(scores, epsilon=0.05, iterations=3)
    torch.testing.assert_close(sinkhorn(scores[rows][:, columns], epsilon=0.05, iterations=3), codes[rows][:, columns])
    # only differences count, as exp(constant) cancels
    torch.testing.assert_close(sinkhorn(scores + 3, epsilon=0.05, iterations=3), codes)


def test_codes_at_extreme_temperatures() -> None:
    scores = cosines(12, 9)
    cold = sinkhorn(scores.float(), epsilon=1e-4, iterations=3)
    exact = sinkhorn(scores.float().double(), epsilon=1e-4, iterations=3)
    torch.testing.assert_close(cold.double(), exact, atol=5e-3, rtol=0)
    assert (cold.amax(1) > 0.99).sum() > 8, "nearly one-hot"
    hot = sinkhorn(scores, epsilon=1e5, iterations=3)
    torch.testing.assert_close(hot, torch.full_like(hot, 1 / 9), atol=1e-5, rtol=0)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_codes_of_half_precision_scores_are_computed_in_float32(half: torch.dtype) -> None:
    scores = cosines(12, 9).to(half)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        codes = sinkhorn(scores, epsilon=0.008, iterations=3)
    assert codes.dtype == torch.float32
    torch.testing.assert_close(codes, sinkhorn(scores.float(), epsilon=0.008, iterations=3), atol=0, rtol=0)


def test_one_image_gets_the_uniform_code() -> None:
    codes = sinkhorn(cosines(1, 5), epsilon=0.05, iterations=3)
    torch.testing.assert_close(codes, torch.full_like(codes, 0.2))
    same = sinkhorn(cosines(1, 5).expand(8, 5), epsilon=0.05, iterations=3)
    torch.testing.assert_close(same, torch.full_like(same, 0.2))


@pytest.mark.parametrize("wrong", [{"iterations": 0}, {"epsilon": 0.0}])
def test_sinkhorn_refuses(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match="at least 1 iteration"):
        sinkhorn(cosines(4, 3), **{"epsilon": 0.05, "iterations": 3, **wrong})  # type: ignore[arg-type]


# --- loss ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 4, 5), (4,)])
def test_sinkhorn_takes_one_row_a_sample(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"it takes \[B, K\]"):
        sinkhorn(torch.zeros(shape), epsilon=0.05, iterations=3)


def test_a_single_crop_has_nothing_to_predict() -> None:
    with pytest.raises(UserError, match="one crop"):
        swapped_prediction(torch.zeros(1, 4, 5), torch.zeros(1, 4, 5), (0,), temperature=0.1)


def test_loss_is_the_equation() -> None:
    M, B, K, A, tau = 5, 4, 6, [1, 3], 0.2
    scores, codes = cosines(M * B, K).view(M, B, K), sinkhorn(cosines(2 * B, K, 1), epsilon=0.1, iterations=3)
    codes = codes.view(2, B, K)
    expected = 0.0
    for i, a in enumerate(A):
        for v in range(M):
            if v != a:
                for b in range(B):
                    p = (scores[v, b] / tau).softmax(0)
                    expected -= float((codes[i, b] * p.log()).sum()) / B / (M - 1) / len(A)
    assert float(swapped_prediction(scores, codes, A, temperature=tau)) == pytest.approx(expected, rel=1e-12)


def test_no_crop_predicts_its_own_code_and_codes_get_no_gradient() -> None:
    scores = cosines(8, 5).view(2, 4, 5).requires_grad_()
    codes = sinkhorn(cosines(4, 5, 1), epsilon=0.05, iterations=3)[None].requires_grad_()
    swapped_prediction(scores, codes, [0], temperature=0.1).backward()
    assert scores.grad is not None
    assert not scores.grad[0].any()
    assert scores.grad[1].any()
    assert codes.grad is None


def test_uniform_predictions_cost_ln_k() -> None:
    codes = sinkhorn(cosines(8, 5), epsilon=0.05, iterations=3).view(2, 4, 5)
    loss = swapped_prediction(torch.zeros(3, 4, 5, dtype=torch.float64), codes, [0, 1], temperature=0.1)
    assert float(loss) == pytest.approx(math.log(5))
    assert swav(num_prototypes=5).chance_loss() == pytest.approx(math.log(5))


def test_order_of_images_and_of_global_crops_does_not_matter() -> None:
    scores = cosines(3 * 6, 5).view(3, 6, 5)

    def loss(s: Tensor) -> Tensor:
        codes = torch.stack([sinkhorn(s[a], epsilon=0.05, iterations=3) for a in (0, 1)])
        return swapped_prediction(s, codes, [0, 1], temperature=0.1)

    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loss(scores[:, order]), loss(scores))
    torch.testing.assert_close(loss(scores[[1, 0, 2]]), loss(scores))


# --- network -------------------------------------------------------------------------------------------------------


def test_one_forward_for_each_run_of_equal_sizes() -> None:
    net = SmallNet().train()
    (batch,) = batches([16, 16, 8, 8, 8, 16], 2, 1)
    features = multi_crop(net, batch.views)
    assert features.shape == (12, 8)
    assert int(net.stages[1].num_batches_tracked) == 3
    net.eval()
    one_by_one = torch.cat([net(view) for view in batch.views])
    torch.testing.assert_close(multi_crop(net, batch.views), one_by_one)


def test_scores_are_cosines_whatever_the_prototypes_lengths() -> None:
    method, (batch,) = swav(), batches([16, 16], 4, 1)
    torch.manual_seed(0)
    method.eval()
    loss = method.training_step(batch, 0)["loss"]
    with torch.no_grad():
        method.prototypes.weight.mul_(torch.rand(7, 1) + 1)
    torch.testing.assert_close(method.training_step(batch, 0)["loss"], loss)


@pytest.mark.parametrize("crops", [[0, 2], [], [1, 1], [-1]])
def test_refuses_crops_that_are_not_there(crops: list[int]) -> None:
    (batch,) = batches([16, 16], 4, 1)
    with pytest.raises(UserError, match="crops_for_assign"):
        swav(crops_for_assign=crops).training_step(batch, 0)


def test_refuses_one_prototype_and_a_queue_shorter_than_a_batch() -> None:
    with pytest.raises(UserError, match="num_prototypes of SwAV is 1; a whole number of at least 2 was expected"):
        swav(num_prototypes=1)
    with pytest.raises(UserError, match=r"queue of 8 keeps whole batches; say how large they are: batch_size="):
        swav(queue_length=8, batch_size=None)
    with pytest.raises(UserError, match="less than one batch"):
        swav(queue_length=3, batch_size=4)


# --- freezing and queue ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [LARC, partial(torch.optim.AdamW, weight_decay=0.1)])
def test_prototypes_stay_while_frozen_and_move_afterwards(optimizer: Any) -> None:
    torch.manual_seed(0)
    method = prepare(swav(freeze_prototypes_steps=2), optimizer, 0.1, 3, 1)
    method.prototypes.normalise()
    start = method.prototypes.weight.detach().clone()
    data, opt = batches([16, 16], 4, 3), method.configure_optimizers()
    train(method, opt, data, range(2))
    torch.testing.assert_close(method.prototypes.weight, start)
    assert method.prototypes.weight not in opt.state or not opt.state[method.prototypes.weight]
    train(method, opt, data, range(2, 3))
    assert (method.prototypes.weight - start).abs().max() > 1e-5


def test_queue_waits_for_its_epoch_fills_and_then_takes_part() -> None:
    torch.manual_seed(0)
    method = prepare(swav(queue_length=9, queue_start_epoch=1), LARC, 0.1, 2, 4)
    assert len(method.queues[0]) == 8, "cut to whole batches"
    data = batches([16, 16], 4, 2)
    used = [float(r["queue_used"]) for r in train(method, method.configure_optimizers(), data, range(6))]
    assert used == [0, 0, 0, 0, 1, 1]


def test_codes_with_a_full_queue_are_those_of_one_large_batch() -> None:
    torch.manual_seed(0)
    method = swav(queue_length=8, num_prototypes=5).double()
    method.prototypes.normalise()
    z = nn.functional.normalize(torch.randn(3, 2, 4, 5, dtype=torch.float64), dim=-1)  # step, crop, image, D
    with torch.no_grad():
        for step in range(3):
            codes = method.codes(z[step], method.prototypes(z[step]))
            method.commit()
        for a in (0, 1):
            everyone = method.prototypes(z[:, a].flatten(0, 1))
            torch.testing.assert_close(codes[a], sinkhorn(everyone, epsilon=0.05, iterations=3)[8:])


def test_hard_codes_are_the_nearest_one_hot() -> None:
    torch.manual_seed(0)
    soft, hard = swav(), swav(hard_codes=True)
    z = nn.functional.normalize(torch.randn(2, 6, 5), dim=-1)
    scores = z @ torch.randn(5, 7)
    q = soft.codes(z, scores)
    one_hot = hard.codes(z, scores)
    assert torch.equal(one_hot.argmax(-1), q.argmax(-1))
    assert torch.equal(one_hot.sum(-1), torch.ones(2, 6))
    assert one_hot.dtype == q.dtype


def test_monitors_tell_collapse_from_health() -> None:
    method = swav(num_prototypes=4)
    apart = torch.eye(4).repeat(2, 2, 1) * 0.9  # 8 images, every prototype nearest to two
    same = torch.tensor([0.9, 0.1, 0.1, 0.1]).expand(2, 8, 4)
    codes = torch.stack([sinkhorn(s, epsilon=0.05, iterations=3) for s in apart])
    found = method.monitors(apart, codes)
    assert float(found["live_prototypes"]) == 1
    assert float(found["code_entropy"]) == pytest.approx(1, abs=1e-5)
    assert float(found["code_softness"]) < 0.01
    codes = torch.stack([sinkhorn(s, epsilon=0.05, iterations=3) for s in same])
    for _ in range(1000):
        found = method.monitors(same, codes)
        method.commit()
    assert float(found["live_prototypes"]) == 0.25
    assert float(found["code_entropy"]) < 0.01
    assert float(found["code_softness"]) == pytest.approx(1)


def test_resumed_run_equals_an_uninterrupted_one() -> None:
    data = batches([16, 16, 8], 4, 3)
    for stop in (4, 5, 8):  # while the queue fills, when it is used, in the middle of an epoch
        assert_resumes(
            lambda: prepare(swav(queue_length=8, queue_start_epoch=1, freeze_prototypes_steps=3), LARC, 0.5, 3, 4),
            data,
            stop,
            10,
        )


# --- DeepCluster-v2 ------------------------------------------------------------------------------------------------


def deepcluster(**options: Any) -> DeepClusterV2:
    defaults: dict[str, Any] = {
        "hidden_dim": 8, "dim": 5, "num_prototypes": [3, 4, 3], "temperature": 0.1, "crops_for_assign": [0, 1],
        "kmeans_iterations": 5, "num_images": 12,
    }  # fmt: skip
    return DeepClusterV2(SmallNet(), **(defaults | options))


def test_kmeans_finds_separate_groups_and_keeps_empty_ones() -> None:
    g = torch.Generator().manual_seed(0)
    centres = torch.eye(3, dtype=torch.float64)
    truth = torch.arange(30) % 3
    x = nn.functional.normalize(centres[truth] + 0.1 * torch.randn(30, 3, generator=g, dtype=torch.float64), dim=1)
    lonely = -nn.functional.normalize(torch.ones(1, 3, dtype=torch.float64), dim=1)
    centroids, nearest = spherical_kmeans(x, torch.cat([x[:3], lonely]), 10)
    assert torch.equal(nearest, truth)
    assert torch.equal(centroids[3:], lonely)
    torch.testing.assert_close(centroids.norm(dim=1), torch.ones(4, dtype=torch.float64))


def test_a_cluster_of_opposite_directions_keeps_its_centroid() -> None:
    x = torch.tensor([[0.6, 0.8], [0.6, -0.8], [-0.6, 0.8], [-0.6, -0.8]])
    everyone = torch.tensor([[1.0, 0.0]])
    found, _ = spherical_kmeans(x, everyone, 3)
    assert found.tolist() == [[1.0, 0.0]]


def test_unassigned_images_do_not_count() -> None:
    scores = [cosines(6, 4).requires_grad_()]
    clusters = torch.tensor([[1, UNASSIGNED, 2]])
    loss = cluster_prediction(scores, clusters, temperature=0.1)
    keep = [0, 2, 3, 5]
    expected = nn.functional.cross_entropy(scores[0][keep] / 0.1, torch.tensor([1, 2, 1, 2]))
    torch.testing.assert_close(loss, expected)
    nothing = cluster_prediction(scores, torch.full((1, 3), UNASSIGNED), temperature=0.1)
    nothing.backward()
    assert nothing.item() == 0
    assert scores[0].grad is not None
    assert not scores[0].grad.any()


def test_first_epoch_looks_then_clusters_are_learnt() -> None:
    torch.manual_seed(0)
    method = prepare(deepcluster(), LARC, 0.5, 3, 12)
    start = [p.detach().clone() for p in method.parameters()]
    data, optimizer = batches([16, 16, 8], 4, 3), method.configure_optimizers()
    first = train(method, optimizer, data, range(3))
    assert all(float(r["loss"]) == 0 for r in first)
    assert all(torch.equal(a, b) for a, b in zip(start, method.parameters(), strict=True))
    assert method.known.all()
    losses = [float(r["loss"]) for r in train(method, optimizer, data, range(3, 36))]
    assert (method.clusters >= 0).all()
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


def test_deepcluster_resumes() -> None:
    data = batches([16, 16, 8], 4, 3)
    for stop in (3, 4):  # at the start of an epoch, before images are clustered, and within one
        assert_resumes(lambda: prepare(deepcluster(), LARC, 0.5, 3, 3), data, stop, 8)


def test_deepcluster_refuses_more_clusters_than_images() -> None:
    with pytest.raises(UserError, match="cannot be more than images"):
        deepcluster(num_images=3)
    method = prepare(deepcluster(), LARC, 0.5, 1, 2)
    (batch,) = batches([16, 16], 2, 1)
    method.begin_step(0)
    method.training_step(Batch(batch.views, batch.indices), 0)
    method.end_step()
    with pytest.raises(UserError, match="among 2 images"):
        method.begin_step(1)


def test_released_files_with_one_and_with_several_prototype_layers() -> None:
    network = {"module.conv1.weight": torch.ones(1), "module.projection_head.0.weight": torch.ones(1)}
    one = from_official({**network, "module.prototypes.weight": torch.ones(2, 4)})
    assert one.keys() == {"backbone.conv1.weight", "projector.0.weight", "prototypes.weight"}
    several = {**network, "module.prototypes.prototypes0.weight": torch.ones(2, 4)}
    assert backbone_weights(several).keys() == {"conv1.weight"}
    with pytest.raises(UserError, match="no single layer of prototypes"):
        from_official(several)
    with pytest.raises(UserError, match="no SwAV checkpoint"):
        backbone_weights({"conv1.weight": torch.ones(1)})
