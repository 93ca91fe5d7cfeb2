"""Operations of a person's own as a step of a view: functions, transforms of torchvision or albumentations."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from selfsight.errors import UserError


def apply(transforms: Sequence[Callable[..., Any]], image: np.ndarray, seed: int) -> np.ndarray:
    """An image ``[H, W, 3]`` uint8 after the operations, one after the other.

    What they draw from the generators of Python, numpy and torch depends on ``seed`` alone, and these generators go on
    afterwards as if nothing had been drawn. Transforms of albumentations have generators of their own, seeded likewise.

    Raises:
        UserError: an operation gives something else than an image of the same size and type.
    """
    with _seeded(seed):
        for transform in transforms:
            made = _call(transform, image, seed)
            if not isinstance(made, np.ndarray) or made.shape != image.shape or made.dtype != np.uint8:
                raise UserError(
                    f"the view operation {_name(transform)} gave {_described(made)} and an image of "
                    f"{_described(image)} was expected: keep size and type (mean and std come after it)."
                )
            image = made
    return image


def _call(transform: Callable[..., Any], image: np.ndarray, seed: int) -> Any:
    if type(transform).__module__.partition(".")[0] == "albumentations":
        transform.set_random_seed(seed)  # type: ignore[attr-defined]
        return transform(image=image)["image"]
    if isinstance(transform, torch.nn.Module):  # torchvision's
        made = transform(torch.from_numpy(image).permute(2, 0, 1).contiguous())
        return made.permute(1, 2, 0).numpy() if isinstance(made, torch.Tensor) and made.ndim == 3 else made
    return transform(image)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The global generators begun anew, and put back at the end."""
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would begin the device's anew, too
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])


def _name(transform: Callable[..., Any]) -> str:
    return str(getattr(transform, "__name__", type(transform).__name__))


def _described(made: Any) -> str:
    if not hasattr(made, "shape"):
        return f"a {type(made).__name__}"
    shape = "x".join(str(side) for side in made.shape)
    return f"{shape} {str(made.dtype).removeprefix('torch.')}"
