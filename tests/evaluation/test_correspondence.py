from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from selfsight.datamodules.module import ImageDataModule
from selfsight.errors import UserError
from selfsight.evaluation.dense.correspondence import DenseCorrespondence, correspondence

from .conftest import TinyBackbone
from .test_views import module  # noqa: F401 - a fixture


def test_hits_by_hand() -> None:
    q = torch.eye(4).view(1, 4, 2, 2)
    pairs = torch.eye(4, dtype=torch.bool)[None].clone()
    assert correspondence(q, q, pairs) == (4.0, 4 * 0.25, 4.0)
    pairs[0, 3] = False  # a cell outside the other view is not asked
    assert correspondence(q, q, pairs) == (3.0, 3 * 0.25, 3.0)
    turned = q.flatten(2)[:, :, [1, 0, 2, 3]].view(1, 4, 2, 2)
    assert correspondence(q, turned, pairs) == (1.0, 0.75, 3.0)
    pairs[0, 0] = True
    assert correspondence(q, turned, pairs) == (2.0, 1.5, 3.0)


class Maps(nn.Module):
    """A network whose map is a function of the image, on a 4 x 4 grid."""

    def __init__(self, function: object) -> None:
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.zeros(1))

    def forward_features(self, x: Tensor) -> Tensor:
        return self.function(x)  # type: ignore[operator]


def test_a_stage_that_is_none(module: ImageDataModule, backbone: TinyBackbone) -> None:  # noqa: F811
    with pytest.raises(UserError, match=r"'steam' is no stage of this backbone .* Did you mean 'stem'"):
        DenseCorrespondence(images=8, stage="steam").on_images(backbone, module)


def test_colours_of_the_place_are_found_again_and_noise_is_not(module: ImageDataModule) -> None:  # noqa: F811
    noise = torch.Generator().manual_seed(0)
    blind = Maps(lambda x: torch.randn(len(x), 16, 4, 4, generator=noise))
    found = DenseCorrespondence(images=64).on_images(blind, module)
    assert found["dense_correspondence"] == pytest.approx(found["dense_correspondence_chance"], abs=0.05)
    seeing = Maps(lambda x: nn.functional.adaptive_avg_pool2d(x, 4))
    again = DenseCorrespondence(images=64).on_images(seeing, module)
    assert again["dense_correspondence_chance"] == found["dense_correspondence_chance"], "the same views"
    assert again["dense_correspondence"] > 1.3 * again["dense_correspondence_chance"]
