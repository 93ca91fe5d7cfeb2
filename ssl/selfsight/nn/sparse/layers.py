"""Makes any CNN ignore the hidden cells of an image, by converting the layers of its module tree in place.

Dense layers play sparse ones: after every layer that mixes positions or adds a bias the hidden positions are set back
to zero, and statistics are taken over the visible ones alone. The semantics are those of submanifold sparse
convolutions as SparK emulates them (Tian et al., "Designing BERT for Convolutional Networks", ICLR 2023; the authors'
``pretrain/encoder.py``). Parameters, buffers and their names stay those of the dense network, and without a mask the
network *is* the dense network: a converted backbone is exported and evaluated as it stands.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfsight.errors import UserError
from selfsight.nn.distributed import gather, world_size
from selfsight.nn.precision import float32


def visible_count(cells: int, mask_ratio: float) -> int:
    """How many of ``cells`` stay visible: ``round(cells (1 - ratio))``, halves to even (20 of 49 at 0.6, not 19)."""
    return round(cells * (1 - mask_ratio))


def visible_cells(noise: Tensor, grid: tuple[int, int], keep: int) -> Tensor:
    """The ``keep`` cells with the least noise are visible in each image.

    Args:
        noise: ``[B, f_h f_w]``.
    Returns:
        bool ``[B, 1, f_h, f_w]``, True where visible.
    """
    chosen = noise.argsort(dim=1)[:, :keep]
    active = torch.zeros_like(noise, dtype=torch.bool).scatter_(1, chosen, True)
    return active.view(len(noise), 1, *grid)


class Mask:
    """Which cells of each image are visible, at every resolution.

    Attributes:
        active: bool ``[B, 1, f_h, f_w]``, True where visible.
        cells: number of visible cells in the whole batch. Give it where it is known: counting waits for the device.
    """

    def __init__(self, active: Tensor, cells: int | None = None) -> None:
        self.active = active
        self.cells = int(active.sum()) if cells is None else cells
        self._upsampled: dict[tuple[Any, ...], Tensor] = {}

    @property
    def grid(self) -> tuple[int, int]:
        return self.active.shape[2], self.active.shape[3]

    def fits(self, h: int, w: int) -> bool:
        """Whether a map of ``h x w`` divides into the cells. Pooled vectors (1 x 1) do not; they belong to no cell."""
        return h % self.grid[0] == 0 and w % self.grid[1] == 0

    def at(self, h: int, w: int, dtype: torch.dtype = torch.bool) -> Tensor:
        """``[B, 1, h, w]``: every cell repeated over the positions it covers in a map of ``h x w``."""
        key = (h, w, dtype)
        if key not in self._upsampled:
            mask = self.active
            for dim, (size, cells) in enumerate(zip((h, w), self.grid, strict=True), start=2):
                mask = mask.repeat_interleave(size // cells, dim=dim)
            self._upsampled[key] = mask.to(dtype)
        return self._upsampled[key]

    def positions(self, h: int, w: int) -> int:
        """Visible positions of the whole batch in maps of ``h x w``."""
        return self.cells * (h // self.grid[0]) * (w // self.grid[1])

    def hide(self, images: Tensor) -> Tensor:
        """``images [B, C, H, W]`` with zeros in the hidden cells, as the encoder's first layer takes them."""
        return images * self.at(images.shape[2], images.shape[3], images.dtype)

    def shape(self, b: int, c: int, h: int, w: int) -> tuple[int, ...]:
        """Of a map of ``h x w`` inside the encoder."""
        return b, c, h, w

    def fill(self, x: Tensor, token: Tensor) -> Tensor:
        """A map of the encoder, ``[B, C, h, w]``, with ``token`` (C values, or 1) in its hidden positions."""
        return torch.where(self.at(x.shape[2], x.shape[3]), x, token.to(x.dtype).view(1, -1, 1, 1))

    def project(self, x: Tensor, token: Tensor, projection: nn.Module) -> Tensor:
        """``projection`` of `fill`: dense, ``[B, C', h, w]``."""
        return projection(self.fill(x, token))

    def dense(self, x: Tensor) -> Tensor:
        """A map of the encoder as ``[B, C, h, w]`` with zeros in its hidden positions."""
        return x

    def weights(self, x: Tensor, *, channels_last: bool = False) -> Tensor | None:
        """Ones and zeros that multiply the map ``x`` (``[B, C, h, w]`` or ``[B, h, w, C]``).

        None where nothing is hidden from ``x``: it is no map of cells.
        """
        if x.ndim < 4:
            return None
        h, w = (x.shape[-3], x.shape[-2]) if channels_last else (x.shape[-2], x.shape[-1])
        if not self.fits(h, w):
            return None
        mask = self.at(h, w, x.dtype)
        if x.ndim == 5:  # parallel paths [B, P, C, h, w]
            return mask.unsqueeze(1)
        return mask.permute(0, 2, 3, 1) if channels_last else mask


