"""The MAE authors' whole checkpoints in (facebookresearch/mae, ``*_full.pth`` and ``checkpoint-*.pth``).

The published ``mae_pretrain_*`` files hold the encoder alone, fine-tuned ones a classifier beside it: weights alone.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from selfsight.checkpoints.dino import of_the_method
from selfsight.checkpoints.format import Format, by_rules


def _settings(state: Mapping[str, Tensor]) -> list[str]:
    depth = len({name.split(".")[2] for name in state if name.startswith("decoder.blocks.")})
    return [f"method.decoder_dim={len(state['decoder.embed.bias'])}", f"method.decoder_depth={depth}"]


MAE = Format(
    name="MAE",
    project="facebookresearch/mae",
    marks=("mask_token", "decoder_pos_embed", r"decoder_embed\.weight", r"blocks\.0\.attn\.qkv\.weight"),
    rename=by_rules(
        ("mask_token", "decoder.mask_token"),
        (r"decoder_(pos_embed|embed\..+|blocks\..+|norm\..+|pred\..+)", r"decoder.\1"),
        (r"(.+)", r"backbone.\1"),
    ),
    method="mae",
    settings=_settings,
    epoch_offset=1,
    untrained=r"(decoder_)?pos_embed",
    amend=of_the_method("mae"),
)
