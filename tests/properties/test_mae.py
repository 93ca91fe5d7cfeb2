"""What MAE's masks, loss and network have to do whatever the numbers are."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from selfsight.backbones.registry import create
from selfsight.errors import UserError
from selfsight.losses.mae import filled, masked_pixels
from selfsight.methods.mae import MAE
from selfsight.methods.spark import SparK
from selfsight.nn.patches import keep_count, patchify, random_patches, take_patches, unpatchify
from selfsight.nn.vit import visible_tokens
from selfsight.reporting.galleries import galleries

from ..small import SmallNet, assert_resumes, batches, prepare, train

ADAMW = partial(torch.optim.AdamW, weight_decay=0.05, betas=(0.9, 0.95))
DECODER: dict[str, Any] = {"decoder_dim": 8, "decoder_depth": 1, "decoder_heads": 2}


def vit(name: str = "vit_tiny_mae", **options: Any) -> nn.Module:
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 3}
    return create(name, **(sizes | options))


def mae(backbone: nn.Module | None = None, **options: Any) -> MAE:
    return MAE(backbone or vit(), **(DECODER | options))


def images(B: int = 3, size: int = 16, seed: int = 0) -> Tensor:
    return torch.randn(B, 3, size, size, generator=torch.Generator().manual_seed(seed))


# --- masks and loss --------------------------------------------------------------------------------------------------


def test_every_image_keeps_as_many_and_all_come_back_in_place() -> None:
    noise = torch.rand(5, 16, generator=torch.Generator().manual_seed(0))
    chosen = random_patches(noise, 4)
    assert bool(((chosen.mask == 0).sum(1) == 4).all())
    assert bool((noise.gather(1, chosen.visible).amax(1) < noise.masked_fill(chosen.mask == 0, 2).amin(1)).all())
    x = torch.arange(16.0)[None, :, None].expand(5, -1, 2)
    together = torch.cat([take_patches(x, chosen.visible), torch.full((5, 12, 2), -1.0)], dim=1)
    back = take_patches(together, chosen.restore)
    torch.testing.assert_close(back, torch.where(chosen.mask[..., None] > 0, -1.0, x))


def test_the_number_kept_is_cut_not_rounded() -> None:
    assert [keep_count(196, r) for r in (0.75, 0.9)] == [49, 19]
    assert keep_count(10, 0.9) == 0


def test_loss_counts_hidden_patches_alone_and_forgives_contrast() -> None:
    x, mask = images().double(), (torch.rand(3, 16, generator=torch.Generator().manual_seed(1)) > 0.3).double()
    prediction = torch.randn(3, 16, 48, dtype=torch.float64)
    loss = masked_pixels(prediction, x, mask)
    other = torch.where(mask[..., None] > 0, prediction, prediction + 100)
    torch.testing.assert_close(masked_pixels(other, x, mask), loss)
    torch.testing.assert_close(masked_pixels(prediction, 3 * x + 1, mask), loss, rtol=1e-4, atol=1e-4)
    patches = patchify(x, 4)
    exact = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    assert float(masked_pixels(exact, x, mask)) == pytest.approx(0, abs=1e-12)
    zero = masked_pixels(torch.zeros_like(prediction), x, mask)
    assert float(zero) == pytest.approx(mae().chance_loss(), rel=1e-5)
    assert mae(normalise_pixels=False).chance_loss() is None
    torch.testing.assert_close(unpatchify(patches, (4, 4), 4), x)


def test_a_perfect_prediction_fills_the_picture() -> None:
    x, mask = images(), (torch.rand(3, 16) > 0.5).float()
    patches = patchify(x, 4)
    exact = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(filled(exact, x, mask), x, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(filled(patches, x, mask, normalised=False), x)


# --- network ---------------------------------------------------------------------------------------------------------


def test_the_encoder_does_not_see_what_is_hidden() -> None:
    torch.manual_seed(0)
    net, x, noise = vit().eval(), images(), torch.rand(3, 16)
    chosen = random_patches(noise, 5)
    tokens = visible_tokens(net, x, chosen.visible)
    spoilt = unpatchify(torch.where(chosen.mask[..., None] > 0, 7.0, patchify(x, 4)), (4, 4), 4)
    torch.testing.assert_close(visible_tokens(net, spoilt, chosen.visible), tokens)
    order = torch.tensor([3, 0, 4, 1, 2])
    again = visible_tokens(net, x, chosen.visible[:, order])
    torch.testing.assert_close(again[:, 1:], tokens[:, 1:][:, order], atol=1e-5, rtol=1e-5)
    every = torch.arange(16).expand(3, -1)
    torch.testing.assert_close(visible_tokens(net, x, every), net.forward_features(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backbone", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "vit_tiny_dino"])
def test_other_plain_transformers_do_as_well(backbone: str) -> None:
    torch.manual_seed(0)
    method = mae(vit(backbone))
    prepare(method, ADAMW, 0.01, 2, 1)
    found = train(method, method.configure_optimizers(), batches([16], 4, 2), range(2))
    assert float(found[0]["loss"]) > 0.5
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)


def test_every_trained_parameter_has_a_gradient_whatever_the_pooling() -> None:
    for pool in ("token", "avg"):
        method, (batch,) = mae(vit(global_pool=pool)), batches([16], 4, 1)
        method.training_step(batch, 0)["loss"].backward()
        missing = [name for name, p in method.named_parameters() if p.requires_grad and p.grad is None]
        assert not missing


def test_refuses_networks_without_patches_and_names_spark_and_the_other_way_round() -> None:
    with pytest.raises(UserError, match="method=spark"):
        mae(SmallNet())
    with pytest.raises(UserError, match="method=spark"):
        mae(create("swin_tiny_patch4_window7_224"))
    with pytest.raises(UserError, match="masked modelling is MAE"):
        SparK(
            vit(), mask_ratio=0.6, decoder_width=32, densify_norm="auto", levels=4, normalise_pixels=True,
            decoder_precision="auto", engine="auto", sync_batchnorm=False,
        )  # fmt: skip


def test_refuses_patches_that_do_not_fill_the_image_and_masks_that_leave_nothing() -> None:
    with pytest.raises(UserError, match="do not fill"):
        mae(vit(img_size=18))
    with pytest.raises(UserError, match="0 of 16 patches"):
        mae(mask_ratio=0.99)
    with pytest.raises(UserError, match="16 of 16 patches"):
        mae(mask_ratio=0.0)
    with pytest.raises(UserError, match="heads"):
        mae(decoder_dim=8, decoder_heads=3)
    method, (batch,) = mae(vit(dynamic_img_size=True)), batches([8], 2, 1)
    with pytest.raises(UserError, match="made for 16 x 16"):
        method.training_step(batch, 0)


@pytest.mark.slow
def test_it_learns_and_goes_on_bit_for_bit() -> None:
    def make() -> MAE:
        method = mae()
        prepare(method, ADAMW, 0.01, 3, 2)
        return method

    class Fixed(MAE):
        """The same places are hidden whether a run was stopped or not."""

        def draw_noise(self, x: Tensor) -> Tensor:
            return torch.rand(len(x), self.length, generator=torch.Generator().manual_seed(self.step)).to(x)

    def fixed() -> MAE:
        method = make()
        method.__class__ = Fixed
        return method

    assert_resumes(fixed, batches([16], 4, 3), stop=4, steps=6)
    torch.manual_seed(0)
    method = prepare(mae(), ADAMW, 0.01, 40, 1)
    smooth = torch.linspace(-1, 1, 16).expand(8, 3, 16, 16).clone()
    data = batches([16], 8, 1)
    data[0].views[0] = smooth
    found = train(method, method.configure_optimizers(), data, range(40))
    assert float(found[-1]["loss"]) < 0.6 * float(found[0]["loss"])


def test_positions_are_fixed_and_tokens_decayed() -> None:
    method = mae()
    decayed, plain = method.param_groups()
    names = {id(p): name for name, p in method.named_parameters()}
    assert {"backbone.cls_token", "decoder.mask_token"} <= {names[id(p)] for p in decayed["params"]}
    assert all(p.ndim <= 1 for p in plain["params"])
    grouped = {names[id(p)] for group in (decayed, plain) for p in group["params"]}
    assert not {"backbone.pos_embed", "decoder.pos_embed"} & grouped


def test_the_report_shows_reconstructions() -> None:
    (batch,) = batches([16], 3, 1)
    method = mae().eval()
    (gallery,) = galleries(method, batch, [])
    assert gallery.images.shape == (3, 3, 3, 16, 16)
    assert torch.equal(gallery.images[:, 0], batch.views[0])
    (again,) = galleries(method, batch, [])
    assert torch.equal(again.images, gallery.images), "the same patches are hidden every time"
