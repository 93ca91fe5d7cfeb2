"""The light dense decoder of SparK (the authors' ``pretrain/decoder.py``): a U-Net's upward half."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from torch import Tensor, nn

from selfsight.errors import UserError
from selfsight.nn.sparse.layers import MaskedBatchNorm2d


class UpBlock(nn.Module):
    """Doubles the size: transposed 4x4 convolution, then two 3x3 convolutions with norms and one ReLU6 between."""

    def __init__(self, c_in: int, c_out: int, sync: bool) -> None:
        super().__init__()
        self.up_sample = nn.ConvTranspose2d(c_in, c_in, kernel_size=4, stride=2, padding=1)
        self.conv = nn.Sequential(
            nn.Conv2d(c_in, c_in, kernel_size=3, padding=1, bias=False),
            MaskedBatchNorm2d(c_in, sync=sync),
            nn.ReLU6(inplace=True),
            nn.Conv2d(c_in, c_out, kernel_size=3, padding=1, bias=False),
            MaskedBatchNorm2d(c_out, sync=sync),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.up_sample(x))  # [B, c_out, 2h, 2w]


class LightDecoder(nn.Module):
    """Maps of a pyramid, smallest first, to an image ``stride`` times as large as the smallest.

    ``log2(stride)`` blocks of widths D, D/2, D/4, ...; map ``i`` (``D / 2^i`` channels) is added before block ``i``.
    Norms use every position: nothing is hidden here.

    Args:
        width: D, channels of the smallest map.
        stride: total stride R of the encoder, a power of two.
        channels: of the image.
        sync: BatchNorm statistics over all processes.
    Raises:
        UserError: D is too small to be halved ``log2(stride)`` times.
    """

    def __init__(self, width: int, stride: int, *, channels: int = 3, sync: bool = False) -> None:
        super().__init__()
        blocks = int(math.log2(stride))
        if width < stride:
            raise UserError(
                f"SparK's decoder_width is {width}; it is halved {blocks} times for a backbone of stride {stride}, "
                f"so it has to be {stride} or more."
            )
        widths = [width // 2**i for i in range(blocks + 1)]
        self.dec = nn.ModuleList(UpBlock(a, b, sync) for a, b in itertools.pairwise(widths))
        self.proj = nn.Conv2d(widths[-1], channels, kernel_size=1)
        for module in self.modules():
            if isinstance(module, nn.ConvTranspose2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02)
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, maps: Sequence[Tensor | None]) -> Tensor:
        """``maps[i]`` ``[B, D / 2^i, 2^i h, 2^i w]`` or None, the first never None; to ``[B, 3, R h, R w]``."""
        x: Tensor | None = None
        for i, block in enumerate(self.dec):
            skip = maps[i] if i < len(maps) else None
            if skip is not None:
                x = skip if x is None else x + skip
            x = block(x)
        return self.proj(x)
