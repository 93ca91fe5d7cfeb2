"""Pictures of fractals as a data set: nothing to download, as many as asked for, made when they are read."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import torch
from torch import Tensor

from selfsight.datamodules.datasets import ifs
from selfsight.datamodules.datasets.dataset import ImageData
from selfsight.datamodules.images.sets import ImageSet
from selfsight.errors import UserError
from selfsight.validation import NULL, Kind, each, expect, one_of, whole

#: walks side by side; they start on the attractor, so that few steps of many are as good as many of one
WALKS = 1000
FEWEST_AND_MOST = Kind(
    "a list of the fewest and the most maps of a system, from 2 on",
    lambda v: each(whole(2)).fits(v) and len(v) == 2 and v[0] <= v[1],
)


class FractalImages(ImageSet):
    """Images ``0 … count - 1``, each of the system that is its class, drawn anew from the seed whenever it is read.

    Args:
        systems: ``[n, 2, 3]`` each, see `ifs`. count: number of images; image i is of system ``i % len(systems)``.
        size: of their sides. seed: of all that is random; part: a number that keeps training and test images apart.
        points: of the attractor; None: two a pixel, the authors' 100,000 at 224 pixels.
        jitter: how a system is changed from image to image, one of `ifs.JITTERS`, or none.
        background: a cloudy one; False leaves black.

    Raises:
        UserError: a system that does not contract.
    """

    in_memory = False

    def __init__(
        self,
        systems: Sequence[ifs.Floats],
        count: int,
        size: int,
        *,
        seed: int = 0,
        part: int = 0,
        points: int | None = None,
        jitter: str = "scale",
        background: bool = True,
    ) -> None:
        for maps in systems:
            ifs.check_contracts(maps)
        self.systems, self.count, self.size = list(systems), count, size
        self.seed, self.part, self.points = seed, part, points or 2 * size**2
        self.jitter, self.background = jitter, background
        self.labels: Tensor = torch.arange(count) % len(self.systems)

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> np.ndarray:
        rng = np.random.default_rng((self.seed, self.part, index))
        maps = self.systems[index % len(self.systems)]
        if self.jitter != "none":
            maps = ifs.randomly_jittered(maps, self.jitter, rng)
        points = ifs.chaos_game(maps, rng.random((max(1, self.points // WALKS), WALKS), dtype=np.float32))  # type: ignore[arg-type]
        stamp = rng.integers(0, 2, (3, 3))
        stamp[1, 1] = 1  # the authors' stamp may be empty, and the picture black
        rendered = np.asarray(ifs.render(points, self.size, ifs.region_of(points), stamp=stamp), dtype=np.float64)
        transposed, upside_down, mirrored, blurred = rng.random(4) > 0.5
        rendered = rendered.T if transposed else rendered
        rendered = rendered[:: -1 if upside_down else 1, :: -1 if mirrored else 1]
        image = ifs.to_rgb(ifs.colour(rendered, rng.random(3).tolist()))
        if self.background:
            image = ifs.composite(image, self._background(rng))
        if blurred:
            image = np.asarray(cv2.GaussianBlur(image, (3, 3), rng.uniform(0.5, 1.0)))
        return np.ascontiguousarray(image)

    def _background(self, rng: np.random.Generator) -> ifs.Bytes:
        n = int(np.ceil(np.log2(self.size)))
        heights = ifs.diamond_square(rng.random(ifs.diamond_square_draws(n)), n, decay=rng.uniform(0.4, 0.8))
        return ifs.to_rgb(ifs.background_colours(heights[: self.size, : self.size], rng.random(6).tolist()))

    def glimpse(self, index: int) -> bytes:
        """No two are equal, and none is drawn to find that out."""
        return repr((self.seed, self.part, index, self.size)).encode()

    def digest(self, index: int) -> bytes:
        return self.glimpse(index)


def fractals(
    *,
    systems: int = 100,
    train: int = 5000,
    test: int = 1000,
    image_size: int = 128,
    mean: Sequence[float] = (0.5,) * 3,
    std: Sequence[float] = (0.5,) * 3,
    maps: Sequence[int] = (2, 4),
    points: int | None = None,
    jitter: str = "scale",
    background: bool = True,
    seed: int = 0,
    name: str = "fractals",
) -> ImageData:
    """Coloured attractors of random iterated function systems on cloudy ground, each system a class.

    Nothing has to be downloaded, and nothing is stored: an image is drawn from its number when it is read, which takes
    a hundredth of a second at 128 pixels. See `ifs` for the source.

    Args:
        systems: number of classes; the authors have 1000.
        train, test: number of images.
        maps: the fewest and the most maps of a system.
        points: of an attractor that are drawn; None: two a pixel, the authors' 100,000 at 224 pixels.
        jitter: how a system changes from image to image: ``scale``, ``svd_rotate``, ``svd_shift``, ``sval``, ``none``.
        background: False leaves the ground black.
        seed: of all that is drawn.
        image_size, mean, std, name: see `ImageData`; images are drawn at ``image_size``. The authors' values are those
            of mean and std.
    """
    for key, value, low in (("systems", systems, 2), ("train", train, 2), ("test", test, 0), ("seed", seed, 0)):
        expect(f"dataset.{key}", value, whole(low))
    expect("dataset.points", points, NULL | whole(1000))
    expect("dataset.maps", maps, FEWEST_AND_MOST)
    expect("dataset.jitter", jitter, one_of(*ifs.JITTERS, "none"))
    side = expect("dataset.image_size", image_size, whole(8))
    if systems > train:
        raise UserError(f"dataset.systems is {systems} and dataset.train {train}; give each system an image or more.")
    rng = np.random.default_rng((seed, 0))
    every = [ifs.random_system(rng, int(rng.integers(maps[0], maps[1] + 1))) for _ in range(systems)]
    options = {"seed": seed, "points": points, "jitter": jitter, "background": background}
    sets = [FractalImages(every, n, side, part=part, **options) for part, n in ((1, train), (2, test))]  # type: ignore[arg-type]
    classes = tuple(f"system {i}" for i in range(systems))
    return ImageData(name, sets[0], sets[1] if test else None, classes, side, mean, std)
