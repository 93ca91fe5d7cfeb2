"""What DINO's targets, loss, head and steps have to do whatever the numbers are."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfsight.backbones.registry import create
from selfsight.contracts import Batch
from selfsight.errors import UserError
from selfsight.losses.dino import centred_softmax, dino, next_centre
from selfsight.methods.dino import DINO
from selfsight.nn.dino_head import DINOHead
from selfsight.nn.positions import resize_positions
from selfsight.nn.vit import class_attention, last_attention, last_tokens, mass_mask
from selfsight.optim.clipping import clip_each
from selfsight.optim.schedule import Constant, Cosine
from selfsight.reporting.galleries import galleries

from ..small import SmallNet, assert_resumes, batches, prepare, train

ADAMW = partial(torch.optim.AdamW, weight_decay=0.1)
SIZES: dict[str, Any] = {"out_dim": 7, "hidden_dim": 9, "bottleneck_dim": 4}


def vit(**options: Any) -> nn.Module:
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 3}
    return create("vit_tiny_dino", **(sizes | options))


def prepared(backbone: nn.Module | None = None, **options: Any) -> DINO:
    method = DINO(backbone or SmallNet(), **(SIZES | options))
    prepare(method, ADAMW, 0.01, 3, 2, teacher_momentum=Cosine(0.9, 1.0), teacher_temperature=Constant(0.05))
    return method


def scores(M: int = 3, B: int = 4, K: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(M, B, K, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- targets and loss ------------------------------------------------------------------------------------------------


def test_loss_is_the_equation_and_no_crop_predicts_itself() -> None:
    s, t, c = scores(4).requires_grad_(), scores(2, seed=1), scores(1, 1, seed=2)[0, 0]
    T = centred_softmax(t, c, temperature=0.3)
    expected = 0.0
    for a in range(2):
        for v in range(4):
            if v != a:
                for b in range(4):
                    p = F.softmax((t[a, b] - c) / 0.3, dim=0)
                    expected -= float((p * F.log_softmax(s[v, b].detach() / 0.2, dim=0)).sum()) / 4 / 3 / 2
    loss = dino(s, T, temperature=0.2)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    (own,) = torch.autograd.grad(dino(s, T[:1], temperature=0.2), s)
    assert not own[0].any()
    assert own[1:].any()


def test_uniform_predictions_cost_ln_k_and_both_collapses_are_told_apart() -> None:
    method = prepared()
    assert method.chance_loss() == pytest.approx(math.log(7))
    T = centred_softmax(scores(2, K=7), torch.zeros(7).double(), temperature=0.1)
    uniform = dino(torch.zeros(3, 4, 7, dtype=torch.float64), T, temperature=0.1)
    assert float(uniform) == pytest.approx(math.log(7))
    flat = torch.full((2, 4, 7), 1 / 7)
    assert float(method.monitors(uniform, flat)["teacher_entropy"]) == pytest.approx(1)
    sharp = F.one_hot(torch.zeros(2, 4, dtype=torch.int64), 7).float()
    assert float(method.monitors(uniform, sharp)["teacher_entropy"]) == pytest.approx(0, abs=1e-6)


def test_the_centre_takes_away_what_all_images_share() -> None:
    t, shared = scores(2), torch.tensor([5.0, 0, 0, 0, 0]).double()
    c = torch.zeros(5, dtype=torch.float64)
    for _ in range(200):
        c = next_centre(c, t + shared, momentum=0.9)
    torch.testing.assert_close(c, (t + shared).mean((0, 1)))
    centred = centred_softmax(t + shared, c, temperature=1.0)
    torch.testing.assert_close(centred, centred_softmax(t, t.mean((0, 1)), temperature=1.0))
    with pytest.raises(UserError, match="temperature"):
        centred_softmax(t, c, temperature=0.0)


def test_order_of_images_of_small_and_of_large_crops_does_not_matter() -> None:
    s, t, c = scores(4), scores(2, seed=1), torch.zeros(5).double()

    def loss(s: Tensor, t: Tensor) -> Tensor:
        return dino(s, centred_softmax(t, c, temperature=0.1), temperature=0.1)

    torch.testing.assert_close(loss(s[:, [2, 0, 3, 1]], t[:, [2, 0, 3, 1]]), loss(s, t))
    torch.testing.assert_close(loss(s[[1, 0, 3, 2]], t[[1, 0]]), loss(s, t))


def test_extreme_temperatures() -> None:
    s, t, c = scores(3).float(), scores(2, seed=1).float(), torch.zeros(5)
    cold = dino(s, centred_softmax(t, c, temperature=1e-4), temperature=1e-4)
    assert torch.isfinite(cold)
    hot = centred_softmax(t, c, temperature=1e6)
    torch.testing.assert_close(hot, torch.full_like(hot, 0.2), atol=1e-5, rtol=0)
    half = dino(s.bfloat16(), centred_softmax(t.bfloat16(), c, temperature=0.04), temperature=0.1)
    assert half.dtype == torch.float32


# --- head ------------------------------------------------------------------------------------------------------------


def test_scores_are_cosines_unless_lengths_are_learned() -> None:
    torch.manual_seed(0)
    head, free = DINOHead(6, 9, hidden_dim=8, bottleneck_dim=4), DINOHead(6, 9, norm_last_layer=False)
    h = 10 * torch.randn(50, 6)
    assert head(h).abs().max() <= 1 + 1e-5
    with torch.no_grad():
        before = head(h)
        head.last_layer.weight_v.mul_(torch.rand(9, 1) + 1)
    torch.testing.assert_close(head(h), before)
    assert not head.last_layer.weight_g.requires_grad
    assert free.last_layer.weight_g.requires_grad
    with pytest.raises(UserError, match="at least"):
        DINOHead(6, 1)


def test_the_last_layer_is_float32_under_autocast() -> None:
    head = DINOHead(6, 9, hidden_dim=8, bottleneck_dim=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head(torch.randn(3, 6)).dtype == torch.float32


# --- steps -----------------------------------------------------------------------------------------------------------


def test_one_view_and_too_many_global_ones_are_refused() -> None:
    method, (batch,) = prepared(), batches([16, 16], 4, 1)
    method.begin_step(0)
    with pytest.raises(UserError, match="two views or more"):
        method.training_step(Batch(batch.views[:1], batch.indices), 0)
    with pytest.raises(UserError, match="3 are global"):
        prepared(n_global=3).training_step(batch, 0)


def test_the_teacher_is_what_is_measured_and_carried_away() -> None:
    method = prepared()
    assert method.measured is method.teacher.get_submodule("module.backbone")
    assert not [p for p in method.measured.parameters() if p.requires_grad]


def test_the_last_layer_rests_and_then_moves() -> None:
    torch.manual_seed(0)
    method = prepared(freeze_last_layer_epochs=1)
    start, data = method.head.last_layer.weight_v.detach().clone(), batches([16, 16], 4, 3)
    optimizer = method.configure_optimizers()
    train(method, optimizer, data, range(3))
    assert torch.equal(method.head.last_layer.weight_v, start), "neither decay nor momentum moves it"
    assert method.head.mlp[0].weight in optimizer.state
    train(method, optimizer, data, range(3, 4))
    assert (method.head.last_layer.weight_v - start).abs().max() > 1e-5


def test_gradients_are_cut_tensor_by_tensor() -> None:
    small, large, none = (nn.Parameter(torch.ones(3)) for _ in range(3))
    small.grad, large.grad = torch.full((3,), 0.1), torch.full((3,), 100.0)
    lengths = clip_each([small, large, none], 1.0)
    torch.testing.assert_close(lengths, torch.tensor([0.1, 100.0]) * 3**0.5)
    torch.testing.assert_close(small.grad, torch.full((3,), 0.1))
    assert float(large.grad.norm()) == pytest.approx(1, rel=1e-4)
    assert len(clip_each([none], 1.0)) == 0


def test_the_centre_moves_after_use_and_the_teacher_after_the_step() -> None:
    torch.manual_seed(0)
    method, data = prepared(), batches([16, 16, 8], 4, 2)
    method.begin_step(0)
    method.training_step(data[0], 0)
    assert not method.centre.any(), "not before the step is over"
    with torch.no_grad():
        t = method.scores(method.teacher.module, data[0].views[:2])
    method.end_step()
    torch.testing.assert_close(method.centre, 0.1 * t.mean((0, 1)), atol=1e-4, rtol=1e-3)


def test_a_run_stopped_and_loaded_goes_on_bit_for_bit() -> None:
    assert_resumes(prepared, batches([16, 16, 8], 4, 3), stop=4, steps=6)
    assert_resumes(lambda: prepared(vit()), batches([16, 16, 8], 4, 3), stop=2, steps=4)


def test_the_teacher_drops_no_path_and_is_a_network_of_its_own() -> None:
    method = prepared(vit(drop_path_rate=0.5))
    rates = [m.drop_prob for m in method.teacher.modules() if hasattr(m, "drop_prob")]
    assert rates
    assert not any(rates)
    assert any(m.drop_prob for m in method.backbone.modules() if hasattr(m, "drop_prob"))
    ours, theirs = set(map(id, method.student.parameters())), set(map(id, method.teacher.parameters()))
    assert not ours & theirs
    assert method.teacher.training


# --- transformer -----------------------------------------------------------------------------------------------------


def test_positions_are_kept_at_home_and_resized_by_each_rule() -> None:
    table = torch.randn(1, 17, 6)
    assert resize_positions(table, (16, 16), 4, rule="dino") is table
    assert resize_positions(table, (16, 16), 4, rule="size") is table
    for rule in ("dino", "size", "bilinear"):
        resized = resize_positions(table, (8, 24), 4, rule=rule)
        assert resized.shape == (1, 1 + 2 * 6, 6)
        assert torch.equal(resized[:, 0], table[:, 0]), "the class token keeps its own"
        flat = resize_positions(torch.ones(1, 17, 6), (8, 24), 4, rule=rule)
        torch.testing.assert_close(flat, torch.ones_like(flat))
    with pytest.raises(UserError, match="not square"):
        resize_positions(torch.zeros(1, 8, 6), (8, 8), 4, rule="size")
    with pytest.raises(UserError, match="Did you mean 'dino'"):
        resize_positions(table, (8, 8), 4, rule="din")  # type: ignore[arg-type]


def test_attention_is_a_distribution_and_the_mask_holds_its_mass() -> None:
    torch.manual_seed(0)
    net = vit().eval()
    attention = last_attention(net, torch.randn(2, 3, 16, 16))
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, 3, 17))
    assert net.blocks[-1].attn.fused_attn == net.blocks[0].attn.fused_attn, "as it was"
    maps = class_attention(attention, 1, (4, 4))
    mask = mass_mask(maps, 0.6)
    share = (maps * mask).sum((-2, -1)) / maps.sum((-2, -1))
    assert bool((share >= 0.6 - 1e-6).all())
    smallest = torch.where(mask, maps, torch.inf).amin((-2, -1)) / maps.sum((-2, -1))
    assert bool((share - smallest < 0.6 + 1e-6).all()), "one patch fewer would not do"


def test_tokens_of_the_last_blocks() -> None:
    net, x = vit().eval(), torch.randn(2, 3, 16, 16)
    both = last_tokens(net, x, 2)
    torch.testing.assert_close(both[:, 12:], net(x))
    averaged = last_tokens(net, x, 1, average=True)
    torch.testing.assert_close(averaged[:, ::2], net(x))
    with pytest.raises(UserError, match="has 2"):
        last_tokens(net, x, 3)


def test_the_report_shows_where_the_teacher_looks() -> None:
    (batch,) = batches([16], 3, 1)
    (gallery,) = galleries(prepared(vit()).eval(), batch, [])
    assert gallery.images.shape == (3, 4, 3, 16, 16)
    assert torch.equal(gallery.images[:, 0], batch.views[0])
    assert galleries(prepared().eval(), batch, []) == []
