"""Views made on CPU workers: one uint8 image after another, in OpenCV, from numbers fixed by (seed, epoch, index)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import repeat

import numpy as np
import torch
from torch import Tensor

from selfsight.datamodules.views import cpu_ops, own_operations
from selfsight.datamodules.views.sampling import NEUTRAL, Parameters, boxes, sample, seeds, uniforms
from selfsight.datamodules.views.view import View, expand
from selfsight.errors import UserError


class CpuViews:
    """Every view of an image as uint8, by a list of descriptions.

    Args:
        views: the kinds of views; each is made ``count`` times.
        seed: of the whole run. Draws depend on (seed, epoch, index of the image, number of the view) and on nothing
            else: neither on workers nor on the batch. (A blur sigma wanted once per batch is drawn per image here.)
        photometric: False stops after crop and flip, and leaves the rest to `DeviceViews.photometric`.

    The result is not normalised: `DeviceViews.normalize` does that for whole batches on the device.
    """

    #: what stands for an image where none can be read
    blank = np.zeros((1, 1, 3), np.uint8)

    def __init__(self, views: Sequence[View], seed: int = 0, *, photometric: bool = True) -> None:
        expand(views)
        self.views = tuple(replace(view, blur_per="image") for view in views)
        self.seed = seed
        self.photometric = photometric

    def weakened(self, strength: float) -> CpuViews:
        """The same views, from the same draws, with a share of their magnitude; see `View.weakened`."""
        if strength == 1 or not any(view.graded for view in self.views):
            return self
        return CpuViews([view.weakened(strength) for view in self.views], self.seed, photometric=self.photometric)

    def __call__(self, image: np.ndarray, index: int, epoch: int) -> tuple[list[Tensor], Tensor]:
        """Views of one image.

        Args:
            image: ``[H, W, 3]`` uint8 (``[H, W]`` and ``[H, W, 1]`` count as grey).
            index: of the image in its data set.
            epoch: of the training.

        Returns:
            one uint8 tensor ``[3, size, size]`` per view, and boxes ``[views, 8]`` (see `Batch.boxes`).
        """
        made, drawn = self.batch([image], [index], epoch)
        return [views[0] for views in made], torch.cat(drawn)

    def batch(
        self, images: Sequence[np.ndarray] | np.ndarray, indices: Sequence[int] | np.ndarray, epoch: int
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Views of many images, the same as image by image; faster where many are of one size: these draw together.

        Args:
            images: ``B`` times ``[H, W, 3]`` uint8 (``[H, W]`` and ``[H, W, 1]`` count as grey).
            indices: ``[B]``, of the images in their data set.

        Returns:
            one uint8 tensor ``[B, 3, size, size]``, in channels-last order, and one of boxes ``[B, 8]`` per view.
        """
        images, indices = [as_rgb(image) for image in images], np.asarray(indices)
        sizes: dict[tuple[int, ...], list[int]] = {}
        for k, image in enumerate(images):
            sizes.setdefault(image.shape[:2], []).append(k)
        made: list[Tensor] = []
        drawn: list[Tensor] = []
        for view in self.views:
            numbers = np.arange(len(made), len(made) + view.count)
            out = np.empty((view.count, len(images), view.size, view.size, 3), np.uint8)
            box = np.empty((view.count, len(images), 8), np.float32)
            for (height, width), members in sizes.items():
                places = [(n, k) for n in range(view.count) for k in members]
                of_images, of_views = np.tile(indices[members], view.count), np.repeat(numbers, len(members))
                u = uniforms(self.seed, epoch, of_images, of_views, view.draws)  # [places, draws]
                parameters = sample(view, u, height, width)
                box[:, members] = boxes(parameters, height, width).reshape(view.count, len(members), 8)
                for place, row in zip(places, rows(parameters), strict=True):
                    out[place] = render(view, images[place[1]], row, self.photometric)
                if view.transforms:
                    for place, chance in zip(places, seeds(self.seed, epoch, of_images, of_views), strict=True):
                        out[place] = own_operations.apply(view.transforms, out[place].copy(), chance)
            made += torch.from_numpy(out).permute(0, 1, 4, 2, 3)
            drawn += torch.from_numpy(box)
        return made, drawn


def as_rgb(image: np.ndarray) -> np.ndarray:
    """``[H, W, 3]`` from that, from ``[H, W]`` or from ``[H, W, 1]``; uint8 only."""
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3)):
        shape = "x".join(str(side) for side in image.shape)
        raise UserError(f"An image of type {image.dtype} and shape {shape} was given; views need uint8 HxWx3 or HxW.")
    if image.ndim == 2:
        image = image[..., None]
    return np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image


def rows(parameters: Parameters) -> Iterator[Parameters]:
    """The same parameters one image at a time, as plain Python numbers and lists."""
    columns = [repeat(None) if column is None else column.tolist() for column in parameters]
    return map(Parameters._make, zip(*columns, strict=False))


def render(view: View, image: np.ndarray, row: Parameters, photometric: bool = True) -> np.ndarray:
    """One view ``[size, size, 3]`` uint8 of an image, with the parameters of one `rows` entry."""
    if view.crop == "center":
        image = cpu_ops.center(image, view.size, view.crop_fraction, view.interpolation)
        image = cpu_ops.flip(image, row.hflip, row.vflip)
    else:
        image = cpu_ops.crop(
            image,
            row[:4],
            view.size,
            interpolation=view.interpolation,
            hflip=row.hflip,
            vflip=row.vflip,
            padding_mode=view.padding_mode,
        )
    if not photometric:
        return image
    if row.factors is not None:
        image = _jitter(image, row, view.colour)
    if row.operations is not None:
        for operation, value in zip(row.operations, row.values, strict=True):
            image = cpu_ops.operate(image, int(operation), value)
    if row.grayscale:
        image = cpu_ops.grayscale(image)
    if row.sigma:
        image = cpu_ops.blur(image, row.sigma, view.blur_kernel, view.blur_radius)
    if row.solarize:
        image = cpu_ops.solarize(image, view.solarize_threshold)
    if row.cutout is not None:
        image = cpu_ops.cutout(image, row.cutout, view.cutout_fill)
    return image


_ADJUST: dict[str, tuple[Callable[[np.ndarray, float], np.ndarray], ...]] = {
    "torchvision": (cpu_ops.brightness, cpu_ops.contrast, cpu_ops.saturation),
    "simclr": (cpu_ops.brightness, cpu_ops.contrast_per_channel, cpu_ops.saturation_hsv),
    "simclr_v1": (cpu_ops.brightness_added, cpu_ops.contrast_per_channel, cpu_ops.saturation_hsv),
}


def _jitter(image: np.ndarray, row: Parameters, colour: str) -> np.ndarray:
    still = NEUTRAL[colour]
    if row.factors == list(still):
        return image
    for slot in range(4):
        if row.hue_slot == slot and row.factors[3] != 0:
            image = cpu_ops.hue(image, row.factors[3])
        if slot < 3:
            kind = row.order[slot]
            if row.factors[kind] != still[kind]:
                image = _ADJUST[colour][kind](image, row.factors[kind])
    return image
