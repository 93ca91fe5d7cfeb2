"""Images to measure with: a folder of JPEGs, or ones made up that decode and compress like photographs."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image


def jpegs(folder: str | None, count: int) -> list[bytes]:
    """The bytes of ``count`` JPEG files: out of ``folder``, or made up, 500 x 375 of about 110 KB as ImageNet's are."""
    if folder is None:
        return [_encode(photograph(seed, 375, 500)) for seed in range(count)]
    paths = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
    if not paths:
        raise SystemExit(f"'{folder}' holds no JPEG files; name another folder, or leave --images out.")
    return [paths[i % len(paths)].read_bytes() for i in range(count)]


def small(count: int, size: int = 32) -> np.ndarray:
    """``[N, size, size, 3]`` uint8."""
    return np.stack([photograph(seed, size, size) for seed in range(count)])


def photograph(seed: int, height: int, width: int) -> np.ndarray:
    """Noise whose amplitude falls with frequency as in photographs, in correlated colours: ``[H, W, 3]`` uint8."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1.0
    planes = [
        np.fft.irfft2(np.fft.rfft2(rng.standard_normal((height, width))) / frequency**1.1, s=(height, width))
        for _ in range(3)
    ]
    light, red, blue = (plane / plane.std() for plane in planes)
    colour = np.stack([light + 0.4 * red, light - 0.2 * red - 0.2 * blue, light + 0.4 * blue], axis=-1)
    return np.clip(120 + 50 * colour, 0, 255).astype(np.uint8)


def _encode(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
