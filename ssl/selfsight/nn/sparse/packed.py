"""Computes the visible cells of a masked image and nothing else; the results are those of `selfsight.nn.sparse.layers`.

Every image has the same number of visible cells, so a map can be packed without ragged bookkeeping: the ``keep``
visible cells of side ``s`` of each image as ``[B, C, keep, s^2]``, channels last in memory. In that form everything
that works position by position, or reduces over positions, is the ordinary layer: 1x1 convolutions are one matrix
product over the visible positions, BatchNorm's batch is the visible positions, squeeze-and-excitation and group norms
see each image's visible positions, stochastic depth still drops whole images.

Only layers that read neighbours have to know where those are. A table says, for each output position and each tap of
the kernel, which row of the input it reads; extra rows stand for everything hidden and everything outside the image.
Small cells gather their taps into one matrix product; large ones gather their borders and go through the stock
convolution as small images of their own. Layers without such a form (depthwise convolutions, some pooling) take a
detour over the dense map.
"""

from __future__ import annotations

import functools
import math
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfsight.nn.precision import autocast_dtype
from selfsight.nn.sparse.layers import SPATIAL, SPATIAL_NAMES, Mask, MaskScope

#: from this side of the output cells on, borders are cheaper to gather than taps (measured on CPUs)
LARGE_CELL = 4


class Geometry(NamedTuple):
    """A square layer on cells of ``side`` positions."""

    side: int
    kernel: int
    stride: int
    padding: int
    dilation: int = 1

    @property
    def window(self) -> int:
        """Side of what one cell's outputs read together."""
        return self.side - self.stride + self.dilation * (self.kernel - 1) + 1


class _Offsets(NamedTuple):
    """Where taps lie, seen from a cell, along one side: the cell they fall into and the place within, ``[a, m]``."""

    cell: Tensor
    within: Tensor
    reach: int


