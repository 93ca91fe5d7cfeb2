"""Computes the visible cells of a masked image and nothing else; the results are those of `selfsight.nn.sparse`.

Every image has the same number of visible cells, so a map can be packed without ragged bookkeeping: the ``keep``
visible cells of side ``s`` of each image as ``[B, C, keep, s^2]``, channels last in memory. In that form everything
that works position by position, or reduces over positions, is the ordinary layer: 1x1 convolutions are one matrix
product over the visible positions, BatchNorm's batch is the visible positions, squeeze-and-excitation and group norms
see each image's visible positions, stochastic depth still drops whole images. Only layers that read neighbours have to
know where those are. For convolutions a table lists, for each output position and kernel tap, the row of the input,
and one row of zeros stands for everything hidden or outside; the gathered rows go through one matrix product. Layers
without such a form (depthwise convolutions, pooling) take a detour over the dense map.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfsight.nn.sparse import Mask, MaskScope


class PackedMask(Mask):
    """A mask with the same number ``keep`` of visible cells in every image, under which maps travel packed."""

    def __init__(self, active: Tensor, keep: int) -> None:
        super().__init__(active, len(active) * keep)
        self.keep = keep
        b = len(active)
        order = (~active).flatten(1).to(torch.int8).argsort(dim=1, stable=True)
        self.visible = order[:, :keep]  # [B, keep], cell numbers in ascending order
        place = torch.full_like(order, -1).scatter_(
            1, self.visible, torch.arange(keep, device=order.device).expand(b, -1)
        )
        image = torch.arange(b, device=order.device).view(b, 1) * keep
        self.place = torch.where(place >= 0, place + image, -1).view(b, *self.grid)  # number of the packed cell, or -1
        self._tables: dict[tuple[Any, ...], Tensor] = {}

    def weights(self, x: Tensor, *, channels_last: bool = False) -> Tensor | None:
        """None: a packed map holds nothing hidden."""
        return None

    def side(self, x: Tensor) -> int | None:
        """Side of the cells of a packed map; None if ``x`` is none."""
        if x.ndim != 4 or x.shape[2] != self.keep:
            return None
        side = math.isqrt(x.shape[3])
        return side if side * side == x.shape[3] else None

    def hide(self, images: Tensor) -> Tensor:
        return self.pack(images)

    def shape(self, b: int, c: int, h: int, w: int) -> tuple[int, ...]:
        return b, c, self.keep, (h // self.grid[0]) ** 2

    def pack(self, x: Tensor) -> Tensor:
        """``[B, C, f_h s, f_w s]`` to ``[B, C, keep, s^2]``."""
        b, c, h, _ = x.shape
        side = h // self.grid[0]
        rows = x.permute(0, 2, 3, 1).reshape(-1, c).index_select(0, self._pixels(side))
        return _packed(rows, b, self.keep)

    def dense(self, x: Tensor) -> Tensor:
        return self.fill(x, x.new_zeros(1))

    def fill(self, x: Tensor, token: Tensor) -> Tensor:
        side = cast(int, self.side(x))
        b, c = x.shape[:2]
        h, w = self.grid[0] * side, self.grid[1] * side
        canvas = token.to(x.dtype).view(1, -1).expand(b * h * w, c)
        canvas = canvas.index_copy(0, self._pixels(side), _rows(x))
        return canvas.view(b, h, w, c).permute(0, 3, 1, 2)

    def _pixels(self, side: int) -> Tensor:
        """``[B keep s^2]``: where in the dense map (row by row, image by image) each packed position lies."""
        key = ("pixels", side)
        if key not in self._tables:
            b, (f_h, f_w) = len(self.active), self.grid
            device = self.active.device
            inside = torch.arange(side, device=device)
            image = torch.arange(b, device=device).view(b, 1, 1, 1) * (f_h * f_w * side * side)
            y = (self.visible // f_w).view(b, -1, 1, 1) * side + inside.view(-1, 1)  # [B, keep, s, 1]
            x = (self.visible % f_w).view(b, -1, 1, 1) * side + inside  # [B, keep, 1, s]
            self._tables[key] = (image + y * (f_w * side) + x).flatten()
        return self._tables[key]

    def neighbours(self, side: int, kernel: int, stride: int, padding: int, dilation: int = 1) -> Tensor:
        """``[n_out, k k]``: the input row that each tap of each output position reads.

        ``n_in`` stands for a hidden position and ``n_in + 1`` for one outside the image.
        """
        key = ("neighbours", side, kernel, stride, padding, dilation)
        if key not in self._tables:
            device = self.active.device
            first = torch.arange(side // stride, device=device).view(-1, 1) * stride - padding
            taps = torch.arange(kernel, device=device) * dilation
            self._tables[key] = self._rows_at(first + taps, side)
        return self._tables[key]

    def readers(self, side: int, kernel: int, stride: int, padding: int, dilation: int = 1) -> Tensor:
        """``[n_in, m]``: the transpose of `neighbours`: entries (``output row k k + tap``) that read an input position.

        Filled up with ``n_out k k``.
        """
        key = ("readers", side, kernel, stride, padding, dilation)
        if key not in self._tables:
            device, side_out = self.active.device, side // stride
            at = torch.arange(side, device=device).view(-1, 1) + padding
            if dilation == 1:  # only every stride-th tap can meet a position
                taps = at % stride + stride * torch.arange(math.ceil(kernel / stride), device=device)
            else:
                taps = torch.arange(kernel, device=device).expand(side, -1)
            meets = (taps < kernel) & ((at - dilation * taps) % stride == 0)  # [s, m]
            rows = self._rows_at((at - dilation * taps).div(stride, rounding_mode="floor"), side_out)  # [n_in, m m]
            m = taps.shape[1]
            tap = (taps.view(side, 1, m, 1) * kernel + taps.view(1, side, 1, m)).reshape(-1, m * m)
            both = (meets.view(side, 1, m, 1) & meets.view(1, side, 1, m)).reshape(-1, m * m)
            cells, n_out = self.cells, self.cells * side_out * side_out
            tap, both = tap.repeat(cells, 1), both.repeat(cells, 1)
            self._tables[key] = torch.where(both & (rows < n_out), rows * kernel**2 + tap, n_out * kernel**2)
        return self._tables[key]

    def _rows_at(self, offsets: Tensor, side: int) -> Tensor:
        """Rows of the positions ``offsets [a, m]`` (relative to each visible cell): ``[cells a a, m m]``."""
        (f_h, f_w), b = self.grid, len(self.active)
        a, m = offsets.shape
        cell, within = offsets.div(side, rounding_mode="floor"), offsets.remainder(side)
        y = (self.visible // f_w).view(b, -1, 1, 1) + cell  # [B, keep, a, m]
        x = (self.visible % f_w).view(b, -1, 1, 1) + cell
        y, x = y.view(b, -1, a, 1, m, 1), x.view(b, -1, 1, a, 1, m)
        inside = (y >= 0) & (y < f_h) & (x >= 0) & (x < f_w)
        image = torch.arange(b, device=y.device).view(b, 1, 1, 1, 1, 1)
        place = self.place[image, y.clamp(0, f_h - 1), x.clamp(0, f_w - 1)]  # [B, keep, a, a, m, m]
        row = place * (side * side) + within.view(a, 1, m, 1) * side + within.view(1, a, 1, m)
        nothing = self.cells * side * side
        row = torch.where(inside, torch.where(place >= 0, row, nothing), nothing + 1)
        return row.view(-1, m * m)


def _rows(x: Tensor) -> Tensor:
    """A packed map as ``[B keep s^2, C]``, without copying."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _packed(rows: Tensor, b: int, keep: int) -> Tensor:
    return rows.view(b, keep, -1, rows.shape[1]).permute(0, 3, 1, 2)


