"""What options cannot be given, though a slice or a mean of it would go through in silence."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from selfsight.datamodules.datasets.fractals import FractalImages
from selfsight.errors import UserError
from selfsight.evaluation.pruning import choose
from selfsight.nn.matryoshka import PrefixLinear, all_widths, prefixes


@pytest.mark.parametrize("widths", [[], [0, 4], [4, 4], [4, 9]])
def test_nested_dimensions_are_within_the_features(widths: list[int]) -> None:
    for refused in (lambda: PrefixLinear(8, 3).own_weights(widths), lambda: prefixes(torch.ones(2, 8), widths)):
        with pytest.raises(UserError, match="of embeddings of 8 numbers; give different whole numbers from 1 to 8"):
            refused()
    assert [part.shape[1] for part in prefixes(torch.ones(2, 8), [8, 2])] == [2, 8]


@pytest.mark.parametrize("dims", [[4, 2], [2, 2, 4]])
def test_dims_that_are_typed_ascend(dims: list[int]) -> None:
    with pytest.raises(UserError, match=r"different numbers that ascend were expected: \[2, 4\]"):
        all_widths(dims, 8)
    assert all_widths([2, 4], 8) == [2, 4, 8]
    assert all_widths(None, 40) == [8, 16, 32, 40]


def test_a_share_that_leaves_a_class_empty() -> None:
    score, labels = torch.tensor([3.0, 2.0, 1.0, 0.0]), torch.tensor([0, 0, 1, 1])
    with pytest.raises(UserError, match="leaves 1 of 2 classes without any, the first is number 1: keep more"):
        choose(score, 0.5, labels=labels, classes=2)
    assert choose(score, 0.5, labels=labels, classes=2, balance=1.0).tolist() == [0, 2]
    for keep, sentence in (
        (0.0, "above 0 and at most 1"),
        (1.5, "above 0 and at most 1"),
        (0.1, "is none; keep a larger"),
    ):
        with pytest.raises(UserError, match=sentence):
            choose(score, keep)


def test_a_fractal_whose_points_run_away() -> None:
    maps = np.zeros((2, 2, 3))
    maps[:, :, :2] = 0.5 * np.eye(2)
    assert len(FractalImages([maps], 2, 8)) == 2
    maps[1, :, :2] *= 3
    with pytest.raises(UserError, match=r"stretches by 1\.5; every map has to contract"):
        FractalImages([maps], 2, 8)
