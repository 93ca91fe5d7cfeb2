from __future__ import annotations

import pytest
import torch

from selfsight.errors import UserError
from selfsight.evaluation.features import Features
from selfsight.evaluation.probes.comparison import compare, linear_cka, neighbour_overlap

from .conftest import clusters


def orthonormal(n: int, k: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(n, k, dtype=torch.float64, generator=torch.Generator().manual_seed(5)))[0]


def test_cka_is_one_up_to_rotation_scale_and_shift_and_zero_when_orthogonal() -> None:
    x = torch.randn(40, 6, dtype=torch.float64)
    assert linear_cka(x, 3 * x @ orthonormal(6, 6) + 5) == pytest.approx(1)
    basis = orthonormal(40, 9) - orthonormal(40, 9).mean(dim=0)
    basis = torch.linalg.qr(basis)[0]
    assert linear_cka(basis[:, :4], basis[:, 4:]) == pytest.approx(0, abs=1e-12)
    half = torch.cat([basis[:, :2], basis[:, 4:6]], dim=1)  # shares 2 of 4 equal directions
    assert linear_cka(basis[:, :4], half) == pytest.approx(0.5)


def test_overlap_of_equal_and_of_partly_equal_neighbourhoods() -> None:
    x = torch.randn(30, 5)
    assert neighbour_overlap(x, 2 * x @ orthonormal(5, 5).float(), k=7) == 1
    angle = torch.tensor([0.0, 0.1, 0.3, 0.7])
    a = torch.stack([angle.cos(), angle.sin()], dim=1)
    b = a[[1, 0, 2, 3]]  # nearest ones: a: 1 0 1 2, b: 1 0 0 2
    assert neighbour_overlap(a, b, k=1) == pytest.approx(3 / 4)


def test_images_are_paired_by_index_whatever_the_order() -> None:
    a = clusters(40, 4, 8)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    b = a.take(order[:30])
    found = compare(a, b, k=5)
    assert found == pytest.approx({"cka": 1, "neighbour_overlap": 1})
    other = Features(b.x, b.labels, b.indices + 100)
    with pytest.raises(UserError, match="share 0 images"):
        compare(a, other)
