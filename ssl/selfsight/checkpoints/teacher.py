"""A network that another one learns from: frozen, and shown images as it was trained with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfsight.backbones.interface import feature_map
from selfsight.backbones.registry import create, is_known, weights_line
from selfsight.checkpoints import hub
from selfsight.checkpoints.importing import import_weights
from selfsight.checkpoints.load import described, load, of_others
from selfsight.errors import UserError


class FrozenTeacher(nn.Module):
    """A backbone in eval mode, without gradient, behind a change from a student's images to its own.

    Args:
        net: with `num_features`. Its ``spec``, as `selfsight.load` gives it, says the size and the normalisation of
            its images; where there is none, they are the student's.
        mean, std: with which the student's images are normalised; ``[0]`` and ``[1]`` where they are not.

    Attributes:
        scale: ``[C, 1, 1]``, times the student's images. shift: ``[C, 1, 1]``, added to that.
        about: what is shown to it, for the head of a run.

    Raises:
        UserError: it does not say how many features it has.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, net: nn.Module, *, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if not isinstance(getattr(net, "num_features", None), int):
            raise UserError(
                f"the teacher is a {type(net).__name__} that does not say its num_features; give a backbone, as "
                "selfsight.backbone and selfsight.load make them."
            )
        self.net = net.requires_grad_(False).eval()
        self.num_features: int = net.num_features  # type: ignore[assignment]
        size, own_mean, own_std = images_of(net, mean, std)
        self.size = size
        s, t = torch.tensor([mean, std], dtype=torch.float32), torch.tensor([own_mean, own_std], dtype=torch.float32)
        self.register_buffer("scale", (s[1] / t[1])[:, None, None])
        self.register_buffer("shift", ((s[0] - t[0]) / t[1])[:, None, None])
        like = (own_mean, own_std) == (list(mean), list(std))
        normalised = "normalised as the student's" if like else "normalised as its own"
        resized = f"{size} x {size} pixels" if size else "the student's size"
        self.about = f"{self.num_features} features of images of {resized}, {normalised}"

    def extra_repr(self) -> str:
        return f"size={self.size}"  # features depend on it, and what keeps them goes by this text and the weights

    def train(self, mode: bool = True) -> FrozenTeacher:
        return super().train(False)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Features ``[B, num_features]`` of a student's images."""
        features: Tensor = self.net(self.images(x))
        return features

    @torch.no_grad()
    def forward_map(self, x: Tensor) -> Tensor:
        """Their last map ``[B, num_features, h, w]``."""
        return feature_map(self.net, self.images(x))

    def images(self, x: Tensor) -> Tensor:
        """A student's images as the teacher knows them."""
        x = x * self.scale.to(x.dtype) + self.shift.to(x.dtype)
        if self.size is None or x.shape[-2:] == (self.size, self.size):
            return x
        return F.interpolate(x, (self.size, self.size), mode="bicubic", antialias=True, align_corners=False)


class FeatureTable:
    """A teacher's features of all images, looked up by the images' indices in place of asking it again.

    Args:
        x: ``[n, D]``. Very many lie in a file in half precision and stay there; others go to ``device``.
        indices: ``[n]`` int64, the image that each row is of.
        device: where they are asked for.
    """

    def __init__(self, x: Tensor, indices: Tensor, device: torch.device | str = "cpu") -> None:
        row = torch.full((int(indices.max()) + 1,), -1)
        row[indices] = torch.arange(len(indices))
        home = "cpu" if x.dtype == torch.float16 else device
        self.x, self.row, self.device = x.to(home), row.to(home), device

    def __call__(self, indices: Tensor) -> Tensor:
        """Features ``[B, D]`` of the images ``indices [B]``."""
        rows = self.row[indices.to(self.row.device)]
        return self.x[rows].to(self.device, torch.float32)


def images_of(
    net: nn.Module, mean: Sequence[float], std: Sequence[float]
) -> tuple[int | None, list[float], list[float]]:
    """Size and normalisation of the images a network was trained with; those given where it does not say."""
    spec: Any = getattr(net, "spec", None)
    if spec is None:
        return None, list(mean), list(std)
    own_mean, own_std = spec.get("mean", mean), spec.get("std", std)  # null: images from 0 to 1
    return spec.get("image_size"), list(own_mean or [0.0] * len(mean)), list(own_std or [1.0] * len(std))


def network_called(name: str) -> tuple[nn.Module, str]:
    """A trained network by the place or name it has, and a line on what it is.

    Args:
        name: a run or backbone folder, ``hf-hub:PERSON/MODEL``, a checkpoint of others, or a network of timm.

    Raises:
        UserError: there is none; see `selfsight.load`, `selfsight.import_weights`, and `create` for the three cases.
    """
    if name.startswith(hub.PREFIX):
        return load(name), name
    if (file := of_others(name)) is not None:
        return import_weights(file), name
    if Path(name).expanduser().is_dir():
        return load(name), name
    if is_known(name):
        net = create(name, pretrained=True)
        net.spec = {key: described(net, key) for key in ("image_size", "mean", "std")}
        return net, weights_line(net)
    raise UserError(
        f"there is no teacher '{name}': neither a run or backbone folder, nor a file of weights, nor a network of "
        "timm; a model of the Hub is hf-hub:PERSON/MODEL."
    )
