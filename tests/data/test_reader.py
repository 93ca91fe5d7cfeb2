"""What evaluation sees: the central square, also of images so long that resizing them as a whole would not end well."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from selfsight.datamodules.loading import reader
from selfsight.datamodules.loading.reader import RawBatch, central_square
from selfsight.datamodules.views import cpu_ops
from selfsight.datamodules.views.cpu_ops import center, resize, square_of_resized

from .writers import picture


def square_of_whole(image: np.ndarray, resize_to: int, size: int) -> np.ndarray:
    """`central_square` as it is for ordinary images, whatever the shape."""
    height, width = image.shape[:2]
    short = min(height, width)
    scaled = max(size, round(height * resize_to / short)), max(size, round(width * resize_to / short))
    images = torch.from_numpy(image).permute(2, 0, 1)[None]
    whole = functional.interpolate(images, scaled, mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()
    top, left = (scaled[0] - size) // 2, (scaled[1] - size) // 2
    return whole[top : top + size, left : left + size]


def apart(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one.astype(int) - other.astype(int)).max())


SHAPES = [(375, 500), (500, 333), (64, 64), (40, 90), (300, 61), (17, 230), (900, 31)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("resize_to", "size"), [(36, 32), (32, 32), (115, 101)])
def test_the_square_alone_is_that_of_the_whole(
    shape: tuple[int, int], resize_to: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    for image in (picture(1, *shape), noise):
        expected = square_of_whole(image, resize_to, size)
        monkeypatch.setattr(reader, "mostly_cut_away", lambda *_: True)
        made = central_square(torch.from_numpy(image).permute(2, 0, 1)[None], resize_to, size)[0].permute(1, 2, 0)
        assert apart(made.numpy(), expected) <= 1
        monkeypatch.setattr(reader, "mostly_cut_away", lambda *_: False)
        made = central_square(torch.from_numpy(image).permute(2, 0, 1)[None], resize_to, size)[0].permute(1, 2, 0)
        assert apart(made.numpy(), expected) == 0


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_square_alone_of_a_view(shape: tuple[int, int], interpolation: str) -> None:
    image = picture(2, *shape)
    scaled, corner = (round(shape[0] * 0.37), round(shape[1] * 0.37)), (1, 2)
    size = min(scaled) - 3
    whole = resize(image, scaled, interpolation)[1 : 1 + size, 2 : 2 + size]
    assert apart(square_of_resized(image, scaled, corner, size, interpolation), whole) <= 1


@pytest.mark.parametrize(
    ("image", "scaled", "wasted"),
    [
        ((1, 8000), (224, 1_792_000), True),
        ((8000, 1), (1_792_000, 224), True),
        ((100, 500), (224, 1120), True),
        ((100, 400), (224, 896), False),  # not long enough
        ((3000, 20_000), (224, 1493), False),  # there already
        ((224, 20_000), (224, 20_000), False),
    ],
)
def test_only_enlarged_long_images_are_cut_first(image: tuple[int, int], scaled: tuple[int, int], wasted: bool) -> None:
    assert cpu_ops.mostly_cut_away(image, scaled, 224) is wasted


@pytest.mark.parametrize("shape", [(1, 8000), (8000, 1), (2, 30_000)], ids=str)
def test_lines_are_never_resized_as_a_whole(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    ramp = np.linspace(0, 255, max(shape)).round().astype(np.uint8)
    image = np.ascontiguousarray(np.broadcast_to(ramp.reshape(1, -1) if shape[0] < shape[1] else ramp[:, None], shape))
    image = np.repeat(image[..., None], 3, 2)
    monkeypatch.setattr(functional, "interpolate", None)
    monkeypatch.setattr(cpu_ops, "resize", None)
    made = central_square(torch.from_numpy(image).permute(2, 0, 1)[None], 224, 224)
    assert made.shape == (1, 3, 224, 224)
    assert apart(made.numpy(), np.array(128)) <= 1
    assert apart(center(image, 224, 0.875, "bicubic"), np.array(128)) <= 1


def test_joined_parts_keep_everything() -> None:
    def part(*indices: int, **more: Any) -> RawBatch:
        chosen = torch.tensor(indices, dtype=torch.int64)
        return RawBatch(1, 2, chosen, chosen % 3, [chosen.view(-1, 1, 1, 1)], **more)

    whole = RawBatch.joined([part(4, 5), part(), part(7, skipped=[(6, "no image")])])
    assert (whole.epoch, whole.step, whole.skipped) == (1, 2, [(6, "no image")])
    assert whole.indices.tolist() == whole.views[0].flatten().tolist() == [4, 5, 7]
    assert whole.labels.tolist() == [1, 2, 1]
    bare = RawBatch(0, 0, torch.tensor([1]))
    assert RawBatch.joined([bare]) is bare
    assert RawBatch.joined([bare, bare]).labels is None


def test_unreadable_files_in_shared_batches(tmp_path: Path) -> None:
    from .test_module import in_files, module

    data = in_files(tmp_path, images=39, test_fraction=0)
    for i in (3, 30):
        data.train.path(i).write_text("no image")
    batches = [list(module(data, num_workers=n, eval_batch_size=16).eval_dataloader("train")) for n in (0, 3)]
    for alone, shared in zip(*batches, strict=True):
        assert torch.equal(alone.indices, shared.indices)
        assert torch.equal(alone.views[0], shared.views[0])
    assert len(data.unreadable) == 2
