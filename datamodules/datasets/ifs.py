"""Iterated function systems as pictures: systems drawn at random, their attractors, colours and backgrounds.

    Anderson, Farrell: Improving Fractal Pre-training. WACV 2022, arXiv:2110.03091. Code: catalys1/fractal-pretraining.

Every function takes its random numbers as an argument, uniform in [0, 1), so that what is drawn follows from them
alone. A system is ``[n, 2, 3]``: n maps ``x -> A x + b`` of the plane, each ``[A | b]``.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from selfsight.errors import UserError

Floats = NDArray[np.float64]
Bytes = NDArray[np.uint8]

JITTERS = ("scale", "svd_rotate", "svd_shift", "sval")


# --- systems ---------------------------------------------------------------------------------------------------------


def singular_values(u: Floats, n: int, alpha: float) -> Floats:
    """``[n, 2]``, larger first, none above 1, with ``sum (s1 + 2 s2) = alpha``: what decides how full a fractal is.

    Args:
        u: ``[2 n - 1]``.
    """
    draws = iter(u)

    def between(low: float, high: float) -> float:
        return low + (high - low) * float(next(draws))

    p, q = alpha, alpha - 3 * n + 3  # what is left to give, and what the maps to come cannot take
    values = np.empty((n, 2))
    for i in range(n - 1):
        s1 = between(max(0.0, q / 3), min(1.0, p))
        p, q = p - s1, q - s1
        s2 = between(max(0.0, q / 2), min(s1, p / 2))
        p, q = p - 2 * s2, q + 3 - 2 * s2
        values[i] = s1, s2
    s2 = between(max(0.0, (p - 1) / 2), p / 3)
    values[-1] = p - 2 * s2, s2
    return values


def orthogonal(signs: Floats, angles: Floats) -> Floats:
    """``R(-pi + 2 pi angle) diag(+-1, +-1)``: ``[m, 2]`` and ``[m]`` to ``[m, 2, 2]``."""
    theta = -np.pi + 2 * np.pi * angles
    rotation = np.stack([np.cos(theta), -np.sin(theta), np.sin(theta), np.cos(theta)], axis=-1).reshape(-1, 2, 2)
    return rotation * np.where(signs > 0.5, 1.0, -1.0)[:, None, :]


def system(signs: Floats, angles: Floats, values: Floats, shifts: Floats, *, shift: float = 1.0) -> Floats:
    """``A_i = U_i diag(s_i) V_i`` with orthogonal U and V, and a translation within ``+-shift``.

    Args:
        signs: ``[2 n, 2]``. angles: ``[2 n]``. values: ``[n, 2]``, see `singular_values`. shifts: ``[n, 2]``.
    """
    n, Q = len(values), orthogonal(signs, angles)
    A = (Q[:n] * values[:, None, :]) @ Q[n:]
    return np.concatenate([A, (shift * (2 * shifts - 1))[:, :, None]], axis=2)


def random_system(rng: np.random.Generator, n: int) -> Floats:
    """A system of n maps as the authors draw them: alpha between (5 + n) / 2 and (6 + n) / 2."""
    alpha = (5 + n) / 2 + rng.random() / 2
    values = singular_values(rng.random(2 * n - 1), n, alpha)
    return system(rng.random((2 * n, 2)), rng.random(2 * n), values, rng.random((n, 2)))


def check_contracts(maps: Floats) -> None:
    """
    Raises:
        UserError: a map stretches, so that points run away.
    """
    largest = np.linalg.svd(maps[:, :, :2], compute_uv=False).max()
    if not largest <= 1 + 1e-9:
        raise UserError(
            f"A fractal system has a map that stretches by {largest:.3g}; every map has to contract (at most 1)."
        )


def jittered(maps: Floats, how: str, u: Floats) -> Floats:
    """The system with one of its maps a little changed.

    ``scale``: times 0.8 to 1.1. ``svd_rotate``: its left orthogonal part turned by up to half a radian. ``svd_shift``:
    moved by up to 0.5. ``sval``: its singular values times what keeps alpha between its bounds.
    """
    n, maps = len(maps), maps.copy()
    i = min(int(n * u[0]), n - 1)
    if how == "scale":
        maps[i] *= 0.8 + 0.3 * u[1]
    elif how == "svd_shift":
        maps[i, :, 2] += u[1:3] - 0.5
    elif how == "svd_rotate":
        q = u[1] - 0.5
        maps[i, :, :2] = np.array([[np.cos(q), -np.sin(q)], [np.sin(q), np.cos(q)]]) @ maps[i, :, :2]
    elif how == "sval":
        s = np.linalg.svd(maps[:, :, :2], compute_uv=False) @ np.array([1.0, 2.0])  # share of each map in alpha
        low, high = ((5 + n) / 2 - s.sum() + s[i]) / s[i], ((6 + n) / 2 - s.sum() + s[i]) / s[i]
        maps[i, :, :2] *= low + (high - low) * u[1]
    else:
        raise UserError(f"A fractal's jitter is '{how}'; one of {', '.join(JITTERS)}.")
    return maps


def randomly_jittered(maps: Floats, how: str, rng: np.random.Generator, attempts: int = 4) -> Floats:
    """`jittered`, tried a few times until every map contracts, or as it is."""
    for _ in range(attempts):
        changed = jittered(maps, how, rng.random(3))
        if np.linalg.svd(changed[:, :, :2], compute_uv=False).max() <= 1:
            return changed
    return maps


# --- points and pixels -----------------------------------------------------------------------------------------------


def map_probabilities(maps: Floats) -> Floats:
    """``[n]``, proportional to the area a map leaves, ``|det A|``."""
    areas = np.abs(np.linalg.det(maps[:, :, :2]))
    return areas / areas.sum()


def chaos_game(maps: Floats, u: Floats, probabilities: Floats | None = None) -> Floats:
    """Points of the attractor: from the fixed point of map 0, one map after the other, chosen by u.

    Args:
        u: ``[T]`` of one walk, or ``[T, C]`` of C walks side by side.
        probabilities: ``[n]``; None: `map_probabilities`.

    Returns:
        ``[T, 2]``, or ``[T C, 2]``, step by step.
    """
    walks = u[:, None] if u.ndim == 1 else u
    edges = np.cumsum(map_probabilities(maps) if probabilities is None else probabilities)
    chosen = np.zeros(walks.shape, dtype=np.intp)  # the number of edges at or below a draw
    for edge in edges[:-1]:
        chosen += walks >= edge
    a, b, e, c, d, f = maps.reshape(len(maps), 6).T.take(chosen, axis=1)  # [T, C] each
    start = np.linalg.solve(np.eye(2) - maps[0, :, :2], maps[0, :, 2])
    x, y = np.full(walks.shape[1], start[0]), np.full(walks.shape[1], start[1])
    points = np.empty((2, *walks.shape))  # coordinate by coordinate, which is faster to work with
    for t in range(len(walks)):
        x, y = a[t] * x + b[t] * y + e[t], c[t] * x + d[t] * y + f[t]
        points[0, t], points[1, t] = x, y
    return points.reshape(2, -1).T


def region_of(points: Floats) -> Floats:
    """``(min x, min y, max x, max y)``."""
    x, y = points[:, 0], points[:, 1]
    return np.array([x.min(), y.min(), x.max(), y.max()])


def render(
    points: Floats, size: int, region: Floats, *, stamp: NDArray[np.int64] | None = None, binary: bool = False
) -> NDArray[np.generic]:
    """How often each pixel is hit, over the most hits of any: ``[size, size]``, the points' x being the row.

    Args:
        region: what is shown, see `region_of`; points beyond it are left out.
        stamp: ``[3, 3]`` of 0 and 1; every point colours the set cells of it around its own.
        binary: 1 where anything is hit.
    """
    low, span = region[:2], region[2:] - region[:2]
    scale = (size - 1) / np.where(span == 0, 1.0, span)  # first of all: what lies on the far edge may fall short of it
    row, column = (((points[:, i] - low[i]) * scale[i]).astype(np.int32) for i in (0, 1))  # cut, not rounded
    inside = (row >= 0) & (row < size) & (column >= 0) & (column < size)
    if not inside.all():
        row, column = row[inside], column[inside]
    counts = np.bincount(row * size + column, minlength=size * size).reshape(size, size)
    if stamp is not None:
        padded = np.zeros((size + 2, size + 2), dtype=np.int64)
        for i, j in zip(*np.nonzero(stamp), strict=True):
            padded[i : i + size, j : j + size] += counts
        counts = padded[1:-1, 1:-1]
    if binary:
        return (counts > 0).astype(np.uint8)
    return counts / max(1, counts.max())


# --- colours and backgrounds -----------------------------------------------------------------------------------------


def colour(rendered: Floats, u: Sequence[float], *, min_saturation: float = 0.3, min_value: float = 0.5) -> Bytes:
    """HSV ``[S, S, 3]``: the hue runs with the hits from a random one on, saturation and value are one; 0 where empty.

    Args:
        u: of hue, saturation and value.
    """
    hsv = np.empty((*rendered.shape, 3), np.uint8)
    hsv[..., 0] = (255 * rendered + 255 * u[0]).astype(np.int64) % 256
    hsv[..., 1] = int(255 * (min_saturation + (1 - min_saturation) * u[1]))
    hsv[..., 2] = int(255 * (min_value + (1 - min_value) * u[2]))
    hsv[rendered == 0] = 0
    return hsv


def to_rgb(hsv: Bytes) -> Bytes:
    """OpenCV's hue, of which 180 is once around; more goes around again."""
    return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB))


