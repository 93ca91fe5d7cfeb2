"""What the features do when an image is augmented: quality without labels, and invariance operation by operation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from selfsight.contracts import Batch
from selfsight.evaluation.features import Device, frozen, home
from selfsight.evaluation.probes.diagnostics import lidar, view_figures
from selfsight.nn.sphere import directions
from selfsight.validation import one_of, takes, whole

#: the same for every method, so that their figures compare
STANDARD: Mapping[str, Any] = {
    "crop": "resized",
    "scale": (0.2, 1.0),
    "hflip": 0.5,
    "jitter": (0.4, 0.4, 0.4, 0.1),
    "jitter_p": 0.8,
    "grayscale": 0.2,
}
OPERATIONS: Mapping[str, Mapping[str, Any]] = {
    "crop": {"crop": "resized", "scale": (0.2, 1.0)},
    "flip": {"hflip": 1.0},
    "brightness": {"jitter": (0.4, 0.0, 0.0, 0.0)},
    "contrast": {"jitter": (0.0, 0.4, 0.0, 0.0)},
    "saturation": {"jitter": (0.0, 0.0, 0.4, 0.0)},
    "hue": {"jitter": (0.0, 0.0, 0.0, 0.1)},
    "grayscale": {"grayscale": 1.0},
    "blur": {"blur": 1.0, "blur_taps": 9},  # the usual width, a tenth of the image, is nothing on small ones
    "solarize": {"solarize": 1.0},
}


@takes(images=whole(2), views=whole(2), seed=whole(0))
@dataclass(frozen=True)
class ViewQuality:
    """Figures of augmented views, without labels: LiDAR, alignment, uniformity, and the kNN of views.

    Attributes:
        images: how many training images. views: of each, drawn as `STANDARD` says; LiDAR needs several.
    """

    images: int = 1024
    views: int = 8
    seed: int = 0
    needs_labels = False

    @property
    def protocol(self) -> str:
        return f"{self.views} views (crop, flip, colour) each of at most {self.images} training images, frozen features"

    def on_images(self, backbone: nn.Module, datamodule: Any, device: Device = None) -> dict[str, float]:
        """``lidar``, ``alignment``, ``uniformity``, ``view_knn_top1``, the last three of the first two views."""
        view = replace(plain_view(datamodule), count=self.views, **STANDARD)
        x = view_features(backbone, datamodule, [view], "train", self.images, self.seed, device)  # [n, views, D]
        return {"lidar": lidar(x)} | view_figures(x[:, 0], x[:, 1])


@takes(operations=one_of(*OPERATIONS), images=whole(2), seed=whole(0))
@dataclass(frozen=True)
class Invariance:
    """How far each operation alone moves the features, from 1 (not at all) down to 0 (as far as another image).

    It is (c - c0) / (1 - c0), with c the mean cosine of an image's features with and without the operation, and c0 the
    mean cosine of different images: so that an embedding whose features are all alike gets no credit for it.

    Attributes:
        operations: names from `OPERATIONS`, which says how strong each is; None: all.
    """

    operations: Sequence[str] | None = None
    images: int = 1024
    seed: int = 0
    needs_labels = False

    @property
    def protocol(self) -> str:
        return (
            f"cosine of frozen features with and without one operation (another image: 0), at most {self.images} test "
            "images (training images where there is no test set)"
        )

    def on_images(self, backbone: nn.Module, datamodule: Any, device: Device = None) -> dict[str, float]:
        """``invariance_<operation>`` by operation."""
        names = list(self.operations or OPERATIONS)
        plain = plain_view(datamodule)
        changed = [replace(plain, **OPERATIONS[name]) for name in names]
        split = "train" if datamodule.data.test is None else "test"
        x = directions(
            view_features(backbone, datamodule, [plain, *changed], split, self.images, self.seed, device), dim=2
        )
        others = mean_cosine_of_others(x[:, 0])
        cosines = (x[:, :1] * x[:, 1:]).sum(dim=2).mean(dim=0)
        left = max(1 - others, 1e-12)
        return {f"invariance_{name}": float((c - others) / left) for name, c in zip(names, cosines, strict=True)}


def mean_cosine_of_others(x: Tensor) -> float:
    """Mean cosine over pairs of different rows of unit vectors ``[N, D]``."""
    n = len(x)
    x = x.double()
    return float((x.sum(dim=0).square().sum() - x.square().sum()) / (n * (n - 1)))


def plain_view(datamodule: Any) -> Any:
    """The view evaluation sees, as a description that operations can be added to."""
    data, like = datamodule.data, datamodule.views[0]
    fraction = data.image_size / (data.eval_resize or data.image_size)
    return type(like)(data.image_size, crop="center", crop_fraction=min(1.0, fraction), mean=like.mean, std=like.std)


def view_batches(
    datamodule: Any, views: list[Any], split: str, images: int, seed: int, **settings: Any
) -> Iterator[Batch]:
    """One pass over (some of) a split's images, each with the given views; whole batches only.

    ``images`` are spread evenly over the split: files usually stand sorted by class. Of a semi-supervised run they are
    those that it learns from without labels.
    """
    like = getattr(datamodule, "unlabelled", datamodule)
    source = like.data.split(split)
    n = min(images, len(source))
    batch = min(settings.pop("batch_size", 256), n)
    rows = torch.linspace(0, len(source) - 1, n // batch * batch).long()
    data = replace(like.data, train=source.select(rows), unlabelled=None)
    module = type(like)(
        data, views, batch_size=batch, num_workers=like.num_workers, engine="auto", seed=seed,
        device=settings.pop("device", None),
    )  # fmt: skip
    yield from module.train_dataloader()


def view_features(
    backbone: nn.Module,
    datamodule: Any,
    views: list[Any],
    split: str,
    images: int,
    seed: int,
    device: Device = None,
) -> Tensor:
    """Features ``[n, views, D]`` (CPU, float32) of several views of the same images, in whatever order they come."""
    device = home(backbone, device)
    found = []
    with frozen(backbone):
        for batch in view_batches(datamodule, views, split, images, seed, device=device):
            found.append(torch.stack([backbone(view.to(device)).float().cpu() for view in batch.views], dim=1))
    return torch.cat(found)
