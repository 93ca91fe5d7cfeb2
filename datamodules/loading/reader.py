"""What worker processes do: read the images of one step, cut views out of them, and ship uint8."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from selfsight.datamodules.images.bands import scaled
from selfsight.datamodules.images.decode import Unreadable
from selfsight.datamodules.images.sets import ImageSet
from selfsight.datamodules.loading.order import Request
from selfsight.datamodules.views.band_views import CpuBandViews
from selfsight.datamodules.views.cpu_ops import mostly_cut_away, square_of_resized
from selfsight.datamodules.views.cpu_views import CpuViews
from selfsight.datamodules.views.image_ops import resample
from selfsight.datamodules.views.kernels import resize_matrix
from selfsight.optim.curriculum import Curriculum


@dataclass
class RawBatch:
    """The images of one step before the device has its turn.

    Attributes:
        epoch, step: where in the run the batch stands.
        indices: ``[B]`` positions in the set. labels: ``[B]``, or None.
        views: per view ``[B, 3, h, w]`` uint8; empty when the device gathers the images itself.
        boxes: per view ``[B, 8]``; empty when the device cuts the views.
        skipped: number and reason of every unreadable file met.
    """

    epoch: int
    step: int
    indices: Tensor
    labels: Tensor | None = None
    views: list[Tensor] = field(default_factory=list)
    boxes: list[Tensor] = field(default_factory=list)
    skipped: list[tuple[int, str]] = field(default_factory=list)

    def _map(self, move: Callable[[Tensor], Tensor]) -> RawBatch:
        moved: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        moved["indices"] = move(self.indices)
        moved["labels"] = None if self.labels is None else move(self.labels)
        moved["views"], moved["boxes"] = [move(v) for v in self.views], [move(b) for b in self.boxes]
        return RawBatch(**moved)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> RawBatch:
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def record_stream(self, stream: Any) -> None:
        """Keep the memory of tensors made on another stream until ``stream`` is done with them."""
        for tensor in (self.indices, *([] if self.labels is None else [self.labels]), *self.views, *self.boxes):
            if tensor.device.type != "cpu":
                tensor.record_stream(stream)

    def pin_memory(self) -> RawBatch:
        return self._map(lambda tensor: tensor.pin_memory())

    @classmethod
    def joined(cls, parts: Sequence[RawBatch]) -> RawBatch:
        """The parts of one step, read by several processes, as one batch."""
        if len(parts) == 1:
            return parts[0]
        labels = [part.labels for part in parts if part.labels is not None]
        return cls(
            parts[0].epoch,
            parts[0].step,
            torch.cat([part.indices for part in parts]),
            torch.cat(labels) if labels else None,
            [torch.cat(same) for same in zip(*(part.views for part in parts), strict=True)],
            [torch.cat(same) for same in zip(*(part.boxes for part in parts), strict=True)],
            [missed for part in parts for missed in part.skipped],
        )


class TrainingReader:
    """Request -> `RawBatch`: every image is decoded once, and all its views are cut from it.

    An unreadable file gives its place to the next readable image of the set, whatever process meets it. With a
    curriculum the views are as strong as it has them in the epoch.
    """

    def __init__(self, images: ImageSet, views: CpuViews | CpuBandViews, curriculum: Curriculum | None = None) -> None:
        self.images, self.views, self.curriculum = images, views, curriculum

    def __getitem__(self, request: Request) -> RawBatch:
        maker = self._views_in(request.epoch)
        images, indices, skipped = [], [], []
        for index in request.indices:
            image, index, missed = self._readable(index)
            images.append(image)
            indices.append(index)
            skipped += missed
        # The number of the draw stands for image and epoch: an image drawn twice is never cut twice alike.
        views, boxes = maker.batch(images, request.draws, epoch=0)
        chosen = torch.tensor(indices)
        labels = None if self.images.labels is None else self.images.labels[chosen]
        return RawBatch(request.epoch, request.step, chosen, labels, views, boxes, skipped)

    def _views_in(self, epoch: int) -> CpuViews | CpuBandViews:
        if self.curriculum is None or isinstance(self.views, CpuBandViews):  # these have no policy
            return self.views
        return self.views.weakened(self.curriculum.strength(epoch))

    def _readable(self, index: int) -> tuple[np.ndarray, int, list[tuple[int, str]]]:
        missed: list[tuple[int, str]] = []
        for offset in range(len(self.images)):
            candidate = (index + offset) % len(self.images)
            try:
                return self.images.read(candidate), candidate, missed
            except Unreadable as reason:
                missed.append((candidate, str(reason)))
        return self.views.blank, index, missed  # nothing is readable: whoever counts them will say so


class PixelReader:
    """Request -> `RawBatch` of images in memory; without ``pixels`` only their numbers, for a device that has them."""

    def __init__(self, images: ImageSet, pixels: Tensor | None) -> None:
        self.images, self.pixels = images, pixels

    def __getitem__(self, request: Request) -> RawBatch:
        chosen = torch.tensor(request.indices)
        labels = None if self.images.labels is None else self.images.labels[chosen]
        views = [] if self.pixels is None else [self.pixels[chosen]]
        return RawBatch(request.epoch, request.step, chosen, labels, views)


class EvaluationReader:
    """Request -> `RawBatch` with one view: resized, central square, in order; unreadable files are left out.

    Args:
        channels: of images that are not RGB of eight bits, whose view is made of floats; None for those that are.
    """

    def __init__(self, images: ImageSet, resize: int, size: int, channels: int | None = None) -> None:
        self.images, self.resize, self.size, self.channels = images, resize, size, channels

    def __getitem__(self, request: Request) -> RawBatch:
        squares, indices, skipped = [], [], []
        for index in request.indices:
            try:
                pixels = self.images.read(index)
            except Unreadable as reason:
                skipped.append((index, str(reason)))
                continue
            pixels = pixels if self.channels is None else scaled(pixels)
            image = torch.from_numpy(pixels).permute(2, 0, 1)[None]
            squares.append(central_square(image, self.resize, self.size))
            indices.append(index)
        chosen = torch.tensor(indices, dtype=torch.int64)
        labels = None if self.images.labels is None else self.images.labels[chosen]
        return RawBatch(request.epoch, request.step, chosen, labels, [self._joined(squares)], [], skipped)

    def _joined(self, squares: list[Tensor]) -> Tensor:
        if squares:
            return torch.cat(squares)
        dtype = torch.uint8 if self.channels is None else torch.float32
        return torch.empty(0, self.channels or 3, self.size, self.size, dtype=dtype)


def central_square(images: Tensor, resize: int, size: int) -> Tensor:
    """Shorter side to ``resize`` (antialiased bilinear), then the central ``size`` square.

    Args:
        images: ``[B, 3, H, W]`` uint8, or floats of any number of channels.
    """
    height, width = images.shape[-2:]
    short = min(height, width)
    if short == resize:
        whole = height, width
    else:
        whole = max(size, round(height * resize / short)), max(size, round(width * resize / short))
    top, left = (whole[0] - size) // 2, (whole[1] - size) // 2
    if mostly_cut_away((height, width), whole, size) and images.is_floating_point():
        sides = zip((top, left), (height, width), whole, strict=True)
        parts = [(torch.tensor([at * n / of]), torch.tensor([size * n / of]), size, n) for at, n, of in sides]
        return resample(images, *(resize_matrix(*part, "bilinear", bounded=False) for part in parts))
    if mostly_cut_away((height, width), whole, size):
        cut = [square_of_resized(image, whole, (top, left), size, "bilinear") for image in images.movedim(1, 3).numpy()]
        return torch.from_numpy(np.stack(cut)).movedim(3, 1)
    if whole != (height, width):
        images = functional.interpolate(images, whole, mode="bilinear", antialias=True)
    return images[..., top : top + size, left : left + size]
