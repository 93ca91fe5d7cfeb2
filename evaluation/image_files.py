"""Image files of probes that bring their own, read as the data sets read theirs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from selfsight.datamodules.images import decode
from selfsight.errors import UserError


def read_image(path: Path) -> NDArray[np.uint8]:
    """``[H, W, 3]`` RGB, the orientation stored in the file applied, 16-bit values scaled.

    Raises:
        UserError: the file is no image, or a damaged one.
    """
    try:
        image: NDArray[np.uint8] = decode.read_image(path)
    except decode.Unreadable as reason:
        raise UserError(f"'{path}' cannot be read as an image ({reason}); repair it, or take it out.") from None
    return image
