"""Parts that do not go together are refused in one sentence, with the word that mends it."""

from __future__ import annotations

import pytest

from selfsight.composition.overrides import compose
from selfsight.engine import build
from selfsight.errors import UserError


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["method=mae"], r"the backbone is a ResNet; choose backbone=vit_base_mae .* or method=spark"),
        (
            ["method=mae", "backbone=vit_tiny_r_s16_p8_224", "dataset.image_size=64"],
            r"patches of the maps of a convolutional one; choose backbone=vit_base_mae .* without _r",
        ),
        (["method=spark", "backbone=vit_digits"], r"MAEViT works on tokens, .*; choose method=mae"),
        (["recipe=digits/mae", "backbone.patch_size=3"], r"patches of 3 pixels .* choose a backbone\.patch_size"),
        (["method=simclrv2", "backbone=vit_digits", "backbone.patch_size=3"], r"16 x 16 .* backbone\.patch_size to a"),
        (["recipe=digits/mae", "method.mask_ratio=0.999"], r"leaves 0 of 16 patches visible; .* another ratio"),
        (["method=vicreg", "batch_size=1"], r"batch_size is 1, .* choose batch_size=2 or more"),
        (["method=barlow", "batch_size=1"], r"batch_size is 1, .* choose batch_size=2 or more"),
        (["method=simsiam", "batch_size=1"], r"the heads of SimSiam normalise .*; choose batch_size=2 or more"),
        (["method=dino", "~views.second", "~views.local"], r"2 or more views .* give 1; set views\.<name>\.count"),
    ],
)
def test_parts_that_do_not_go_together(words: list[str], sentence: str) -> None:
    cfg = compose("pretrain", ["debug=smoke", *words])
    with pytest.raises(UserError, match=sentence) as refusal:
        build.parts(cfg)
    assert "\n" not in str(refusal.value)
