"""What masked modelling must hold to whatever the numbers: blindness, exact packing, dense export, loss symmetries."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import SEModule
from timm.layers.grn import GlobalResponseNorm
from torch import Tensor, nn

from selfsight.contracts import Batch
from selfsight.errors import UserError
from selfsight.losses.spark import fill_hidden, masked_patch_loss, patch_statistics, patchify, unpatchify
from selfsight.nn.sparse.encoder import SparseEncoder
from selfsight.nn.sparse.layers import Mask, MaskedBatchNorm2d, MaskScope, convert, visible_cells
from selfsight.nn.sparse.packed import PackedMask
from selfsight.reporting.galleries import galleries
from selfsight.reporting.galleries.spark import panels

from ..spark_models import images, lively, random_mask, spark

#: name, arguments, what is special about it
ZOO: list[tuple[str, dict[str, Any]]] = [
    ("test_resnet", {}),  # mixed blocks, average pooling on shortcuts, deep stem
    ("resnet10t", {"drop_path_rate": 0.4, "channels": (16, 24, 40, 56)}),  # stochastic depth
    ("resnet10t", {"output_stride": 8, "channels": (16, 24, 40, 56)}),  # dilated convolutions, stride 8
    ("test_convnext", {"drop_path_rate": 0.3}),  # depthwise 7x7, LayerNorm, layer scale
    ("convnextv2_atto", {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 40)}),  # global response norm
    ("test_efficientnet", {}),  # squeeze-and-excitation, SiLU
    ("tf_mobilenetv3_small_minimal_100", {}),  # asymmetric padding
    ("resnetv2_50", {"layers": (1, 1, 1, 1), "channels": (16, 24, 32, 48)}),  # norms before convolutions
    ("seresnet50", {"layers": (1, 1, 1, 1), "channels": (8, 12, 16, 20)}),
    ("resnext50_32x4d", {"layers": (1, 1, 1, 1), "channels": (32, 32, 32, 32)}),  # grouped convolutions
    ("ecaresnet26t", {"layers": (1, 1, 1, 1), "channels": (16, 16, 24, 32)}),
]  # fmt: skip
zoo = pytest.mark.parametrize(("name", "arguments"), ZOO, ids=[f"{n}-{i}" for i, (n, _) in enumerate(ZOO)])


def step(method: Any, x: Tensor, active: Tensor, seed: int = 0) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Loss, gradients and buffers after one masked step."""
    torch.manual_seed(seed)
    method.zero_grad()
    loss = masked_patch_loss(method.reconstruct(x, active).image, x, active)
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in method.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, {n: b.clone() for n, b in method.named_buffers()}


@zoo
def test_packing_changes_nothing(name: str, arguments: dict[str, Any]) -> None:
    """Loss, every gradient and every running statistic of a training step, with stochastic depth on."""
    dense, packed = (spark(name, arguments=arguments, engine=e).double().train() for e in ("dense", "packed"))
    side = dense.encoder.stride
    x, active = images(3, 3 * side, 4 * side).double(), random_mask(3, (3, 4), 5)
    (loss, gradients, buffers), (other_loss, other_gradients, other_buffers) = (
        step(m, x, active) for m in (dense, packed)
    )
    assert type(dense.encoder.mask(active)) is Mask
    assert type(packed.encoder.mask(active)) is PackedMask
    assert torch.allclose(loss, other_loss, rtol=0, atol=1e-10)
    assert gradients.keys() == other_gradients.keys()
    largest = max(float(g.abs().max()) for g in gradients.values())
    for key, gradient in gradients.items():
        torch.testing.assert_close(other_gradients[key], gradient, rtol=1e-8, atol=1e-9 * largest, msg=key)
    for key, buffer in buffers.items():
        torch.testing.assert_close(other_buffers[key], buffer, rtol=1e-9, atol=1e-9, msg=key)
    assert all(p.grad is not None for p in packed.parameters() if p.requires_grad), "data-parallel training would wait"


