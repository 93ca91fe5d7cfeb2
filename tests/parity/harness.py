"""Loads the recorded numbers, finds the check of a case by its family, and sees to it that nothing is left uncompared.

A check is a function of one `Case`, registered for the documented prefixes of a golden file:

    @family("swav", "sinkhorn_")
    def sinkhorn(case):
        case.compare("codes", swav.sinkhorn(case.tensor("scores"), **...), tolerance=1e-9)

The longest registered prefix that starts a case's name is its family; ``#`` in it stands for any number, such as that
of processes, which a check reads from the case. Every array under ``out`` has to be compared (`compare`) or declared
informative (`informative`), or the case fails.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

GOLDEN = Path(os.environ.get("SELFSIGHT_GOLDEN", Path(__file__).parent / "golden"))

Check = Callable[["Case"], None]
_FAMILIES: dict[str, dict[str, Check]] = {}
_SLOW: set[tuple[str, str]] = set()


class Case:
    """One recorded case: ``inp``, ``hp`` and ``out`` arrays by name."""

    def __init__(self, file: str, name: str, arrays: dict[str, dict[str, np.ndarray]]) -> None:
        self.file, self.name = file, name
        self.inp, self.hp, self.out = arrays["in"], arrays["hp"], arrays["out"]
        self.compared: set[str] = set()
        self.only_informative: set[str] = set()

    def sibling(self, name: str) -> Case:
        """Another case of the same file (weights that several cases share)."""
        return Case(self.file, name, load_file(self.file)[name])

    def tensor(
        self, name: str, dtype: torch.dtype | None = torch.float64, *, requires_grad: bool = False
    ) -> torch.Tensor:
        """Input ``name`` as a tensor; floats are cast to ``dtype`` (None keeps the recorded one), integers are kept."""
        return as_tensor(self.inp[name], dtype).requires_grad_(requires_grad)

    def tensors(self, prefix: str, dtype: torch.dtype | None = torch.float64) -> dict[str, torch.Tensor]:
        """Every input whose name starts with ``prefix``, by the rest of its name."""
        return {k[len(prefix) :]: as_tensor(v, dtype) for k, v in self.inp.items() if k.startswith(prefix)}

    def number(self, name: str) -> Any:
        """Hyper-parameter ``name`` as a Python number or list."""
        return self.hp[name].tolist()

    def compare(self, name: str, got: Any, tolerance: float, *, scale: str = "max", where: Any = None) -> None:
        """Compare with output ``name``.

        scale ``max``: error is max|got - expected| / max(1, max|expected|);
        ``each``: the largest |got - expected| / (1 + |expected|).
        tolerance 0 asks for equality. ``where`` (bool mask) restricts the comparison.
        """
        expected = self.out[name]
        self.compared.add(name)
        compare(got, expected, tolerance, scale=scale, where=where, label=f"{self.file}/{self.name}: {name}")

    def informative(self, *names: str) -> None:
        """These outputs are recorded for the reader and are no result of ours."""
        self.only_informative.update(n for n in names if n in self.out)
        self.compared |= self.only_informative

    def uncompared(self) -> set[str]:
        return set(self.out) - self.compared


def as_tensor(array: np.ndarray, dtype: torch.dtype | None) -> torch.Tensor:
    tensor = torch.from_numpy(np.array(array))
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def compare(
    got: Any, expected: Any, tolerance: float, *, scale: str = "max", where: Any = None, label: str = ""
) -> None:
    got = got.detach().cpu().numpy() if isinstance(got, torch.Tensor) else np.asarray(got)
    expected = np.asarray(expected)
    assert got.shape == expected.shape, f"{label}: shape {got.shape}, recorded {expected.shape}"
    if where is not None:
        where = np.broadcast_to(np.asarray(where, dtype=bool), expected.shape)
        got, expected = got[where], expected[where]
    if expected.dtype.kind in "USO":
        assert (got == expected).all(), f"{label}: differs"
        return
    got, expected = got.astype(np.float64), expected.astype(np.float64)
    assert np.isfinite(got).all() or not np.isfinite(expected).all(), f"{label}: not finite"
    if expected.size == 0:
        return
    difference = np.abs(got - expected)
    bound = max(1.0, float(np.abs(expected).max())) if scale == "max" else 1 + np.abs(expected)
    error = float((difference / bound).max())
    assert error <= tolerance, f"{label}: error {error:.3g} is above {tolerance:.3g}"


@functools.cache
def load_file(file: str) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """Cases of one golden file in recorded order: ``{case: {"in": {...}, "hp": {...}, "out": {...}}}``."""
    cases: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    with np.load(GOLDEN / f"{file}.npz", allow_pickle=False) as archive:
        for key in archive.files:
            name, kind, entry = key.split("__", 2)
            cases.setdefault(name, {"in": {}, "hp": {}, "out": {}})[kind][entry] = archive[key]
    return cases


def every_case() -> Iterator[tuple[str, str]]:
    for path in sorted(GOLDEN.glob("*.npz")):
        for name in load_file(path.stem):
            yield path.stem, name


def family(file: str, *prefixes: str, slow: bool = False) -> Callable[[Check], Check]:
    """Register a check for the families (documented prefixes) of a golden file.

    ``slow``: networks of full size, several processes or thousands of draws, which `make quick` leaves to `make test`.
    """

    def register(check: Check) -> Check:
        for prefix in prefixes:
            assert prefix not in _FAMILIES.setdefault(file, {}), f"two checks for {file}/{prefix}"
            _FAMILIES[file][prefix] = check
            if slow:
                _SLOW.add((file, prefix))
        return check

    return register


def family_of(file: str, name: str) -> str | None:
    """The longest registered prefix that starts a case's name."""
    return max((p for p in _FAMILIES.get(file, {}) if _begins(name, p)), key=len, default=None)


def is_slow(file: str, name: str) -> bool:
    return (file, family_of(file, name)) in _SLOW


def _begins(name: str, prefix: str) -> bool:
    return re.match(r"\d+".join(map(re.escape, prefix.split("#"))), name) is not None


def run(case: Case) -> None:
    prefix = family_of(case.file, case.name)
    assert prefix is not None, f"no check for the family of case '{case.name}' of {case.file}.npz"
    _FAMILIES[case.file][prefix](case)
    assert not case.uncompared(), f"{case.file}/{case.name}: never compared: {sorted(case.uncompared())}"