def diamond_square(u: Floats, n: int, *, decay: float, fixed_corners: bool = False) -> Floats:
    """A cloudy height map ``[2^n + 1, 2^n + 1]``, its edges joined.

    Level by level every square gets a centre and every edge a middle: the mean of four neighbours, plus up to
    ``0.5 exp(decay (1 - k))`` either way at level k.

    Args:
        u: as many numbers as points are drawn, see `diamond_square_draws`.
        fixed_corners: 0.5, or drawn.
    """
    side = 2**n
    a, draws = np.zeros((side + 1, side + 1)), iter(np.split(u, _pieces(n, fixed_corners)))
    a[::side, ::side] = 0.5 if fixed_corners else next(draws).reshape(2, 2)
    for k in range(1, n + 1):
        reach, step = 0.5 * np.exp(decay * (1 - k)), side // 2**k
        known = a[:: 2 * step, :: 2 * step]
        centres = (known[:-1, :-1] + known[:-1, 1:] + known[1:, :-1] + known[1:, 1:]) / 4
        a[step :: 2 * step, step :: 2 * step] = centres + reach * (2 * next(draws).reshape(centres.shape) - 1)
        grid = a[::step, ::step]
        before, after = np.r_[2**k - 1, : 2**k], np.r_[1 : 2**k + 1, 1]  # the far edge is the near one
        neighbours = (grid[before] + grid[after] + grid[:, before] + grid[:, after]) / 4
        i, j = np.indices(grid.shape)
        edges = (i + j) % 2 == 1
        grid[edges] = neighbours[edges] + reach * (2 * next(draws) - 1)
    return a