@pytest.mark.parametrize("engine", ["dense", "packed"])
@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_efficientnet"])
def test_hidden_cells_have_no_influence(name: str, engine: str) -> None:
    method = spark(name, engine=engine).double().train()
    x, active = images(2, 96, 128).double(), random_mask(2, (3, 4), 5)
    garbage = torch.where(Mask(active).at(96, 128), x, 1e3 * images(2, 96, 128, seed=9).double())
    first, second = (copy.deepcopy(method).reconstruct(v, active) for v in (x, garbage))
    assert torch.equal(first.image, second.image)
    for m in first.maps:
        dense = first.mask.dense(m)
        occupied = dense.abs().sum(1, keepdim=True) > 0
        assert not (occupied & ~Mask(active).at(*dense.shape[2:])).any(), "the mask grew"
    # and visible ones have
    assert not torch.equal(first.image, method.reconstruct(x + 0.1, active).image)


@pytest.mark.parametrize("layer", ["se", "group_norm", "instance_norm", "grn", "pool"])
def test_reductions_run_over_the_visible(layer: str) -> None:
    """What a per-image statistic makes of a half-hidden map is what it makes of the visible half alone."""
    modules: dict[str, nn.Module] = {
        "se": SEModule(8, rd_channels=4),
        "group_norm": nn.GroupNorm(2, 8),
        "instance_norm": nn.GroupNorm(8, 8),
        "grn": GlobalResponseNorm(8, channels_last=False),
        "pool": nn.AdaptiveAvgPool2d(1),
    }
    plain = lively(nn.Sequential(modules[layer])).double()
    masked, scope = copy.deepcopy(plain), MaskScope()
    convert(masked, scope)
    active = torch.tensor([[[[1, 0, 0], [1, 0, 0]]]] * 2, dtype=torch.bool)
    x = images(2, 4, 6, channels=8).double()
    with scope.hiding(Mask(active)):
        y = masked(x * Mask(active).at(4, 6))
    expected = plain(x[..., :2])
    torch.testing.assert_close(y if layer == "pool" else y[..., :2], expected)
    if layer != "pool":
        assert not y[..., 2:].any()


def test_half_precision_statistics_are_taken_in_full() -> None:
    norm = MaskedBatchNorm2d(4).train()
    active = random_mask(8, (4, 4), 6)
    x = 100 + images(8, 16, 16, channels=4)
    y = norm(x.bfloat16(), Mask(active))
    rows = x.bfloat16().float().permute(0, 2, 3, 1)[Mask(active).at(16, 16).squeeze(1)]
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * rows.var(0), rtol=1e-4, atol=1e-5)


def test_batch_norm_without_anything_visible_is_silent_and_with_one_position_refuses() -> None:
    norm = MaskedBatchNorm2d(3).train()
    none = torch.zeros(2, 1, 2, 2, dtype=torch.bool)
    assert not norm(images(2, 2, 2), Mask(none)).any()
    assert torch.equal(norm.running_mean, torch.zeros(3))
    assert torch.equal(norm.running_var, torch.ones(3))
    none[0, 0, 0, 0] = True
    with pytest.raises(UserError, match="single visible position"):
        norm(images(2, 2, 2), Mask(none))