class MaskScope:
    """The mask that the layers of one converted model obey.

    Each model has its own, and a deep copy of the model gets its own too: nothing is global. Outside `hiding` there is
    no mask. A backward pass that recomputes activations (checkpointing) finds the mask of the forward it belongs to.
    """

    def __init__(self) -> None:
        self._current: Mask | None = None
        self._recalled: Mask | None = None
        self.taps: dict[str, Tensor] = {}

    @property
    def mask(self) -> Mask | None:
        if self._current is None and torch._C._current_graph_task_id() != -1:
            return self._recalled
        return self._current

    @property
    def forward_pass(self) -> bool:
        """True in a masked forward, False in its recomputation."""
        return self._current is not None

    @contextmanager
    def hiding(self, mask: Mask) -> Iterator[None]:
        self._current, self.taps = mask, {}
        try:
            yield
        finally:
            self._current, self.taps = None, {}

    def recall_in_backward(self, mask: Mask, maps: list[Tensor]) -> None:
        """When gradients reach one of ``maps``, what is recomputed from there on obeys ``mask``."""

        def recall(_: Tensor) -> None:
            self._recalled = mask

        for x in maps:
            if x.requires_grad:
                x.register_hook(recall)

    def weights(self, x: Tensor, *, channels_last: bool = False) -> Tensor | None:
        mask = self.mask
        return None if mask is None else mask.weights(x, channels_last=channels_last)


# --- layers -----------------------------------------------------------------------------------------------------------


def _hide(scope: MaskScope, channels_last: bool, module: nn.Module, args: Any, output: Tensor) -> Tensor:
    weights = scope.weights(output, channels_last=channels_last)
    return output if weights is None else output * weights


def _inflation(scope: MaskScope, x: Tensor) -> Tensor | None:
    """Per image, positions over visible positions: turns a mean over all into the mean over the visible."""
    weights = scope.weights(x)
    if weights is None:
        return None
    visible = weights.sum(dim=(-2, -1), keepdim=True).clamp(min=1)
    return weights.shape[-2] * weights.shape[-1] / visible


def _inflate(scope: MaskScope, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    factor = _inflation(scope, args[0])
    return None if factor is None else (args[0] * factor, *args[1:])


def _deflate(scope: MaskScope, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    factor = _inflation(scope, output)
    return output if factor is None else output / factor


def _rest_of(norm: nn.Module, x: Tensor) -> Tensor:
    """timm fuses dropout and activation into some normalisations."""
    for name in ("drop", "act"):
        if hasattr(norm, name):
            x = getattr(norm, name)(x)
    return x


class MaskedBatchNorm2d(nn.Module):
    """BatchNorm over the visible positions of the batch; names, buffers and momentum rule of `torch.nn.BatchNorm2d`.

    Statistics use the ``n`` visible positions: biased variance for the output, unbiased (``n / (n - 1)``) for the
    running one. Hidden positions give 0 whatever they held. With ``sync`` the positions of all processes count, their
    numbers may differ, and it works on every device. Not a subclass of torch's BatchNorm, lest
    ``convert_sync_batchnorm`` put a dense one in its place.

    Raises:
        UserError: a training batch with a single visible position has no variance.
    """

    _version = 2
    num_features: int
    eps: float
    momentum: float | None
    affine: bool
    track_running_stats: bool
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    scope: MaskScope | None
    sync: bool

    def __init__(
        self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1, *, sync: bool = False
    ) -> None:
        super().__init__()
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.affine, self.track_running_stats = True, True
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0))
        self.scope, self.sync = None, sync

    @classmethod
    def convert(cls, layer: nn.Module, scope: MaskScope | None, sync: bool) -> None:
        """Make ``layer`` (a BatchNorm2d) one of these, in place: parameters, buffers and hooks stay."""
        layer.__class__ = cls
        converted = cast(MaskedBatchNorm2d, layer)
        converted.scope, converted.sync = scope, sync

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, sync={self.sync}"

    def forward(self, x: Tensor, mask: Mask | None = None) -> Tensor:
        """``[B, C, h, w]`` to the same shape; ``mask`` stands in for the one of the model's forward."""
        mask = mask or (self.scope.mask if self.scope is not None else None)
        weights = None if mask is None else mask.weights(x)
        count = x.numel() // x.shape[1] if weights is None else cast(Mask, mask).positions(x.shape[2], x.shape[3])
        batch_statistics = self.training or self.running_mean is None
        shared = self.sync and batch_statistics and world_size() > 1
        if batch_statistics and count == 1 and not shared:
            raise UserError(
                "BatchNorm got a training batch with a single visible position and cannot take a variance: "
                "use a larger batch, larger images or a smaller mask_ratio."
            )
        momentum = self._momentum()
        if weights is None and not shared:
            running = (
                (self.running_mean, self.running_var) if not self.training or self.track_running_stats else (None,) * 2
            )
            y = F.batch_norm(x, *running, self.weight, self.bias, batch_statistics, momentum, self.eps)
            return _rest_of(self, y)
        if not batch_statistics:
            y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
            return _rest_of(self, y if weights is None else y * weights)
        return _rest_of(self, self._normalise(x, weights, count, momentum))

    def _momentum(self) -> float:
        if not (self.training and self.track_running_stats and self.num_batches_tracked is not None):
            return self.momentum or 0.0
        self.num_batches_tracked.add_(1)
        return 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum

    def _normalise(self, x: Tensor, weights: Tensor | None, count: int, momentum: float) -> Tensor:
        dtype = x.dtype
        x = float32(x)
        weights = torch.ones_like(x[:, :1]) if weights is None else weights.to(x.dtype)
        sums = self._over_processes(torch.cat([(x * weights).sum((0, 2, 3)), x.new_full((1,), count)]))  # [C + 1]
        n = sums[-1].detach()
        mean = sums[:-1] / n.clamp(min=1)
        deviation = (x - mean.view(1, -1, 1, 1)) * weights  # [B, C, h, w]
        variance = self._over_processes(deviation.square().sum((0, 2, 3))) / n.clamp(min=1)
        if self.training and self.running_mean is not None and self.running_var is not None:
            update = momentum * (n > 0).to(self.running_mean.dtype)
            unbiased = variance.detach() * (n / (n - 1).clamp(min=1))
            self.running_mean.lerp_(mean.detach().to(self.running_mean.dtype), update)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), update)
        scale = (variance + self.eps).rsqrt()
        scale = scale if self.weight is None else scale * self.weight
        y = deviation * scale.view(1, -1, 1, 1)
        if self.bias is not None:
            y = y + self.bias.view(1, -1, 1, 1) * weights
        return y.to(dtype)

    def _over_processes(self, local: Tensor) -> Tensor:
        return gather(local[None]).sum(0) if self.sync else local