@functools.lru_cache(maxsize=256)
def _tap_offsets(geometry: Geometry, device: torch.device) -> _Offsets:
    """Of the ``m = kernel`` taps of the ``a = side / stride`` outputs."""
    side, kernel, stride, padding, dilation = geometry
    return _offsets(
        [[o * stride - padding + dilation * k for k in range(kernel)] for o in range(side // stride)], side, device
    )


def _offsets(positions: list[list[int]], side: int, device: torch.device) -> _Offsets:
    cell = [[p // side for p in row] for row in positions]
    within = [[p % side for p in row] for row in positions]
    reach = max(abs(c) for row in cell for c in row)
    return _Offsets(torch.tensor(cell, device=device), torch.tensor(within, device=device), reach)


class _Readers(NamedTuple):
    """The outputs that read a position, and through which tap, along one side: ``[side, m]``; ``tap`` -1 for none."""

    outputs: _Offsets
    tap: Tensor


@functools.lru_cache(maxsize=256)
def _reader_offsets(geometry: Geometry, device: torch.device) -> _Readers:
    side, kernel, stride, padding, dilation = geometry
    readers = [
        [(at + padding - dilation * k, k) for k in range(kernel) if (at + padding - dilation * k) % stride == 0]
        for at in range(side)
    ]
    most = max(1, *(len(row) for row in readers))
    filled = [row + [(0, -1)] * (most - len(row)) for row in readers]
    outputs = _offsets([[o // stride for o, _ in row] for row in filled], side // stride, device)
    return _Readers(outputs, torch.tensor([[k for _, k in row] for row in filled], device=device))


class PackedMask(Mask):
    """A mask with the same number ``keep`` of visible cells in every image, under which maps travel packed."""

    def __init__(self, active: Tensor, keep: int) -> None:
        super().__init__(active, len(active) * keep)
        self.keep = keep
        b = len(active)
        hidden_last = (~active).flatten(1).to(torch.int8).argsort(dim=1, stable=True)
        self.visible = hidden_last[:, :keep]  # [B, keep], cell numbers in ascending order
        numbers = torch.arange(b * keep, device=active.device).view(b, keep)
        self.place = torch.full_like(hidden_last, -1).scatter_(1, self.visible, numbers).view(b, *self.grid)
        self._tables: dict[tuple[Any, ...], Tensor] = {}

    def hide(self, images: Tensor) -> Tensor:
        return self.pack(images)

    def shape(self, b: int, c: int, h: int, w: int) -> tuple[int, ...]:
        return b, c, self.keep, (h // self.grid[0]) ** 2

    def weights(self, x: Tensor, *, channels_last: bool = False) -> Tensor | None:
        """None: a packed map holds nothing hidden."""
        return None

    def side(self, x: Tensor) -> int | None:
        """Side of the cells of a packed map; None if ``x`` is none."""
        if x.ndim != 4 or x.shape[2] != self.keep:
            return None
        side = math.isqrt(x.shape[3])
        return side if side * side == x.shape[3] else None

    def pack(self, x: Tensor) -> Tensor:
        """``[B, C, f_h s, f_w s]`` to ``[B, C, keep, s^2]``."""
        b, c, h, _ = x.shape
        rows = x.permute(0, 2, 3, 1).reshape(-1, c).index_select(0, self._pixels(h // self.grid[0]))
        return _packed(rows, b, self.keep)

    def dense(self, x: Tensor) -> Tensor:
        return self.fill(x, x.new_zeros(1))

    def fill(self, x: Tensor, token: Tensor) -> Tensor:
        side = cast(int, self.side(x))
        b, c = x.shape[:2]
        h, w = self.grid[0] * side, self.grid[1] * side
        canvas = token.to(x.dtype).view(1, -1).expand(b * h * w, c)
        return canvas.index_copy(0, self._pixels(side), _rows(x)).view(b, h, w, c).permute(0, 3, 1, 2)

    def project(self, x: Tensor, token: Tensor, projection: nn.Module) -> Tensor:
        """See `Mask.project`. Hidden positions all hold the token, so what they send is computed once per tap."""
        if type(projection) is not nn.Conv2d or projection.stride != (1, 1):
            return projection(self.fill(x, token))
        weight, bias, side = projection.weight, projection.bias, cast(int, self.side(x))
        h, w = self.grid[0] * side, self.grid[1] * side
        if (dtype := autocast_dtype(x)) is not None:
            x, weight = x.to(dtype), weight.to(dtype)
        kernel, c_out = weight.shape[2], weight.shape[0]
        matrix = weight.permute(2, 3, 0, 1).reshape(-1, weight.shape[1])  # [k k C', C]
        y = _SentProduct.apply(_rows(x), matrix, token.flatten().to(x.dtype), self, side, kernel)
        y = y if bias is None else y + bias.to(y.dtype)
        return y.view(len(self.active), h, w, c_out).permute(0, 3, 1, 2)

    def senders(self, side: int, kernel: int) -> Tensor:
        """``[B h w, k k]``: what each position of the dense map receives through each tap of a ``k x k`` convolution.

        Entry ``row k k + tap`` of a visible position; ``n k k + tap`` from hidden ones; ``(n + 1) k k`` for nothing.
        """
        key = ("senders", side, kernel)
        if key not in self._tables:
            pixels, taps = self._pixels(side), kernel**2
            rows = pixels.new_full((len(self.active) * math.prod(self.grid) * side**2,), len(pixels))
            rows[pixels] = torch.arange(len(pixels), device=rows.device)
            image = rows.view(len(self.active), self.grid[0] * side, self.grid[1] * side)
            h, w, around = *image.shape[1:], kernel // 2
            image = F.pad(image * taps, (around,) * 4, value=-1)
            shifted = [image[:, y : y + h, x : x + w] for y in range(kernel) for x in range(kernel)]
            entries = [torch.where(row < 0, (len(pixels) + 1) * taps, row + tap) for tap, row in enumerate(shifted)]
            self._tables[key] = torch.stack(entries, dim=-1).view(-1, taps)
        return self._tables[key]

    def receivers(self, side: int, kernel: int) -> Tensor:
        """``[n, k k]``: the dense position that each visible one sends to through each tap, ``B h w`` for none."""
        key = ("receivers", side, kernel)
        if key not in self._tables:
            pixels, around = self._pixels(side), kernel // 2
            h, w = self.grid[0] * side, self.grid[1] * side
            shift = around - torch.arange(kernel, device=pixels.device)
            y = (pixels // w % h)[:, None] + shift  # [n, k]
            x = (pixels % w)[:, None] + shift
            inside = ((y >= 0) & (y < h))[:, :, None] & ((x >= 0) & (x < w))[:, None, :]
            target = (pixels // (h * w) * h)[:, None, None] + y[:, :, None]
            target = torch.where(inside, target * w + x[:, None, :], len(self.active) * h * w)
            self._tables[key] = target.flatten(1)
        return self._tables[key]

    def _pixels(self, side: int) -> Tensor:
        """``[B keep s^2]``: where in the dense map (row by row, image by image) each packed position lies."""
        key = ("pixels", side)
        if key not in self._tables:
            b, (f_h, f_w) = len(self.active), self.grid
            inside = torch.arange(side, device=self.active.device)
            image = torch.arange(b, device=self.active.device).view(b, 1, 1, 1) * (f_h * f_w * side * side)
            y = (self.visible // f_w).view(b, -1, 1, 1) * side + inside.view(-1, 1)  # [B, keep, s, 1]
            x = (self.visible % f_w).view(b, -1, 1, 1) * side + inside  # [B, keep, 1, s]
            self._tables[key] = (image + y * (f_w * side) + x).flatten()
        return self._tables[key]

    def neighbours(self, geometry: Geometry) -> Tensor:
        """``[n_out, k k]``: the input row that each tap of each output position reads.

        ``n_in`` stands for a hidden position and ``n_in + 1`` for one outside the image.
        """
        key = ("neighbours", *geometry)
        if key not in self._tables:
            self._tables[key] = self._rows_at(_tap_offsets(geometry, self.active.device), geometry.side)
        return self._tables[key]

    def readers(self, geometry: Geometry) -> Tensor:
        """``[n_in, m]``, the transpose of `neighbours`: entries ``output row k k + tap`` that read an input position.

        Filled up with ``n_out k k``.
        """
        key = ("readers", *geometry)
        if key not in self._tables:
            outputs, tap = _reader_offsets(geometry, self.active.device)
            side_out, taps = geometry.side // geometry.stride, geometry.kernel**2
            nothing = self.cells * side_out**2
            rows = self._rows_at(outputs, side_out)  # [n_in, m m]
            a, m = tap.shape
            vertical, horizontal = tap.view(a, 1, m, 1), tap.view(1, a, 1, m)
            both = (vertical * geometry.kernel + horizontal).view(a * a, -1)
            both = both.masked_fill(((vertical < 0) | (horizontal < 0)).view(a * a, -1), -1).repeat(self.cells, 1)
            self._tables[key] = torch.where((rows < nothing) & (both >= 0), rows * taps + both, nothing * taps)
        return self._tables[key]

    def _rows_at(self, offsets: _Offsets, side: int) -> Tensor:
        """Rows of positions given relative to each visible cell: ``[cells a a, m m]``."""
        (cell, within, reach), f_w, (b, keep) = offsets, self.grid[1], self.visible.shape
        a, m = cell.shape
        first = torch.where(self.place >= 0, self.place * side**2, -1)  # row where a cell starts
        first = F.pad(first, (reach,) * 4, value=-2)  # the outside of the image
        image = torch.arange(b, device=cell.device).view(b, 1, 1, 1) * first[0].numel()
        y = ((self.visible // f_w).view(b, keep, 1, 1) + (cell + reach)) * (f_w + 2 * reach) + image  # [B, keep, a, m]
        x = (self.visible % f_w).view(b, keep, 1, 1) + (cell + reach)
        start = first.take(y.view(b, keep, a, 1, m, 1) + x.view(b, keep, 1, a, 1, m))  # [B, keep, a, a, m, m]
        inner = (within * side).view(a, 1, m, 1) + within.view(1, a, 1, m)
        nothing = self.cells * side**2
        return torch.where(start >= 0, start + inner, nothing - 1 - start).view(-1, m * m)


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


class _Product(torch.autograd.Function):
    """``x W^T`` for ``x [n, C]``, ``W [C', C]``; the gradient of W comes in W's layout, to be kept without a copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return grad @ weight if ctx.needs_input_grad[0] else None, grad.t() @ x


class _Gather(torch.autograd.Function):
    """``x[table]``. Backwards each row sums what its readers send: no atomic addition."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: PackedMask, geometry: Geometry, outside: float) -> Tensor:
        ctx.mask, ctx.geometry = mask, geometry
        return _padded(x, outside).index_select(0, mask.neighbours(geometry).flatten())  # [n_out k k, C]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return F.embedding_bag(ctx.mask.readers(ctx.geometry), _padded(grad), mode="sum"), None, None, None


class _GatheredProduct(torch.autograd.Function):
    """``y[o] = sum_k W_k x[table[o, k]]``. The gathered rows are not kept for the backward pass but gathered again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, mask: PackedMask, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.mask, ctx.geometry = mask, geometry
        return _GatheredProduct.gathered(x, mask.neighbours(geometry)) @ weight.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        table = ctx.mask.neighbours(ctx.geometry)
        dx = dw = None
        if ctx.needs_input_grad[1]:
            dw = grad.t() @ _GatheredProduct.gathered(x, table)
        if ctx.needs_input_grad[0]:
            sent = grad.new_empty(table.numel() + 1, x.shape[1])
            torch.mm(grad, weight, out=sent[:-1].view(len(table), -1))
            sent[-1] = 0
            dx = F.embedding_bag(ctx.mask.readers(ctx.geometry), sent, mode="sum")
        return dx, dw, None, None

    @staticmethod
    def gathered(x: Tensor, table: Tensor) -> Tensor:
        """``[n_out, k k C]``."""
        return _padded(x).index_select(0, table.flatten()).view(len(table), -1)


class _SentProduct(torch.autograd.Function):
    """A ``k x k`` convolution of a map that holds ``x`` in its visible positions and ``token`` in all others.

    ``y[p] = sum_k W_k v[p + k]``, written as a sum over what the visible positions send. ``W [k k C', C]``.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, token: Tensor, mask: PackedMask, side: int, kernel: int) -> Tensor:
        ctx.save_for_backward(x, weight, token)
        ctx.mask, ctx.side, ctx.kernel = mask, side, kernel
        taps, c_out = kernel**2, len(weight) // kernel**2
        sent = x.new_empty((len(x) + 1) * taps + 1, c_out)
        torch.mm(x, weight.t(), out=sent[: len(x) * taps].view(len(x), -1))
        sent[len(x) * taps : -1] = (weight @ token).view(taps, c_out)
        sent[-1] = 0
        return F.embedding_bag(mask.senders(side, kernel), sent, mode="sum")  # [B h w, C']

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, token = ctx.saved_tensors
        taps, n = ctx.kernel**2, len(x)
        senders, receivers = ctx.mask.senders(ctx.side, ctx.kernel), ctx.mask.receivers(ctx.side, ctx.kernel)
        hidden = (senders >= n * taps) & (senders < (n + 1) * taps)  # [B h w, k k]
        d_token_sent = (hidden.t().to(grad.dtype) @ grad).flatten()  # [k k C']
        d_sent = _padded(grad).index_select(0, receivers.flatten()).view(n, -1)  # [n, k k C']
        dx = d_sent @ weight
        dw = d_sent.t() @ x + d_token_sent.outer(token)
        return dx, dw, d_token_sent @ weight, None, None, None


def _with_borders(mask: PackedMask, x: Tensor, geometry: Geometry, outside: float = 0.0) -> Tensor:
    """``[cells, C, window, window]``: every visible cell with as much of its neighbours as a layer reads."""
    window = geometry.window
    whole = Geometry(geometry.side, window, geometry.side, geometry.padding)
    return _Gather.apply(_rows(x), mask, whole, outside).view(mask.cells, window, window, -1).permute(0, 3, 1, 2)


class PackedConv2d(nn.Conv2d):
    """A convolution that takes packed maps as well; anything else it convolves as ever."""

    scope: MaskScope

    @classmethod
    def convert(cls, layer: nn.Conv2d, scope: MaskScope) -> None:
        layer.__class__ = cls
        layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)
        cast(PackedConv2d, layer).scope = scope

    def forward(self, x: Tensor) -> Tensor:
        mask = self.scope.mask
        side = mask.side(x) if isinstance(mask, PackedMask) else None
        if side is None:
            return _repacked(mask, super().forward(x))
        mask, geometry = cast(PackedMask, mask), _geometry(self, side)
        weight, bias = self.weight, self.bias
        if (dtype := autocast_dtype(x)) is not None:
            x, weight = x.to(dtype), weight.to(dtype)
            bias = bias if bias is None else bias.to(dtype)
        small_cells = side // geometry.stride < LARGE_CELL
        if geometry.kernel > 1 and (x.shape[1] < 16 or not small_cells):  # short rows do not pay for a gather either
            y = F.conv2d(_with_borders(mask, x, geometry), weight, bias, geometry.stride, 0, geometry.dilation)
            return _packed(_rows(y), x.shape[0], x.shape[2])
        matrix = weight.permute(0, 2, 3, 1).flatten(1)  # [C', k k C]
        if geometry.kernel == 1 and geometry.stride == 1:
            y = _Product.apply(_rows(x), matrix)
        else:
            y = _GatheredProduct.apply(_rows(x), matrix, mask, geometry)
        return _packed(y if bias is None else y + bias, x.shape[0], x.shape[2])


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
            return _repacked(mask, super().forward(x))
        geometry = _geometry(self, side)
        cells = _with_borders(cast(PackedMask, mask), x, geometry, outside=-math.inf)
        y = F.max_pool2d(cells, geometry.kernel, geometry.stride, 0, geometry.dilation)
        return _packed(_rows(y), x.shape[0], x.shape[2])


def _geometry(layer: nn.Conv2d | nn.MaxPool2d, side: int) -> Geometry:
    sizes = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    return Geometry(side, *(cast(int, v[0] if isinstance(v, tuple) else v) for v in sizes))


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
    _, kernel, stride, padding, dilation = _geometry(cast(Any, layer), 1)
    overhang = 2 * padding - dilation * (kernel - 1) - 1  # size out = (size + overhang) / stride + 1, rounded
    if getattr(layer, "ceil_mode", False):
        return -2 * stride < overhang <= -stride
    return -stride <= overhang < 0


def _repacked(mask: Mask | None, x: Tensor) -> Tensor:
    """Back from a detour: a dense map packed, and anything else as it is."""
    return mask.pack(x) if isinstance(mask, PackedMask) and x.ndim == 4 and mask.fits(*x.shape[-2:]) else x


def _unpack_before(scope: MaskScope, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    mask = scope.mask
    if not isinstance(mask, PackedMask) or mask.side(args[0]) is None:
        return None
    return (mask.dense(args[0]), *args[1:])


def _pack_after(scope: MaskScope, module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return _repacked(scope.mask, output)


#: what changes the size of a map without computing anything
_RESHAPING = ("ConstantPad2d", "ZeroPad2d", "Upsample", "SpaceToDepth", "PixelShuffle")


def convert_packed(backbone: nn.Module, scope: MaskScope) -> None:
    """Teach the layers of a converted backbone to work on packed maps too, in place."""
    for module in backbone.modules():
        if _packs(module):
            (PackedConv2d if isinstance(module, nn.Conv2d) else PackedMaxPool2d).convert(cast(Any, module), scope)
        elif isinstance(module, SPATIAL) or type(module).__name__.startswith((*SPATIAL_NAMES, *_RESHAPING)):
            module.register_forward_pre_hook(partial(_unpack_before, scope))
            module.register_forward_hook(partial(_pack_after, scope))