def test_cumulative_momentum() -> None:
    torch.manual_seed(0)
    norm, rows = MaskedBatchNorm2d(3, momentum=None).double().train(), []
    for seed in range(3):
        x, active = images(2, 4, 4, seed).double(), random_mask(2, (2, 2), 2, seed)
        norm(x, Mask(active))
        rows.append(x.permute(0, 2, 3, 1)[Mask(active).at(4, 4).squeeze(1)])
    torch.testing.assert_close(norm.running_mean, torch.stack([r.mean(0) for r in rows]).mean(0))


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext"])
def test_the_backbone_stays_the_plain_dense_network(name: str) -> None:
    method = spark(name).train()
    method.training_step(Batch([images(4, 96, 96)], torch.arange(4)), 0)["loss"].backward()
    fresh = timm.create_model(name, num_classes=0)
    state = {k: v.contiguous() for k, v in method.backbone.state_dict().items()}
    assert list(state) == list(fresh.state_dict())
    fresh.load_state_dict(state, strict=True)
    x = images(2, 80, 112)  # no multiple of the stride either
    torch.testing.assert_close(method.backbone.eval()(x), fresh.eval()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("engine", ["dense", "packed"])
def test_models_in_one_process_keep_their_masks_apart(engine: str) -> None:
    a, b = (spark("test_resnet", engine=engine).double().eval() for _ in range(2))
    c = pickle.loads(pickle.dumps(copy.deepcopy(a)))
    x, masks = images(2, 96, 96).double(), [random_mask(2, (3, 3), 4, seed) for seed in range(3)]
    alone = [m.reconstruct(x, mask).image for m, mask in zip((a, b, c), masks, strict=True)]
    # one masked forward inside another's
    with a.encoder.scope.hiding(Mask(masks[0])):
        inner = b.reconstruct(x, masks[1]).image
    torch.testing.assert_close(inner, alone[1])
    torch.testing.assert_close(c.reconstruct(x, masks[2]).image, alone[2])
    assert len({m.encoder.scope for m in (a, b, c)}) == 3


@pytest.mark.parametrize("engine", ["dense", "packed"])
def test_recomputed_activations_see_their_own_mask(engine: str) -> None:
    """Two forwards, then two backwards through checkpointed stages."""
    plain = spark("resnet10t", arguments={"channels": (8, 16, 24, 32)}, engine=engine).double().eval()
    checkpointed = copy.deepcopy(plain)
    checkpointed.backbone.set_grad_checkpointing(True)
    gradients = []
    for method in (plain, checkpointed):
        losses = []
        for seed in range(2):
            x, active = images(2, 96, 96, seed).double(), random_mask(2, (3, 3), 4, seed)
            losses.append(masked_patch_loss(method.reconstruct(x, active).image, x, active))
        for loss in losses:
            loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in method.parameters() if p.grad is not None]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-12)


def test_uneven_masks_are_computed_densely() -> None:
    method = spark("test_resnet").double().eval()
    active = random_mask(2, (3, 3), 4)
    active[0] = True
    assert type(method.encoder.mask(active)) is Mask
    x = images(2, 96, 96).double()
    both = method.reconstruct(x, active).image
    torch.testing.assert_close(both[1:], method.reconstruct(x[1:], active[1:]).image)


def test_masks_hide_the_same_number_everywhere_and_every_cell_now_and_then() -> None:
    method = spark("test_resnet")
    drawn = torch.cat([method.draw_mask(images(50, 224, 224, seed)).active for seed in range(8)])
    assert (drawn.sum((1, 2, 3)) == 20).all()
    share = drawn.float().mean(0)
    assert ((share - 20 / 49).abs() < 5 * math.sqrt(20 / 49 * 29 / 49 / len(drawn))).all()
    generator = torch.Generator().manual_seed(3)
    first = method.draw_mask(images(2, 96, 128), generator).active
    assert torch.equal(method.draw_mask(images(2, 96, 128), generator.manual_seed(3)).active, first)
    assert torch.equal(
        visible_cells(torch.tensor([[0.3, 0.1, 0.2, 0.4]]), (2, 2), 2).flatten().int(), torch.tensor([0, 1, 1, 0])
    )


def test_loss_ignores_brightness_and_contrast_of_each_cell_and_the_order_of_images() -> None:
    x, y, active = images(4, 24, 32).double(), images(4, 24, 32, 1).double(), random_mask(4, (3, 4), 5)
    loss = masked_patch_loss(y, x, active)
    cell = torch.rand(4, 1, 3, 4).double().repeat_interleave(8, 2).repeat_interleave(8, 3)
    torch.testing.assert_close(masked_patch_loss(y, (3 + cell) * x + 7 * cell, active), loss, rtol=1e-5, atol=0)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(masked_patch_loss(y[order], x[order], active[order]), loss)
    # visible cells do not count, hidden ones do
    visible = Mask(active).at(24, 32)
    assert torch.equal(masked_patch_loss(torch.where(visible, 1e6, y), x, active), loss)
    blank = masked_patch_loss(torch.zeros_like(x), x, active)
    torch.testing.assert_close(blank, torch.tensor(191 / 192, dtype=torch.float64), rtol=1e-5, atol=0)
    perfect = patchify(x, 8)
    mean, std = patch_statistics(perfect)
    solution = unpatchify((perfect - mean) / std, (3, 4), 8)
    assert masked_patch_loss(solution, x, active) < 1e-20
    torch.testing.assert_close(fill_hidden(solution, x, active), x)
    torch.testing.assert_close(
        masked_patch_loss(y, x, active, normalise=False),
        F.mse_loss(y[~visible.expand_as(y)], x[~visible.expand_as(x)]),
    )