def _padded(x: Tensor, outside: float = 0.0) -> Tensor:
    """``x [n, C]`` and two more rows: zeros for hidden positions, ``outside`` for those beyond the image."""
    rows = x.new_zeros(2, x.shape[1])
    rows[1] = outside
    return torch.cat([x, rows])


class _Gather(torch.autograd.Function):
    """``x[table]``, hidden rows zero. Backwards each row sums what its readers send: no atomic addition."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, readers: Tensor, outside: float) -> Tensor:
        ctx.save_for_backward(readers)
        return _padded(x, outside).index_select(0, table.flatten())  # [n_out k k, C]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (readers,) = ctx.saved_tensors
        return F.embedding_bag(readers, _padded(grad), mode="sum"), None, None, None


class _GatheredProduct(torch.autograd.Function):
    """``y[o] = sum_k x[table[o, k]] W_k``. The gathered rows are not kept for the backward pass but gathered again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, table: Tensor, readers: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, table, readers)
        return _padded(x).index_select(0, table.flatten()).view(len(table), -1) @ weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, table, readers = ctx.saved_tensors
        dx = dw = None
        if ctx.needs_input_grad[1]:
            dw = _padded(x).index_select(0, table.flatten()).view(len(table), -1).t() @ grad
        if ctx.needs_input_grad[0]:
            sent = grad.new_zeros(table.numel() + 1, x.shape[1])
            torch.mm(grad, weight.t(), out=sent[:-1].view(len(table), -1))
            dx = F.embedding_bag(readers, sent, mode="sum")
        return dx, dw, None, None