class MaskedGroupNorm(nn.GroupNorm):
    """GroupNorm whose statistics are taken over the visible positions of each image."""

    scope: MaskScope

    @classmethod
    def convert(cls, layer: nn.Module, scope: MaskScope) -> None:
        layer.__class__ = cls
        cast(MaskedGroupNorm, layer).scope = scope

    def forward(self, x: Tensor) -> Tensor:
        weights = self.scope.weights(x)
        if weights is None:
            return _rest_of(self, F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps))
        b, c, h, w = x.shape
        grouped, inside = x.view(b, self.num_groups, -1, h, w), weights.unsqueeze(1)  # [B, G, C/G, h, w]
        n = (inside.sum((2, 3, 4), keepdim=True) * (c // self.num_groups)).clamp(min=1)
        deviation = (grouped - (grouped * inside).sum((2, 3, 4), keepdim=True) / n) * inside
        variance = deviation.square().sum((2, 3, 4), keepdim=True) / n
        y = (deviation * (variance + self.eps).rsqrt()).view(b, c, h, w)
        if self.affine:
            y = y * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1) * weights
        return _rest_of(self, y)


#: Layers that read neighbours, by class and (those of timm and of our backbones) by name.
SPATIAL = (nn.Conv2d, nn.ConvTranspose2d, nn.MaxPool2d, nn.AvgPool2d)
SPATIAL_NAMES = ("BlurPool2d", "AvgPool2dSame", "MaxPool2dSame", "SamePool", "ShortcutPool")
#: Layers of one position that add a bias, on maps with the channels last and with the channels first.
_CHANNELS_LAST = (nn.LayerNorm, nn.Linear)
_NORMS_CHANNELS_FIRST = ("LayerNorm2d", "LayerNormAct2d", "LayerNormExp2d")
#: ``x gate(mean of x)``: squeeze-and-excitation and its kin. Fed ``s x``, then divided by s, they see s times the mean.
_GATED = ("SEModule", "SqueezeExcite", "SqueezeExcitation", "EffectiveSEModule", "EcaModule", "CecaModule", "EseModule")
#: ``attention(mean of x)``, not multiplied by ``x``, and global average pooling within the trunk.
_POOLED = ("SelectiveKernelAttn", "AdaptiveAvgPool2d")


def convert(module: nn.Module, scope: MaskScope, *, sync: bool = False) -> None:
    """Make ``module`` and everything below it obey the mask of ``scope``, in place.

    Args:
        sync: BatchNorm statistics over the visible positions of all processes.
    """
    name = type(module).__name__
    if name in _GATED:
        module.register_forward_pre_hook(partial(_inflate, scope))
        module.register_forward_hook(partial(_deflate, scope))
    elif name in _POOLED:
        module.register_forward_pre_hook(partial(_inflate, scope))
    elif isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm):
        MaskedBatchNorm2d.convert(module, scope, sync)
    elif isinstance(module, nn.GroupNorm):
        MaskedGroupNorm.convert(module, scope)
    elif name == "GlobalResponseNorm":
        # Zeros add nothing to its norm over positions: only its bias has to go.
        module.register_forward_hook(partial(_hide, scope, getattr(module, "channel_dim", 1) == -1))
    elif isinstance(module, SPATIAL) or name.startswith((*SPATIAL_NAMES, *_NORMS_CHANNELS_FIRST)):
        module.register_forward_hook(partial(_hide, scope, False))
    elif isinstance(module, _CHANNELS_LAST):
        module.register_forward_hook(partial(_hide, scope, True))
    for child in module.children():
        convert(child, scope, sync=sync)