def test_half_precision_predictions_give_a_full_precision_loss() -> None:
    x, y, active = images(2, 24, 24), images(2, 24, 24, 1), random_mask(2, (3, 3), 4)
    loss = masked_patch_loss(y.bfloat16(), x, active)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, masked_patch_loss(y.bfloat16().float(), x, active))


def test_bf16_decoder_leaves_the_encoder_alone_and_the_loss_close() -> None:
    plain, half = spark("test_resnet").train(), spark("test_resnet", decoder_precision="bf16").train()
    x, active = images(4, 96, 96), random_mask(4, (3, 3), 4)
    (loss, gradients, buffers), (other_loss, other_gradients, other_buffers) = (
        step(m, x, active) for m in (plain, half)
    )
    assert torch.allclose(loss, other_loss, rtol=1e-2)
    assert all(g.dtype == torch.float32 for g in other_gradients.values())
    for name, buffer in buffers.items():
        if name.startswith("backbone."):
            assert torch.equal(other_buffers[name], buffer), name
    a, b = (torch.cat([g.flatten() for n, g in gs.items() if "backbone" in n]) for gs in (gradients, other_gradients))
    assert F.cosine_similarity(a, b, dim=0) > 0.95


def test_pictures_show_the_visible_cells_as_they_are() -> None:
    method = spark("test_resnet").eval()
    x, active = images(3, 96, 96), random_mask(3, (3, 3), 4)
    shown = panels(method, x, active)
    visible = Mask(active).at(96, 96)
    assert torch.equal(shown[:, 0], x)
    assert torch.equal(shown[:, 1], torch.where(visible, x, 0.0))
    assert torch.equal(torch.where(visible, shown[:, 2], x), x)
    assert (shown[:, 2] - x).abs().max() > 0.1
    assert galleries(method, Batch([x], torch.arange(3)), [])[0].images.shape == (3, 3, 3, 96, 96)


def test_pictures_of_half_precision_cells_have_their_contrast() -> None:
    """The variance of a faint cell is no number of float16."""
    images = 1 + 2e-3 * torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    predicted, hidden = torch.ones(1, 1, 4, 4), torch.zeros(1, 1, 1, 1, dtype=torch.bool)
    got = fill_hidden(predicted.half(), images.half(), hidden)
    expected = images.half().double().mean() + (images.half().double().var() + 1e-6).sqrt()
    torch.testing.assert_close(got.double(), expected.expand(1, 1, 4, 4), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("width", "grid"), [(32, (1, 4)), (45, (2, 3)), (100, (3, 2))])
