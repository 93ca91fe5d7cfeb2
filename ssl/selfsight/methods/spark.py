"""SparK: masked modelling for convolutional networks.

Most cells of an image are hidden; the encoder runs as a sparse network that sees the visible ones alone, at every
depth. Its maps are filled up with learnt vectors, joined by a light U-Net decoder, and the pixels of the hidden cells
are to be predicted. Afterwards the encoder is an ordinary dense network.

    Tian, Jiang, Diao, Lin, Wang, Yuan: Designing BERT for Convolutional Networks: Sparse and Hierarchical Masked
    Modeling. ICLR 2023, arXiv:2301.03580. Code: keyu-tian/SparK.

Follows the code where the paper says less: a fixed number of visible cells per image (20 of 49 at ratio 0.6), target
statistics over the three channels together, tokens in encoder channels before the projection, ReLU6 in the decoder.
Beyond both: any timm CNN serves, squeeze-and-excitation and group norms included, and the sparse encoder can skip the
hidden cells instead of computing and erasing them (``encoder``), which changes nothing but the time.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.init import trunc_normal_

from selfsight.backbones.interface import works_on_tokens
from selfsight.contracts import Batch
from selfsight.errors import UserError
from selfsight.losses.spark import masked_patch_loss
from selfsight.methods.base import Method
from selfsight.nn.light_decoder import LightDecoder
from selfsight.nn.sparse.encoder import ENGINES, Engine, Level, SparseEncoder
from selfsight.nn.sparse.layers import Mask, MaskedBatchNorm2d, visible_cells, visible_count
from selfsight.optim.groups import ParamGroup
from selfsight.validation import SWITCH, number, one_of, takes, whole

DECODER_PRECISIONS = ("auto", "bf16")
DENSIFY_NORMS = ("auto", "bn", "ln", "none")
BETWEEN = number("a share between 0 and 1", lambda v: 0 < v < 1)
#: parameters without weight decay and layer adaptation, besides the one-dimensional ones (authors' ``lr_control.py``)
PLAIN = ("mask_tokens", "gamma", "cls_token", "pos_embed")


class Reconstruction(NamedTuple):
    """What one masked forward gives: maps (smallest first), decoder inputs, the image and which cells were visible."""

    maps: list[Tensor | None]
    decoder_inputs: list[Tensor | None]
    image: Tensor
    mask: Mask


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of ``[B, C, h, w]``."""

    def forward(self, x: Tensor, mask: Mask | None = None) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@takes(
    mask_ratio=BETWEEN, decoder_width=whole(1), densify_norm=one_of(*DENSIFY_NORMS), levels=whole(1),
    normalise_pixels=SWITCH, engine=one_of(*ENGINES), sync_batchnorm=SWITCH,
    decoder_precision=one_of(*DECODER_PRECISIONS),
)  # fmt: skip
class SparK(Method):
    """Sparse and hierarchical masked modelling: from the visible cells of an image its hidden pixels are predicted.

    Defaults are the authors' for ImageNet.

    Args:
        backbone: network to be trained, a CNN of timm's.
        mask_ratio: share r of hidden cells; a cell is as large as the backbone's total stride.
        decoder_width: D, channels at the smallest map; halved at each larger one.
        densify_norm: of the maps before densifying: ``bn``, ``ln``, ``none``, or ``auto`` (what the backbone uses).
        levels: how many maps the decoder sees at most.
        normalise_pixels: predict pixels normalised per cell (the paper's target) or the pixels themselves.
        engine: ``dense``, ``packed`` or ``auto``, see `selfsight.nn.sparse.encoder.SparseEncoder`.
        sync_batchnorm: BatchNorm statistics of all processes, in encoder, densify and decoder.
        decoder_precision: ``bf16`` runs densify and decoder, the larger part of the work, in bfloat16 and leaves the
            encoder as it is; ``auto`` leaves both to the trainer.

    Raises:
        UserError: values that cannot be meant, or a backbone that cannot run sparse.
    """

    n_views = (1, 1)
    uncompiled = ("backbone", "encoder")  # how many cells are visible differs, and hooks read the maps

    def __init__(
        self,
        backbone: nn.Module,
        *,
        mask_ratio: float = 0.6,
        decoder_width: int = 768,
        densify_norm: Literal["auto", "bn", "ln", "none"] = "auto",
        levels: int = 4,
        normalise_pixels: bool = True,
        engine: Engine = "auto",
        sync_batchnorm: bool = True,
        decoder_precision: Literal["auto", "bf16"] = "auto",
    ) -> None:
        super().__init__(backbone)
        if works_on_tokens(backbone):
            raise UserError(
                f"SparK hides cells of the maps of a convolutional network, and a {type(backbone).__name__} works on "
                "tokens, whose masked modelling is MAE (He et al. 2022); choose method=mae, or a ResNet or ConvNeXt "
                "for SparK."
            )
        self.mask_ratio, self.normalise_pixels = mask_ratio, normalise_pixels
        self.decoder_precision = decoder_precision
        self.encoder = SparseEncoder(backbone, engine=engine, most_levels=levels, sync=sync_batchnorm)
        kind = _norm_of(backbone) if densify_norm == "auto" else densify_norm

        present = [(i, level) for i, level in enumerate(self.encoder.levels) if level is not None]
        self.positions = [i for i, _ in present]
        self.dense_decoder = LightDecoder(
            decoder_width, self.encoder.stride, channels=self.encoder.in_channels, sync=sync_batchnorm
        )
        self.densify_norms = nn.ModuleList(_norm(kind, level.channels, sync_batchnorm) for _, level in present)
        self.densify_projs = nn.ModuleList(_projection(i, level, decoder_width) for i, level in present)
        self.mask_tokens = nn.ParameterList(torch.zeros(1, level.channels, 1, 1) for _, level in present)
        for token in self.mask_tokens:
            trunc_normal_(token, mean=0, std=0.02, a=-0.02, b=0.02)
        if self.encoder.packs:  # packed maps lie channels last, and leave the densify step so
            self.dense_decoder.to(memory_format=torch.channels_last)

    @property
    def cell(self) -> int:
        """Pixels that are hidden as one: the backbone's total stride."""
        return self.encoder.stride

    def check_side(self, side: int) -> None:
        self.draw_mask(torch.empty(1, 3, side, side))

    def training_step(self, batch: Batch, batch_idx: int) -> Mapping[str, Tensor]:
        x = batch.views[0]  # [B, 3, H, W]
        result = self.reconstruct(x)
        loss = masked_patch_loss(result.image, x, result.mask.active, normalise=self.normalise_pixels)
        return {"loss": loss}

    def reconstruct(self, x: Tensor, active: Tensor | None = None) -> Reconstruction:
        """The masked forward. ``active`` (bool ``[B, 1, f_h, f_w]``) replaces the random mask."""
        mask = self.draw_mask(x) if active is None else self.encoder.mask(active)  # A [B, 1, f_h, f_w]
        maps = self.encoder(x, mask)  # [B, e_i, s_i f_h, s_i f_w], smallest first
        with self._decoder_autocast(x.device.type):
            inputs = self.densify(maps, mask)  # [B, D / 2^i, s_i f_h, s_i f_w]
            image = self.dense_decoder(inputs)  # [B, 3, H, W]
        return Reconstruction(maps, inputs, image, mask)

    def _decoder_autocast(self, device: str) -> AbstractContextManager[object]:
        return torch.autocast(device, torch.bfloat16) if self.decoder_precision == "bf16" else nullcontext()

    def draw_mask(self, x: Tensor, generator: torch.Generator | None = None) -> Mask:
        """A random mask with the same number of visible cells in every image."""
        grid = self.encoder.grid(x)
        cells = grid[0] * grid[1]
        keep = visible_count(cells, self.mask_ratio)
        if not 0 < keep < cells:
            raise UserError(
                f"mask_ratio {self.mask_ratio} leaves {keep} of {cells} cells visible in images of "
                f"{x.shape[-2]} x {x.shape[-1]} (cells of {self.encoder.stride}): use larger images, a backbone of "
                "smaller stride, or another mask_ratio."
            )
        noise = torch.rand(
            len(x), cells, generator=generator, device=x.device if generator is None else generator.device
        )
        return self.encoder.mask(visible_cells(noise, grid, keep).to(x.device), keep)

    def densify(self, maps: list[Tensor | None], mask: Mask) -> list[Tensor | None]:
        """Normalise each map, put its token into the hidden cells, project to the decoder's width."""
        inputs: list[Tensor | None] = [None] * len(maps)
        for i, norm, token, projection in zip(
            self.positions, self.densify_norms, self.mask_tokens, self.densify_projs, strict=True
        ):
            z = norm(cast(Tensor, maps[i]), mask)
            inputs[i] = mask.project(z, token, projection)
        return inputs

    def param_groups(self) -> list[ParamGroup]:
        """Weight decay on kernels alone: not on biases, norms, tokens and layer scales."""
        decayed: list[Tensor] = []
        plain: list[Tensor] = []
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                is_plain = parameter.ndim <= 1 or name.endswith(".bias") or any(word in name for word in PLAIN)
                (plain if is_plain else decayed).append(parameter)
        groups: list[ParamGroup] = [
            {"params": decayed, "plain": False},
            {"params": plain, "plain": True, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]


def _norm_of(backbone: nn.Module) -> str:
    """The norm most common in ``backbone``."""
    modules = list(backbone.modules())
    batch = sum(isinstance(m, MaskedBatchNorm2d) for m in modules)
    layer = sum(isinstance(m, nn.LayerNorm) for m in modules)
    return "ln" if layer > batch else "bn"


def _norm(kind: str, channels: int, sync: bool) -> nn.Module:
    if kind == "bn":
        return MaskedBatchNorm2d(channels, sync=sync)
    return ChannelNorm(channels, eps=1e-6) if kind == "ln" else _Unchanged()


class _Unchanged(nn.Module):
    def forward(self, x: Tensor, mask: Mask) -> Tensor:
        return x


def _projection(i: int, level: Level, width: int) -> nn.Module:
    """To the decoder's channels: for the smallest map 1x1, or nothing where its channels fit; 3x3 for the others."""
    out = width // 2**i
    if i == 0:
        return nn.Identity() if level.channels == out else nn.Conv2d(level.channels, out, kernel_size=1)
    return nn.Conv2d(level.channels, out, kernel_size=3, padding=1)
