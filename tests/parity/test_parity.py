"""Every recorded case of every golden file passes through the product's public functions."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest

from . import harness

for module in sorted(Path(__file__).parent.glob("check_*.py")):
    importlib.import_module(f"{__package__}.{module.stem}")


@pytest.mark.parametrize(("file", "name"), [pytest.param(f, n, id=f"{f}-{n}") for f, n in harness.every_case()])
def test_case(file: str, name: str) -> None:
    harness.run(harness.Case(file, name, harness.load_file(file)[name]))


def perturbed(case: harness.Case, output: str) -> harness.Case | None:
    """The same case with one expected entry changed by far more than any tolerance."""
    value = np.array(case.out[output])
    if value.size == 0:
        return None
    flat = value.reshape(-1)
    if value.dtype.kind in "US":
        flat[0] = flat[0][::-1] + "?" if value.dtype.itemsize > 4 else "?"
    elif value.dtype.kind == "b":
        flat[0] = not flat[0]
    elif value.dtype.kind in "iu":
        flat[0] = flat[0] + 5 if flat[0] < 128 else flat[0] - 5
    else:
        flat[0] += 0.1 * max(1.0, float(np.abs(flat).max()))
    return harness.Case(case.file, case.name, {"in": case.inp, "hp": case.hp, "out": {**case.out, output: value}})