def test_odd_widths_grids_and_channels(width: int, grid: tuple[int, int]) -> None:
    """Odd decoder widths, odd channels, grey images, grids of one row, a batch of one."""
    net = timm.create_model("resnet10t", num_classes=0, in_chans=1, channels=(7, 9, 13, 21))
    method = spark(lively(net), decoder_width=width).train()
    x = images(1, 32 * grid[0], 32 * grid[1], channels=1)
    if grid == (1, 4):
        method = spark(lively(net), decoder_width=width, mask_ratio=0.4).train()
    result = method.training_step(Batch([x], torch.arange(1)), 0)
    result["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters() if p.requires_grad)
    assert method.reconstruct(x).image.shape == x.shape


@pytest.mark.parametrize(
    ("backbone", "options", "size", "sentence"),
    [
        ("test_resnet", {}, 100, r"100 x 100, which do not divide into the 32 x 32 cells"),
        ("test_resnet", {}, 32, r"leaves 0 of 1 cells visible"),
        ("test_resnet", {"mask_ratio": 1.2}, 96, r"mask_ratio of SparK is 1.2; a share between 0 and 1"),
        ("test_resnet", {"decoder_width": 20}, 96, r"decoder_width is 20; it is halved 5 times"),
        ("test_resnet", {"densify_norm": "batch"}, 96, r"densify_norm of SparK is 'batch'"),
        ("test_resnet", {"engine": "pack"}, 96, r"Did you mean 'packed'\?"),
        ("test_resnet", {"decoder_precision": "bf32"}, 96, r"Did you mean 'bf16'\?"),
        ("test_vit", {}, 96, r"SparK"),
        ("convmixer_768_32", {}, 96, r"power of two"),
        ("mambaout_femto", {}, 96, r"where a map of"),
        ("poolformerv2_s12", {}, 96, r"SparK cannot use MetaFormer: its masked forward fails"),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence(
    backbone: str, options: dict[str, Any], size: int, sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        spark(backbone, **options).training_step(Batch([images(2, size, size)], torch.arange(2)), 0)


def test_a_backbone_that_looks_at_hidden_cells_is_named() -> None:
    class Peeks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - x.mean((0, 2, 3), keepdim=True)

    net = timm.create_model("test_resnet", num_classes=0)
    net.layer2[0].bn2 = nn.Sequential(net.layer2[0].bn2, Peeks())
    with pytest.raises(UserError, match=r"'layer2.0.bn2.1' \(Peeks\) mixes hidden cells"):
        SparseEncoder(net, engine="dense")


@pytest.mark.parametrize("name", ["resnest14d", "skresnet18"])
def test_attention_over_pooled_maps(name: str) -> None:
    """Where erasing cannot do, packing can; with nothing hidden it is the plain network."""
    net = lively(timm.create_model(name, num_classes=0, layers=(1, 1, 1, 1))).eval()
    plain = copy.deepcopy(net)
    encoder = SparseEncoder(net)
    assert encoder.packs
    x = images(1, 64, 64)
    mask = PackedMask(torch.ones(1, 1, 2, 2, dtype=torch.bool), 4)
    torch.testing.assert_close(mask.dense(encoder(x, mask)[0]), plain.forward_features(x), rtol=1e-4, atol=1e-5)


def test_tokens_start_small_and_groups_leave_them_plain() -> None:
    method = spark("test_convnext")
    tokens = torch.cat([t.flatten() for t in method.mask_tokens])
    assert tokens.abs().max() <= 0.02
    assert 0.0095 < tokens.std() < 0.012  # 0.54 x 0.02: a normal cut at one standard deviation
    plain = {id(p) for group in method.param_groups() if group["plain"] for p in group["params"]}
    names = {n for n, p in method.named_parameters() if id(p) in plain}
    assert {"mask_tokens.0", "dense_decoder.proj.bias"} <= names
    assert any(n.endswith("gamma") for n in names)
    assert not any(p.ndim > 1 and "mask_tokens" not in n for n, p in method.named_parameters() if id(p) in plain)


@pytest.mark.slow
def test_it_learns() -> None:
    """One batch of stripes: the hidden cells follow from the visible ones, so the loss has to fall far below blank."""
    method = spark("test_resnet", engine="packed", decoder_width=64).train()
    rows = torch.arange(96.0).view(1, 1, -1, 1)
    x = torch.sin(rows / torch.tensor([2.0, 3.0, 5.0, 7.0]).view(4, 1, 1, 1)).expand(4, 3, 96, 96)
    optimizer = torch.optim.AdamW(method.parameters(), lr=3e-3)
    torch.manual_seed(0)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = method.training_step(Batch([x], torch.arange(4)), 0)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] > 0.9
    assert sum(losses[-5:]) / 5 < 0.5 * losses[0]
