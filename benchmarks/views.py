"""Views: from encoded images to what workers hand over, against lightly's, albumentations' and kornia's.

`views_*` ends in normalised floats on the CPU. `worker_*` ends where worker processes end when the device makes colours
and blur: for us uint8 crops, for lightly, which knows no such division, the finished views.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import cv2
import numpy as np
import pictures
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as tv
from turns import Comparison, compare

from selfsight.datamodules.images.decode import decode
from selfsight.datamodules.views.cpu_views import CpuViews
from selfsight.datamodules.views.device_views import DeviceViews
from selfsight.datamodules.views.view import View

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
COLOUR = {"hflip": 0.5, "jitter": (0.8, 0.8, 0.8, 0.2), "jitter_p": 0.8, "grayscale": 0.2, "mean": MEAN, "std": STD}
BLUR = {"blur": 0.5, "blur_sigma": (0.1, 2.0)}

#: the recipes of lightly's SimCLRTransform and SwaVTransform, as they come
SIMCLR = [View(size=224, count=2, crop="resized", scale=(0.08, 1.0), **COLOUR, **BLUR)]
SWAV = [
    View(size=224, count=2, crop="resized", scale=(0.14, 1.0), **COLOUR, **BLUR),
    View(size=96, count=6, crop="resized", scale=(0.05, 0.14), **COLOUR, **BLUR),
]
#: half the colour and no blur, as SimCLR does on CIFAR
CIFAR = [View(size=32, count=2, crop="resized", scale=(0.08, 1.0), **(COLOUR | {"jitter": (0.4, 0.4, 0.4, 0.1)}))]

BATCHES = 5  # whose values are compared


def run(images: str | None, rounds: int) -> list[Comparison]:
    from lightly.transforms import SimCLRTransform, SwaVTransform

    files = pictures.jpegs(images, 24)
    found = []
    for name, views, transform, targets in (
        ("2x224", SIMCLR, SimCLRTransform(), (3.0, 4.5)),
        ("multicrop", SWAV, SwaVTransform(), (3.5, 6.0)),
    ):
        theirs = of_files(files, transform)
        whole, crops = Ours(files, views, photometric=True), Ours(files, views, photometric=False)
        check = f"crops {crops_differ(files, crops):.2f} levels from Pillow's; {statistics_agree(whole, theirs)}"
        options = {"items": len(files), "unit": "ms/image", "rounds": rounds}
        found.append(compare(f"views_{name}_lightly", whole, theirs, check=check, target=targets[0], **options))
        found.append(compare(f"worker_{name}_lightly", crops, theirs, check=check, target=targets[1], **options))
        arrays = of_arrays(files, views)
        check = f"it resizes with OpenCV's linear filter; {statistics_agree(whole, arrays)}"
        found.append(compare(f"views_{name}_albumentations", whole, arrays, check=check, **options))
    return found + cifar(rounds)


class Ours:
    """Decode once, all views of every image; with ``photometric`` through to normalised floats."""

    def __init__(self, files: Sequence[bytes], views: Sequence[View], photometric: bool) -> None:
        self.files, self.photometric = files, photometric
        self.cpu, self.device = CpuViews(views, photometric=photometric), DeviceViews(views)
        self.epoch = 0

    def __call__(self) -> list[Tensor]:
        self.epoch += 1
        views, self.boxes = self.cpu.batch([decode(data) for data in self.files], range(len(self.files)), self.epoch)
        return self.device.normalize(views) if self.photometric else views


def of_files(files: Sequence[bytes], transform: Callable) -> Callable[[], list[Tensor]]:
    def views() -> list[Tensor]:
        made = [transform(Image.open(io.BytesIO(data)).convert("RGB")) for data in files]
        return [torch.stack(view) for view in zip(*made, strict=True)]

    return views


def of_arrays(files: Sequence[bytes], views: Sequence[View]) -> Callable[[], list[Tensor]]:
    """The same recipe in albumentations, on images that it decodes once."""
    recipes = [by_albumentations(view) for view in views for _ in range(view.count)]

    def made() -> list[Tensor]:
        images = [
            cv2.cvtColor(cv2.imdecode(np.frombuffer(d, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB) for d in files
        ]
        return [torch.stack([recipe(image=image)["image"] for image in images]) for recipe in recipes]

    return made


def by_albumentations(view: View) -> Callable[..., dict[str, Tensor]]:
    import albumentations
    from albumentations.pytorch import ToTensorV2

    brightness, contrast, saturation, hue = view.jitter
    blur = albumentations.GaussianBlur(blur_limit=0, sigma_limit=view.blur_sigma, p=view.blur)
    made: Callable[..., dict[str, Tensor]] = albumentations.Compose(
        [
            albumentations.RandomResizedCrop((view.size, view.size), scale=view.scale),
            albumentations.HorizontalFlip(p=view.hflip),
            albumentations.ColorJitter(
                (1 - brightness, 1 + brightness), (1 - contrast, 1 + contrast), (1 - saturation, 1 + saturation),
                (-hue, hue), p=view.jitter_p,
            ),
            albumentations.ToGray(p=view.grayscale),
            *([blur] if view.blur else []),
            albumentations.Normalize(view.mean, view.std),
            ToTensorV2(),
        ]
    )  # fmt: skip
    return made


def cifar(rounds: int) -> list[Comparison]:
    from kornia import augmentation as kornia
    from lightly.transforms import SimCLRTransform

    pixels = pictures.small(512)
    simclr = SimCLRTransform(input_size=32, cj_strength=0.5, gaussian_blur=0.0)

    def lightly() -> list[Tensor]:
        made = [simclr(Image.fromarray(image)) for image in pixels]
        return [torch.stack(view) for view in zip(*made, strict=True)]

    planes = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    batched = torch.nn.Sequential(
        kornia.RandomResizedCrop((32, 32), scale=(0.08, 1.0)),
        kornia.RandomHorizontalFlip(),
        kornia.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
        kornia.RandomGrayscale(p=0.2),
        kornia.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
    )

    @torch.no_grad()
    def by_kornia() -> list[Tensor]:
        return [batched(planes.float() / 255) for _ in range(2)]

    single = by_albumentations(CIFAR[0])

    def albumentations() -> list[Tensor]:
        return [torch.stack([single(image=image)["image"] for image in pixels]) for _ in range(2)]

    cpu, device, epochs = CpuViews(CIFAR), DeviceViews(CIFAR), iter(range(1_000_000))

    def ours() -> list[Tensor]:
        return device.normalize(cpu.batch(pixels, range(len(pixels)), next(epochs))[0])

    options = {"items": len(pixels), "unit": "ms/image", "rounds": rounds}
    peers = {"lightly": (lightly, 7.0), "kornia": (by_kornia, 2.5), "albumentations": (albumentations, None)}
    return [
        compare(f"cifar_views_{name}", ours, peer, check=statistics_agree(ours, peer), target=target, **options)
        for name, (peer, target) in peers.items()
    ]


def crops_differ(files: Sequence[bytes], ours: Ours) -> float:
    """Mean difference, in levels of 255, of our crops from Pillow's of the same boxes (of the first eight images)."""
    views = ours()
    differences = []
    for view, boxes in zip(views, ours.boxes, strict=True):
        for k, data in enumerate(files[:8]):
            image = Image.open(io.BytesIO(data)).convert("RGB")
            top, left, height, width, _, _, flipped, _ = (int(value) for value in boxes[k])
            side = view.shape[-1]
            wanted = tv.resized_crop(image, top, left, height, width, [side, side], tv.InterpolationMode.BILINEAR)
            wanted = tv.hflip(wanted) if flipped else wanted
            differences.append(np.abs(np.asarray(wanted).astype(int) - view[k].permute(1, 2, 0).numpy()).mean())
    worst = float(max(differences))
    assert worst < 1, f"a crop is {worst:.1f} levels from Pillow's of the same box"
    return worst


def statistics_agree(ours: Callable[[], list[Tensor]], theirs: Callable[[], list[Tensor]]) -> str:
    """Mean and spread of the values of the views, which one recipe gives whoever follows it.

    Over some batches: of one the means differ by chance by up to a third of a standard deviation.
    """
    drawn = [[v.float() for _ in range(BATCHES) for v in side()] for side in (ours, theirs)]
    found = [torch.stack([v.mean() for v in views]).mean() for views in drawn]
    widths = [torch.stack([v.std() for v in views]).mean() for views in drawn]
    mean, width = abs(found[0] - found[1]).item(), abs(widths[0] / widths[1] - 1).item()
    assert mean < 0.25, f"the means of the views differ by {mean:.2f}"
    assert width < 0.25, f"the spreads of the views differ by {width:.0%}"
    return f"means of views differ by {mean:.2f} of a standard deviation, spreads by {width:.0%}"
