"""Fractals that one core draws in a second of its time, beside decoding a JPEG of the same side.

    python benchmarks/fractals.py --image-size 128 --images 60 --rounds 5

Processor time of one thread, medians of turns. The last line is the ratio: what a set without files costs beside one
of files.
"""

from __future__ import annotations

import argparse
import io
import statistics
import time
from collections.abc import Callable

import cv2
import numpy as np
from PIL import Image

from selfsight.datamodules import fractals
from selfsight.datamodules.images.decode import decode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    cv2.setNumThreads(1)
    drawn = fractals(image_size=asked.image_size, train=max(100, asked.images)).train
    files = [as_jpeg(drawn.read(i)) for i in range(asked.images)]
    readers: dict[str, Callable[[int], np.ndarray]] = {
        "drawn": drawn.read, "decoded": lambda i: decode(files[i]),
    }  # fmt: skip
    rates: dict[str, list[float]] = {name: [] for name in readers}
    for turn in range(asked.rounds + 1):
        for name, read in readers.items():
            begun = time.process_time()
            for i in range(asked.images):
                read(i)
            if turn > 0:
                rates[name].append(asked.images / (time.process_time() - begun))
    found = {name: statistics.median(rate) for name, rate in rates.items()}
    for name, rate in found.items():
        print(f"{name:8} {rate:7.0f} images a second and core at {asked.image_size} pixels")
    print(f"drawing takes {found['decoded'] / found['drawn']:.1f} times as long as decoding")


def as_jpeg(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=90)
    return file.getvalue()


if __name__ == "__main__":
    main()
