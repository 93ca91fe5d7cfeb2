"""Views of images of any number of channels, in floats from beginning to end; the same operations for both engines.

Geometry, blur and cutout are those of every image, cutout with the mean of each channel. Brightness multiplies all
values, contrast the distances from each channel's own mean. Each channel can have a gain of its own, noise, or be
dropped for its mean. Where the images are RGB from 0 to 1, colours are jittered as `image_ops` does it. Everything
comes before mean and std, and nothing is cut to eight bits or to a range.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from selfsight.datamodules.images.bands import Bands, scaled
from selfsight.datamodules.views import image_ops, kernels
from selfsight.datamodules.views.sampling import Parameters, boxes, sample, seeds, uniforms
from selfsight.datamodules.views.view import View, expand
from selfsight.errors import UserError


def normalised_like(view: View, mean: Sequence[float], std: Sequence[float]) -> View:
    """The view with this mean and std, unless it has some for as many channels."""
    fits = view.mean is not None and len(view.mean) == len(mean)
    return view if fits else replace(view, mean=tuple(mean), std=tuple(std))


def check(views: Mapping[str, View], bands: Bands) -> None:
    """Refuse operations that these images do not know.

    Raises:
        UserError: names the view, the operation, and what to set.
    """
    for name, view in views.items():
        if wrong := _unknown(view, bands.colour):
            keys = " ".join(f"views.{name}.{remedy}" for remedy in dict.fromkeys(wrong.values()))
            choose = ", or choose three channels as red, green and blue with dataset.channels=[3,2,1]"
            raise UserError(
                f"views.{name} asks for {', '.join(wrong)}, which is for RGB of 8 bits, and the images have "
                f"{bands.kind}: set {keys}{choose if bands.kind.channels > 3 else ''}."
            )


def _unknown(view: View, colour: bool) -> dict[str, str]:
    """What a view asks for and these images do not know, each with what to set instead."""
    without = f"jitter=[{view.jitter[0]:g},{view.jitter[1]:g},0,0]"
    wrong = {}
    if view.policy is not None:
        wrong[f"the policy {view.policy}"] = "policy=null"
    if view.transforms:
        wrong["transforms of your own"] = "transforms=[]"
    if colour:
        return wrong
    if view.jitters:
        wrong |= {name: without for name, value in zip(("saturation", "hue"), view.jitter[2:], strict=True) if value}
        if view.colour == "simclr_v1" and view.jitter[0]:
            wrong["brightness that is added"] = "colour=simclr"
    return wrong | {name: f"{name}=0" for name in ("grayscale", "solarize") if getattr(view, name) > 0}


@dataclass(frozen=True)
class BandOperations:
    """What becomes of the images of a view, whatever engine draws the numbers; see the head of this file."""

    view: View
    bands: Bands

    def geometry(self, images: Tensor, p: Parameters) -> Tensor:
        """Crop, resize and flip of floats ``[B, C, H, W]``."""
        view, (height, width) = self.view, images.shape[-2:]
        if view.crop == "whole" and height == width == view.size:
            return image_ops.flip(images, p.hflip, p.vflip)
        if view.crop == "padded":
            rows = kernels.selection_matrix(p.top, view.size, height, view.padding_mode)
            columns = kernels.selection_matrix(p.left, view.size, width, view.padding_mode)
        else:
            bounded = view.crop != "center"
            rows = kernels.resize_matrix(p.top, p.height, view.size, height, view.interpolation, bounded=bounded)
            columns = kernels.resize_matrix(p.left, p.width, view.size, width, view.interpolation, bounded=bounded)
        return image_ops.resample(images, rows, columns, p.hflip, p.vflip)

    def photometric(self, images: Tensor, p: Parameters, generator: torch.Generator | None) -> Tensor:
        """Everything after the geometry and before mean and std."""
        view = self.view
        if p.factors is not None:
            images = self._jitter(images, p)
        images = self._of_each_channel(images, generator)
        if p.grayscale is not None:
            images = image_ops.grayscale(images, p.grayscale, view.colour)
        if p.sigma is not None:
            images = image_ops.blur(images, p.sigma, view.blur_kernel, view.blur_radius)
        if p.solarize is not None:
            images = image_ops.solarize(images, p.solarize, view.solarize_threshold)
        if view.drop > 0:
            images = self._dropped(images, generator)
        if p.cutout is not None:
            images = image_ops.cutout(images, p.cutout, [255 * value for value in self.bands.mean])
        return images

    def _jitter(self, images: Tensor, p: Parameters) -> Tensor:
        view = self.view
        if self.bands.colour:
            slot = (p.hue_slot if view.jitter_order == "random" else 3) if view.jitter[3] > 0 else None
            return image_ops.colour_jitter(images, p.factors, p.order, slot, view.colour)
        for slot in range(3):
            kind = p.order[:, slot]
            factor = p.factors.gather(1, kind[:, None])[:, 0]
            factor = torch.where(kind == 2, torch.ones_like(factor), factor)[:, None, None, None].to(images.dtype)
            middle = images.mean((-2, -1), keepdim=True) * (kind == 1)[:, None, None, None]
            images = torch.lerp(middle, images, factor)
        return images

    def _of_each_channel(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        view, (batch, channels) = self.view, images.shape[:2]
        if view.gain > 0:
            u = torch.rand(batch, channels, 1, 1, device=images.device, generator=generator)
            images = images * (1 + view.gain * (2 * u - 1))
        if view.noise > 0:
            spread = view.noise * images.new_tensor(self.bands.std)[:, None, None]
            images = images + spread * torch.randn(images.shape, device=images.device, generator=generator)
        return images

    def _dropped(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        """Some channels as their mean; of each image one stays at least."""
        u = torch.rand(images.shape[:2], device=images.device, generator=generator)
        kept = (u >= self.view.drop) | (u == u.amax(1, keepdim=True))
        return torch.where(kept[..., None, None], images, images.new_tensor(self.bands.mean)[:, None, None])


class CpuBandViews:
    """`CpuViews` of images of other channels or types: the result is floats, in values as `scaled` gives them."""

    def __init__(self, views: Sequence[View], bands: Bands, seed: int = 0, *, photometric: bool = True) -> None:
        expand(views)
        self.views = tuple(BandOperations(replace(view, blur_per="image"), bands) for view in views)
        self.seed, self.photometric = seed, photometric
        self.blank = np.zeros((1, 1, bands.kind.channels), bands.kind.dtype)

    def __call__(self, image: np.ndarray, index: int, epoch: int) -> tuple[list[Tensor], Tensor]:
        """One float tensor ``[C, size, size]`` per view of ``[H, W, C]``, and boxes ``[views, 8]``."""
        whole = torch.from_numpy(scaled(image)).permute(2, 0, 1)[None]
        height, width = image.shape[:2]
        made: list[Tensor] = []
        drawn: list[Tensor] = []
        for operations in self.views:
            view = operations.view
            numbers = np.arange(len(made), len(made) + view.count)
            u = torch.from_numpy(uniforms(self.seed, epoch, [index], numbers, view.draws))
            chances = seeds(self.seed, epoch, [index], numbers)
            parameters = sample(view, u, height, width)
            drawn.append(boxes(parameters, height, width))
            for row, chance in zip(_rows(parameters), chances, strict=True):
                out = operations.geometry(*_cut(whole, row, view))
                if self.photometric:
                    out = operations.photometric(out, row, torch.Generator().manual_seed(chance))
                made.append(out[0])
        return made, torch.cat(drawn)

    def batch(
        self, images: Sequence[np.ndarray] | np.ndarray, indices: Sequence[int] | np.ndarray, epoch: int
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Views of many images: one float tensor ``[B, C, size, size]`` and one of boxes ``[B, 8]`` per view."""
        each = [self(image, int(index), epoch) for image, index in zip(images, indices, strict=True)]
        stacked = [torch.stack(view) for view in zip(*(views for views, _ in each), strict=True)]
        return stacked, list(torch.stack([box for _, box in each]).unbind(1))


