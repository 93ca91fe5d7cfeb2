"""What of a worker's time is decoding, by which decoder, and how much a decoder of crops alone could save.

``decode_opencv``: what `decode` does where simplejpeg is installed, against OpenCV. ``worker_*_decoding``: the whole
share of a worker (decode, crop, flip) against decoding alone. ``decode_crops_*``: a decode that leaves out nearly all
but the entropy coding, against all of it. No crop of a JPEG without restart markers can leave that out; how many rows
of an image its crops need is told beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import cv2
import numpy as np
import pictures
from turns import Comparison, compare
from views import SIMCLR, SWAV, Ours

from selfsight.datamodules.images.decode import decode

REDUCED = cv2.IMREAD_REDUCED_COLOR_8


def run(images: str | None, rounds: int) -> list[Comparison]:
    files = pictures.jpegs(images, 24)
    options: dict[str, Any] = {"items": len(files), "unit": "ms/image", "rounds": rounds}

    def by_opencv(kind: int = cv2.IMREAD_COLOR_RGB) -> list[np.ndarray]:
        return [cv2.imdecode(np.frombuffer(data, np.uint8), kind) for data in files]

    def ours() -> list[np.ndarray]:
        return [decode(data) for data in files]

    found = []
    if find_spec("simplejpeg") is None:
        print("simplejpeg is not installed here: decode_opencv is left out; `make bench` installs it.", flush=True)
    else:
        most = max(int(np.abs(a.astype(int) - b).max()) for a, b in zip(ours(), by_opencv(), strict=True))
        found.append(compare("decode_opencv", ours, by_opencv, check=f"pixels differ by at most {most}", **options))
    for name, views in (("2x224", SIMCLR), ("multicrop", SWAV)):
        worker = Ours(files, views, photometric=False)
        found.append(compare(f"worker_{name}_decoding", worker, ours, check="decoding alone", target=0.8, **options))
        found.append(
            compare(
                f"decode_crops_{name}", lambda: by_opencv(REDUCED), by_opencv,
                check=f"an eighth of each side; crops need {rows_needed(worker):.0%} of the rows", **options,
            )
        )  # fmt: skip
    return found


def rows_needed(worker: Callable[[], Sequence[Any]], times: int = 20) -> float:
    """Mean share of the rows of an image between the first and the last one that any of its crops touches."""
    shares = []
    for _ in range(times):
        worker()
        boxes = np.stack([box.numpy() for box in worker.boxes])  # type: ignore[attr-defined]  # [views, images, 8]
        top, height, whole = boxes[..., 0], boxes[..., 2], boxes[0, :, 4]
        shares.append((((top + height).max(0) - top.min(0)) / whole).mean())
    return float(np.mean(shares))