class PackedConv2d(nn.Conv2d):
    """A convolution that takes packed maps as well; anything else it convolves as ever."""

    scope: MaskScope

    @classmethod
    def convert(cls, layer: nn.Conv2d, scope: MaskScope) -> None:
        layer.__class__ = cls
        cast(PackedConv2d, layer).scope = scope

    def forward(self, x: Tensor) -> Tensor:
        mask = self.scope.mask
        side = mask.side(x) if isinstance(mask, PackedMask) else None
        if side is None:
            return super().forward(x)
        mask = cast(PackedMask, mask)
        weight, bias = self.weight, self.bias
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
            bias = bias if bias is None else bias.to(dtype)
        b, c, keep, _ = x.shape
        rows = _rows(x)
        kernel, stride, padding, dilation = _geometry(self)
        if kernel == 1 and stride == 1:
            return _packed(F.linear(rows, weight.flatten(1), bias), b, keep)
        if c < 16:  # rows too short to be worth gathering one by one: cells with their borders
            window = side - stride + dilation * (kernel - 1) + 1
            cells = _with_borders(mask, rows, side, window, padding)
            y = F.conv2d(cells, weight, bias, stride, 0, dilation)
            return _packed(y.permute(0, 2, 3, 1).reshape(-1, y.shape[1]), b, keep)
        geometry = (side, kernel, stride, padding, dilation)
        matrix = weight.permute(2, 3, 1, 0).reshape(-1, self.out_channels)  # [k k C, C']
        y = _GatheredProduct.apply(rows, matrix, mask.neighbours(*geometry), mask.readers(*geometry))
        return _packed(y if bias is None else y + bias, b, keep)


class PackedMaxPool2d(nn.MaxPool2d):
    """Max-pooling that takes packed maps as well. Hidden neighbours count as 0, the outside of the image not at all."""

    scope: MaskScope

    @classmethod
    def convert(cls, layer: nn.MaxPool2d, scope: MaskScope) -> None:
        layer.__class__ = cls
        cast(PackedMaxPool2d, layer).scope = scope

    def forward(self, x: Tensor) -> Tensor:
        mask = self.scope.mask
        side = mask.side(x) if isinstance(mask, PackedMask) else None
        if side is None:
            return super().forward(x)
        kernel, stride, padding, dilation = _geometry(self)
        window = side - stride + dilation * (kernel - 1) + 1
        cells = _with_borders(cast(PackedMask, mask), _rows(x), side, window, padding, outside=-math.inf)
        y = F.max_pool2d(cells, kernel, stride, 0, dilation)
        return _packed(y.permute(0, 2, 3, 1).reshape(-1, y.shape[1]), x.shape[0], x.shape[2])


def _with_borders(mask: PackedMask, rows: Tensor, side: int, window: int, padding: int, outside: float = 0.0) -> Tensor:
    """``[B keep, C, window, window]``: every visible cell with as much of its neighbours as a layer reads."""
    geometry = (side, window, side, padding)
    x = _Gather.apply(rows, mask.neighbours(*geometry), mask.readers(*geometry), outside)
    return x.view(mask.cells, window, window, -1).permute(0, 3, 1, 2)


def _geometry(layer: nn.Conv2d | nn.MaxPool2d) -> tuple[int, int, int, int]:
    """Kernel, stride, padding and dilation of a square layer."""
    sizes = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    kernel, stride, padding, dilation = (cast(int, v[0] if isinstance(v, tuple) else v) for v in sizes)
    return kernel, stride, padding, dilation


def _packs(layer: nn.Module) -> bool:
    """Square layers without groups, padded with zeros, whose outputs divide into cells wherever their inputs do."""
    if type(layer) is nn.Conv2d:
        if layer.groups != 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            return False
    elif type(layer) is not nn.MaxPool2d or layer.return_indices:
        return False
    for size in (layer.kernel_size, layer.stride, layer.padding, layer.dilation):
        if isinstance(size, tuple) and len(set(size)) > 1:
            return False
    kernel, stride, padding, dilation = _geometry(cast(Any, layer))
    overhang = 2 * padding - dilation * (kernel - 1) - 1  # size out = (size + overhang) // stride + 1
    return -stride <= overhang < 0 if not getattr(layer, "ceil_mode", False) else -stride < overhang + stride <= stride


def _unpack_before(scope: MaskScope, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    mask = scope.mask
    if not isinstance(mask, PackedMask) or mask.side(args[0]) is None:
        return None
    return (mask.dense(args[0]), *args[1:])


def _pack_after(scope: MaskScope, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
    mask = scope.mask
    return mask.pack(output) if isinstance(mask, PackedMask) and mask.fits(*output.shape[-2:]) else None


_SPATIAL = (nn.Conv2d, nn.ConvTranspose2d, nn.MaxPool2d, nn.AvgPool2d)
_SPATIAL_NAMES = ("BlurPool2d", "AvgPool2dSame", "MaxPool2dSame", "ConstantPad2d", "ZeroPad2d", "Upsample")


def convert_packed(backbone: nn.Module, scope: MaskScope) -> None:
    """Teach the layers of a converted backbone to work on packed maps too, in place."""
    for module in backbone.modules():
        if _packs(module):
            (PackedConv2d if isinstance(module, nn.Conv2d) else PackedMaxPool2d).convert(cast(Any, module), scope)
        elif isinstance(module, _SPATIAL) or type(module).__name__.startswith(_SPATIAL_NAMES):
            module.register_forward_pre_hook(partial(_unpack_before, scope))
            module.register_forward_hook(partial(_pack_after, scope))