def _rows(parameters: Parameters) -> Iterator[Parameters]:
    """The same parameters one image at a time, each still a batch."""
    for i in range(len(parameters.top)):
        yield Parameters(*(None if column is None else column[i : i + 1] for column in parameters))


def _cut(whole: Tensor, row: Parameters, view: View) -> tuple[Tensor, Parameters]:
    """The part of an image that a resized crop is made of, and the parameters for it: less to resample."""
    top, left, height, width = (int(value) for value in row[:4])
    inside = top >= 0 and left >= 0 and top + height <= whole.shape[2] and left + width <= whole.shape[3]
    if not (view.crop.startswith("resized") and inside):
        return whole, row
    zero = torch.zeros_like(row.top)
    return whole[..., top : top + height, left : left + width], row._replace(top=zero, left=zero)


class DeviceBandViews:
    """`DeviceViews` of images of other channels or types."""

    def __init__(self, views: Sequence[View], bands: Bands, dtype: torch.dtype = torch.float32) -> None:
        self.views = tuple(BandOperations(view, bands) for view in expand(views))
        self.bands, self.dtype = bands, dtype

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> tuple[list[Tensor], list[Tensor]]:
        """Views of whole images ``[B, C, H, W]`` of the set's own type, and their boxes ``[B, 8]``."""
        whole = scaled(images)
        made, drawn = [], []
        for operations in self.views:
            parameters = self._draw(operations.view, images, generator)
            out = operations.photometric(operations.geometry(whole, parameters), parameters, generator)
            made.append(self._normalised(out, operations.view))
            drawn.append(boxes(parameters, *images.shape[-2:]))
        return made, drawn

    def photometric(self, views: Sequence[Tensor], generator: torch.Generator | None = None) -> list[Tensor]:
        """What is left to do with views that workers have cropped and flipped."""
        made = []
        for images, operations in zip(views, self.views, strict=True):
            parameters = self._draw(operations.view, images, generator)
            made.append(self._normalised(operations.photometric(images, parameters, generator), operations.view))
        return made

    def normalize(self, views: Sequence[Tensor]) -> list[Tensor]:
        """Finished views, with their mean and std."""
        return [self._normalised(images, each.view) for images, each in zip(views, self.views, strict=True)]

    def check(self) -> None:
        """Nothing that `check` of this module has not refused."""

    def _draw(self, view: View, images: Tensor, generator: torch.Generator | None) -> Parameters:
        u = torch.rand(len(images), view.draws, device=images.device, generator=generator)
        return sample(view, u, *images.shape[-2:])

    def _normalised(self, images: Tensor, view: View) -> Tensor:
        return image_ops.normalize(images, view.mean, view.std).to(self.dtype)
