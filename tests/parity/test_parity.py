"""Every recorded case of every golden file passes through the product's public functions."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from _pytest.mark import ParameterSet

from . import harness

for module in sorted(Path(__file__).parent.glob("check_*.py")):
    importlib.import_module(f"{__package__}.{module.stem}")


def parameters(cases: Iterable[tuple[str, str]]) -> list[ParameterSet]:
    slow = pytest.mark.slow
    return [pytest.param(f, n, id=f"{f}-{n}", marks=slow if harness.is_slow(f, n) else ()) for f, n in cases]


@pytest.mark.parametrize(("file", "name"), parameters(harness.every_case()))
def test_case(file: str, name: str) -> None:
    harness.run(harness.Case(file, name, harness.load_file(file)[name]))


def perturbed(case: harness.Case, output: str) -> harness.Case:
    """The same case with one expected entry changed by far more than any tolerance."""
    value = np.array(case.out[output], order="C")  # the flat view below has to be one
    flat = value.reshape(-1)
    if value.dtype.kind == "U":
        flat[0] = "?"
    elif value.dtype.kind == "b":
        flat[0] = not flat[0]
    elif value.dtype.kind in "iu":
        flat[0] = flat[0] + 5 if flat[0] < 128 else flat[0] - 5
    else:
        flat[0] += 0.1 * max(1.0, float(np.abs(flat).max()))
    return harness.Case(case.file, case.name, {"in": case.inp, "hp": case.hp, "out": {**case.out, output: value}})


def smallest_of_each_family() -> list[tuple[str, str]]:
    """One case a family, the one with the least to compute."""
    chosen: dict[tuple[str, str | None], tuple[int, str]] = {}
    for file, name in harness.every_case():
        arrays = harness.load_file(file)[name]
        if arrays["out"] and harness.family_of(file, name):
            size = sum(a.size for kind in arrays.values() for a in kind.values())
            key = (file, harness.family_of(file, name))
            chosen[key] = min(chosen.get(key, (size, name)), (size, name))
    return [(file, name) for (file, _), (_, name) in chosen.items()]


@pytest.mark.slow
@pytest.mark.parametrize(("file", "name"), parameters(smallest_of_each_family()))
def test_a_perturbed_number_is_noticed(file: str, name: str) -> None:
    case = harness.Case(file, name, harness.load_file(file)[name])
    outputs = [o for o in case.out if case.out[o].size]
    rng = np.random.default_rng(0)
    for output in rng.permutation(outputs)[:2].tolist():
        changed = perturbed(case, output)
        try:
            harness.run(changed)
        except AssertionError:
            continue
        assert output in changed.only_informative, f"{file}/{name}: a wrong '{output}' passes"


def test_an_unknown_family_fails() -> None:
    case = harness.Case("swav", "nobody_knows_me", {"in": {}, "hp": {}, "out": {}})
    with pytest.raises(AssertionError, match="no check for the family"):
        harness.run(case)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [3, 4])
def test_the_number_of_processes_is_that_of_the_case(processes: int) -> None:
    """The authors' codes of one process are those of several that share its samples."""
    known = harness.load_file("swav")["sinkhorn_b12_k40"]
    scores, codes = (
        array.reshape(processes, -1, array.shape[1]) for array in (known["in"]["scores"], known["out"]["codes"])
    )
    case = {"in": known["in"] | {"scores": scores}, "hp": known["hp"], "out": known["out"] | {"codes": codes}}
    harness.run(harness.Case("swav", f"sinkhorn_{processes}rank", case))
