from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from selfsight.datamodules import ArrayImages, ImageData
from selfsight.datamodules.module import ImageDataModule
from selfsight.datamodules.views.view import View
from selfsight.errors import UserError
from selfsight.evaluation.probes.diagnostics import lidar
from selfsight.evaluation.views import OPERATIONS, Invariance, ViewQuality, mean_cosine_of_others, plain_view

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


@pytest.fixture
def module() -> ImageDataModule:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(96, 3, 4, 4, generator=generator)
    pixels = (nn.functional.interpolate(coarse, size=16, mode="bilinear") * 255).to(torch.uint8)
    labels = torch.arange(96) % 4
    data = ImageData(
        "toy",
        ArrayImages(pixels[:64], labels[:64]),
        ArrayImages(pixels[64:], labels[64:]),
        tuple("abcd"),
        16,
        MEAN,
        STD,
    )
    views = [View(16, count=2, crop="resized", scale=(0.5, 1.0), hflip=0.5, mean=MEAN, std=STD)]
    return ImageDataModule(data, views, batch_size=16, num_workers=0, engine="cpu", seed=0)


class Statistic(nn.Module):
    """A network without weights that matter: its features are one function of the image."""

    def __init__(self, function: object) -> None:
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        std, mean = (torch.tensor(v).view(3, 1, 1) for v in (STD, MEAN))
        return self.function(x * std + mean)  # type: ignore[operator]


def test_invariance_is_one_where_the_features_cannot_see_the_operation(module: ImageDataModule) -> None:
    symmetric = Statistic(lambda x: (x + x.flip(3)).flatten(1) - 1)
    found = Invariance(("flip", "brightness", "solarize")).on_images(symmetric, module)
    assert found["invariance_flip"] == pytest.approx(1, abs=1e-5)
    assert found["invariance_solarize"] < found["invariance_brightness"] < 0.999
    gray = Statistic(lambda x: (0.2989 * x[:, 0] + 0.587 * x[:, 1] + 0.114 * x[:, 2]).flatten(1) - 0.5)
    assert Invariance(("grayscale",)).on_images(gray, module)["invariance_grayscale"] > 0.99


def test_a_collapsed_network_gets_no_credit_for_being_invariant(module: ImageDataModule) -> None:
    noise = torch.Generator().manual_seed(0)
    point = Statistic(lambda x: 1 + 1e-3 * torch.randn(len(x), 512, generator=noise))
    assert abs(Invariance(("hue",)).on_images(point, module)["invariance_hue"]) < 0.2


def test_every_operation_is_measured_and_a_wrong_one_named(module: ImageDataModule) -> None:
    pixels = Statistic(lambda x: x.flatten(1) - 0.5)
    found = Invariance().on_images(pixels, module)
    assert list(found) == [f"invariance_{name}" for name in OPERATIONS]
    assert all(value < 0.9999 for value in found.values()), "an operation that changes nothing was not applied"
    with pytest.raises(UserError, match="Did you mean 'hue'"):
        Invariance(("huee",))


def test_the_plain_view_is_what_evaluation_sees(module: ImageDataModule) -> None:
    data = module.data
    again = ImageDataModule(data, [plain_view(module)], batch_size=64, num_workers=0, engine="cpu", seed=0)
    (batch,) = again.train_dataloader()
    plain = torch.cat([b.views[0] for b in module.eval_dataloader("train")])
    torch.testing.assert_close(batch.views[0][batch.indices.argsort()], plain)


def test_view_quality_between_guessing_and_certainty(module: ImageDataModule) -> None:
    pixels = Statistic(lambda x: x.flatten(1) - 0.5)
    found = ViewQuality(images=64, views=3).on_images(pixels, module)
    assert set(found) == {"lidar", "alignment", "uniformity", "view_knn_top1"}
    assert 4 / 64 < found["view_knn_top1"] < 1, "pixels find some crops again, far more than guessing"
    assert 1 < found["lidar"] <= 64
    constant = Statistic(lambda x: torch.ones(len(x), 4))
    assert ViewQuality(images=64, views=3).on_images(constant, module)["view_knn_top1"] == 0


def test_lidar_closed_forms() -> None:
    axes = torch.eye(6)[:, None].expand(6, 2, 6)  # views that coincide: only delta is within
    assert lidar(axes) == pytest.approx(5, rel=1e-3), "six points span five directions around their mean"
    line = torch.linspace(-1, 1, 8)[:, None, None] * torch.ones(8, 3, 4)
    assert lidar(line) == pytest.approx(1, rel=1e-3)
    same = torch.randn(1, 4, 5).expand(7, 4, 5)  # images that coincide
    assert lidar(same) == 0
    # two directions of equal spread between images, one of them with ten times the spread between views
    images = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]], dtype=torch.float64)
    views = torch.tensor([[1.0, 0.1], [-1, -0.1]], dtype=torch.float64)
    x = images[:, None] + views[None]
    within = torch.tensor([[2.0, 0.2], [0.2, 0.02]], dtype=torch.float64) + 0.5 * torch.eye(2, dtype=torch.float64)
    ev = torch.linalg.eigvals(torch.linalg.solve(within, torch.eye(2, dtype=torch.float64))).real
    p = ev / ev.sum()
    assert lidar(x, delta=0.5) == pytest.approx(float(torch.special.entr(p).sum().exp()), rel=1e-4)


def test_lidar_of_more_dimensions_than_views() -> None:
    """Laid into a space of very many dimensions, points keep their LiDAR; as many rows as dimensions are never made."""
    x = torch.randn(9, 3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[..., 0] *= 5
    wide = torch.linalg.qr(torch.randn(30_000, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).Q
    assert lidar(x @ wide.T) == pytest.approx(lidar(x), rel=1e-6)


def test_mean_cosine_of_others_is_the_mean_off_the_diagonal() -> None:
    x = nn.functional.normalize(torch.randn(9, 4, dtype=torch.float64), dim=1)
    similarity = x @ x.T
    expected = (similarity.sum() - similarity.trace()) / 72
    assert mean_cosine_of_others(x) == pytest.approx(float(expected))