def _pieces(n: int, fixed_corners: bool) -> NDArray[np.int64]:
    """Where the draws of corners, and of centres and edges of each level, end."""
    sizes = [] if fixed_corners else [4]
    for k in range(1, n + 1):
        m = 2**k
        sizes += [(m // 2) ** 2, ((m + 1) ** 2) // 2]
    return np.cumsum(sizes)[:-1]


def diamond_square_draws(n: int, fixed_corners: bool = False) -> int:
    """How many numbers `diamond_square` needs."""
    return (0 if fixed_corners else 4) + sum((2**k // 2) ** 2 + ((2**k + 1) ** 2) // 2 for k in range(1, n + 1))


def background_colours(height: Floats, u: Sequence[float]) -> Bytes:
    """HSV ``[S, S, 3]`` of a height map: each channel a random multiple of it plus a random shift.

    Args:
        u: scale and shift of hue, saturation and value.
    """
    bounds = ((0.25, 1.0), (0.0, 1.0), (0.1, 0.3), (0.4, 0.6), (0.3, 0.6), (0.4, 0.6))
    hue, hue_0, sat, sat_0, val, val_0 = (
        255 * (low + (high - low) * x) for (low, high), x in zip(bounds, u, strict=True)
    )
    hsv = np.empty((*height.shape, 3), np.uint8)
    hsv[..., 0] = np.trunc(height * hue + hue_0).astype(np.int64) % 256
    for channel, scale, shift in ((1, sat, sat_0), (2, val, val_0)):
        hsv[..., channel] = np.trunc(np.minimum(height * scale + shift, 255)).astype(np.int64) % 256
    return hsv


def composite(foreground: Bytes, background: Bytes) -> Bytes:
    """The foreground where any of its channels is above 0, else the background."""
    return np.where(foreground.any(-1, keepdims=True), foreground, background)
