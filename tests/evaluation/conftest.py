from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from selfsight.contracts import Batch
from selfsight.evaluation.features import Features


class TinyBackbone(nn.Module):
    """Two convolutions with BatchNorm and dropout behind timm's interface."""

    num_features = 6

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.top = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5))
        self.feature_info = [
            {"num_chs": 4, "reduction": 1, "module": "stem"},
            {"num_chs": 6, "reduction": 2, "module": "top"},
        ]

    def forward_features(self, x: Tensor) -> Tensor:
        return self.top(self.stem(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_features(x).mean(dim=(2, 3))


@pytest.fixture
def backbone() -> TinyBackbone:
    torch.manual_seed(0)
    return TinyBackbone()


@pytest.fixture
def batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        Batch([torch.randn(len(rows), 3, 9, 9, generator=generator)], rows, rows % 3)
        for rows in torch.arange(12).split(5)
    ]


def clusters(n: int, classes: int, dim: int, *, spread: float = 0.3, seed: int = 0, centres: int = 0) -> Features:
    """Gaussian clouds around random centres, classes in turn; the centres depend on ``centres`` only."""
    middle = torch.randn(classes, dim, generator=torch.Generator().manual_seed(centres))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    return Features(middle[labels] + spread * torch.randn(n, dim, generator=generator), labels, torch.arange(n))
