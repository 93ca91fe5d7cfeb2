"""Views made on the device: whole uint8 batches in, float views out, in plain torch that compiles into one graph."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from selfsight.datamodules.views import image_ops, kernels, policy_ops
from selfsight.datamodules.views.sampling import Parameters, boxes, sample
from selfsight.datamodules.views.view import View, expand
from selfsight.errors import UserError


class DeviceViews:
    """Every view of a batch, by a list of descriptions.

    Args:
        views: the kinds of views; each is made ``count`` times.
        compile: compile each kind of view as one graph.
        dtype: of the views, and of the arithmetic between crop and normalisation.

    Randomness is per image and comes from the generator handed in, which lives on the device of the images. Views are
    normalised with the mean and std of their description.
    """

    def __init__(self, views: Sequence[View], *, compile: bool = False, dtype: torch.dtype = torch.float32) -> None:
        self.views = tuple(expand(views))
        self.dtype = dtype
        self._makers = {
            (view, cropped): _Maker(functools.partial(make, view=view, dtype=dtype, cropped=cropped), compile)
            for view in set(self.views)
            for cropped in (False, True)
        }

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> tuple[list[Tensor], list[Tensor]]:
        """Views of whole images.

        Args:
            images: ``[B, 3, H, W]`` uint8.
            generator: source of randomness on the images' device; None is the global one.

        Returns:
            per view a float tensor ``[B, 3, size, size]``, and its boxes ``[B, 8]`` (see `Batch.boxes`).
        """
        self.check()
        _check(images)
        made = [self._makers[view, False](images, _draw(view, images, generator)) for view in self.views]
        return [out for out, _ in made], [box for _, box in made]

    def photometric(self, views: Sequence[Tensor], generator: torch.Generator | None = None) -> list[Tensor]:
        """Colour, policy, blur, solarize, cutout and normalisation of views that workers have cropped and flipped.

        Args:
            views: per view ``[B, 3, size, size]`` uint8, as `CpuViews` with ``photometric=False`` makes them.

        Returns:
            per view a float tensor of the same shape.
        """
        self.check()
        self._count(views)
        return [
            self._makers[view, True](images, _draw(view, images, generator))[0]
            for images, view in zip(views, self.views, strict=True)
        ]

    def check(self) -> None:
        """Refuse what cannot be made for whole batches.

        Raises:
            UserError: views with operations of one's own.
        """
        if any(view.transforms for view in self.views):
            raise UserError(
                "the views have transforms of your own, which are made on the CPU, image by image: set "
                "views.engine=cpu (or auto), or leave the transforms out."
            )

    def normalize(self, views: Sequence[Tensor]) -> list[Tensor]:
        """Finished uint8 views as normalised floats."""
        self._count(views)
        return [
            image_ops.normalize(images, view.mean, view.std).to(self.dtype)
            for images, view in zip(views, self.views, strict=True)
        ]

    def _count(self, views: Sequence[Tensor]) -> None:
        if len(views) != len(self.views):
            raise UserError(f"{len(views)} views were given where the description makes {len(self.views)}.")
        for view in views:
            _check(view)


class _Maker:
    """`make` for one kind of view, compiled if asked; where compiling fails, plain, after one warning."""

    def __init__(self, function: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], compile: bool) -> None:
        self._plain = function
        self._compiled = torch.compile(function, fullgraph=True, dynamic=False) if compile else None

    def __call__(self, images: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        if self._compiled is not None:
            try:
                return self._compiled(images, u)
            except Exception as error:  # a missing compiler shows as many kinds of error
                reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
                warnings.warn(f"Views could not be compiled and run uncompiled: {reason[0]}", stacklevel=3)
                self._compiled = None
        return self._plain(images, u)


def _check(images: Tensor) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise UserError(
            f"Images of type {str(images.dtype).removeprefix('torch.')} and shape {list(images.shape)} were given; "
            "device views need uint8 [B, 3, H, W]."
        )


def _draw(view: View, images: Tensor, generator: torch.Generator | None) -> Tensor:
    """Uniform numbers ``[B', draws]``: a row per image, and more to fill a jittered batch up to a multiple of 4."""
    rows = len(images) + (-len(images) % 4 if _in_quarters(view) else 0)
    return torch.rand(rows, view.draws, device=images.device, generator=generator)


def _in_quarters(view: View) -> bool:
    return view.jitters and view.jitter_order == "random" and view.jitter[3] > 0


def make(images: Tensor, u: Tensor, view: View, dtype: torch.dtype, cropped: bool) -> tuple[Tensor, Tensor]:
    """One view of each image from uniform numbers.

    The hue is computed once an image, for one quarter of the batch at each of its four places in the jitter. Which
    quarter an image falls into is drawn: the batch is put in the order of the numbers for the hue's place, and back at
    the end. Extra rows repeat images, so that a batch of any length, even of one, has every place equally likely.

    Args:
        images: ``[B, 3, H, W]`` uint8.
        u: ``[B', view.draws]`` in [0, 1).
        cropped: the images are views already cropped and flipped.

    Returns:
        ``[B, 3, size, size]`` of ``dtype`` and boxes ``[B, 8]``.
    """
    batch, (height, width) = len(images), images.shape[-2:]
    if not _in_quarters(view):
        parameters = sample(view, u, height, width)
        return _apply(images, parameters, view, dtype, cropped, False), boxes(parameters, height, width)
    arrangement = u[:, view.columns["hue_slot"].start].argsort()
    back = arrangement.argsort()[:batch]
    parameters = sample(view, u[arrangement], height, width)
    made = _apply(images[arrangement % batch], parameters, view, dtype, cropped, True)
    return made[back], boxes(parameters, height, width)[back]


def apply(images: Tensor, parameters: Parameters, view: View, dtype: torch.dtype = torch.float32) -> Tensor:
    """One view of each image with given parameters: ``[B, 3, H, W]`` uint8 to ``[B, 3, size, size]``."""
    return _apply(images, parameters, view, dtype, False, False)


def _apply(
    images: Tensor, parameters: Parameters, view: View, dtype: torch.dtype, cropped: bool, in_quarters: bool
) -> Tensor:
    out = images.to(dtype) / 255
    if not cropped:
        out = geometry(out, parameters, view)
    out = _colour(out, parameters, view, in_quarters)
    return image_ops.normalize(out, view.mean, view.std)


def geometry(images: Tensor, p: Parameters, view: View) -> Tensor:
    """Crop, resize and flip of floats ``[B, 3, H, W]``."""
    height, width = images.shape[-2:]
    if view.crop == "whole" and height == width == view.size:
        return image_ops.flip(images, p.hflip, p.vflip)
    if view.crop == "padded":
        rows = kernels.selection_matrix(p.top, view.size, height, view.padding_mode)
        columns = kernels.selection_matrix(p.left, view.size, width, view.padding_mode)
        return image_ops.resample(images, rows, columns, p.hflip, p.vflip)
    return image_ops.crop_resize(
        images,
        *p[:4],
        view.size,
        interpolation=view.interpolation,
        hflip=p.hflip,
        vflip=p.vflip,
        bounded=view.crop != "center",
    )


def _colour(images: Tensor, p: Parameters, view: View, in_quarters: bool) -> Tensor:
    if p.factors is not None and in_quarters:
        images = image_ops.colour_jitter_in_quarters(images, p.factors, p.order, view.colour)
    elif p.factors is not None:
        slot = p.hue_slot if view.jitter_order == "random" else 3
        slot = slot if view.jitter[3] > 0 else None
        images = image_ops.colour_jitter(images, p.factors, p.order, slot, view.colour)
    elif view.interpolation.startswith("bicubic_simclr"):
        images = images.clamp(0, 1)
    if p.operations is not None:
        images = policy_ops.apply_policy(images, p.operations, p.values)
    if p.grayscale is not None:
        images = image_ops.grayscale(images, p.grayscale, view.colour)
    if p.sigma is not None:
        images = image_ops.blur(images, p.sigma, view.blur_kernel, view.blur_radius)
    if p.solarize is not None:
        images = image_ops.solarize(images, p.solarize, view.solarize_threshold)
    if p.cutout is not None:
        images = image_ops.cutout(images, p.cutout, view.cutout_fill)
    return images
