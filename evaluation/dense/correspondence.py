"""Does a place look the same to the network in two views: nearest neighbours among the cells of two feature maps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from selfsight.errors import UserError
from selfsight.evaluation.features import FINAL, Device, home, staged
from selfsight.evaluation.views import STANDARD, plain_view, view_batches
from selfsight.losses.pixpro import positives
from selfsight.nn.boxes import corners
from selfsight.nn.sphere import directions
from selfsight.validation import above, takes, whole


@takes(images=whole(1), pos_ratio=above(0), seed=whole(0))
@dataclass(frozen=True)
class DenseCorrespondence:
    """For each cell of one view that has a partner in the other: is the most similar cell there a partner? No labels.

    Partners are PixPro's positive pairs: centres less than ``pos_ratio`` diagonals of the larger cell apart.

    Attributes:
        images: how many training images. stage: whose map; the last by default.
    """

    images: int = 1024
    pos_ratio: float = 0.7
    stage: str = FINAL
    seed: int = 0
    needs_labels = False

    @property
    def protocol(self) -> str:
        return (
            f"cells of two views (crop, flip, colour) of {self.images} training images: share whose nearest cell by "
            f"cosine lies within {self.pos_ratio:g} cell diagonals, beside the share guessing gives"
        )

    def on_images(self, backbone: nn.Module, datamodule: Any, device: Device = None) -> dict[str, float]:
        """``dense_correspondence`` and ``dense_correspondence_chance``."""
        device = home(backbone, device)
        view = replace(plain_view(datamodule), count=2, **STANDARD)
        hits = partners = cells = 0.0
        with staged(backbone, [self.stage], maps=True) as outputs:
            for batch in view_batches(datamodule, [view], "train", self.images, self.seed, device=device):
                maps = [outputs(images.to(device))[self.stage].float() for images in batch.views]
                assert batch.boxes is not None, "crops come with their boxes"
                a, b = (corners(box.to(device)) for box in batch.boxes)
                h, w = maps[0].shape[2:]
                pairs = positives(a, b, (h, w), pos_ratio=self.pos_ratio)  # [B, HW, HW]
                found, chance, queries = correspondence(maps[0], maps[1], pairs)
                hits, partners, cells = hits + found, partners + chance, cells + queries
        if not cells:
            raise UserError("No cell of any view has a partner in the other: take larger crops or maps.")
        return {"dense_correspondence": hits / cells, "dense_correspondence_chance": partners / cells}


def correspondence(q: Tensor, k: Tensor, pairs: Tensor) -> tuple[float, float, float]:
    """Sums over the cells of ``q`` that have partners: hits, the share of cells that are partners, and their number.

    Args:
        q, k: ``[B, D, H, W]``. pairs: ``[B, HW, HW]`` bool, rows the cells of ``q``.
    """
    similarity = directions(q.flatten(2)).transpose(1, 2) @ directions(k.flatten(2))  # [B, HW, HW]
    nearest = similarity.argmax(dim=2, keepdim=True)
    asked = pairs.any(dim=2)
    hits = (pairs.gather(2, nearest)[..., 0] & asked).sum()
    chance = (pairs.double().mean(dim=2) * asked).sum()
    return float(hits), float(chance), float(asked.sum())
