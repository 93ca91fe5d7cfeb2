"""Which versions that pyproject.toml and constraints.txt let in have a known hole, by the list beside this file.

python tests/security/audit.py

The list is kept by hand and needs no network, so it knows what somebody has written into it. With a network
``pip-audit -r constraints.txt`` knows more of the pinned versions, and nothing of the lower bounds.
"""

from __future__ import annotations

import csv
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]


class Hole(NamedTuple):
    """A vulnerability, and the first version without it."""

    package: str
    fixed_in: Version
    name: str


def known() -> list[Hole]:
    with (Path(__file__).parent / "vulnerabilities.csv").open(newline="") as file:
        return [Hole(row["package"], Version(row["fixed in"]), row["name"]) for row in csv.DictReader(file)]


def declared() -> Iterator[str]:
    """Every requirement of the project: to build it, to use it, and with each extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    yield from project["build-system"]["requires"]
    yield from project["project"]["dependencies"]
    for extra in project["project"]["optional-dependencies"].values():
        yield from extra
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    yield from (line for line in pins if line and not line.startswith("#"))


def found(requirements: Iterable[str], holes: Iterable[Hole]) -> list[str]:
    """A sentence on each requirement whose lowest version has a hole."""
    told, holes = [], list(holes)
    for requirement in map(Requirement, requirements):
        floors = [Version(one.version) for one in requirement.specifier if one.operator in (">=", "==", "~=")]
        for hole in holes:
            if canonicalize_name(requirement.name) == hole.package and (not floors or max(floors) < hole.fixed_in):
                told.append(f"{requirement} lets in {hole.name}, which {hole.fixed_in} has mended")
    return told


def main() -> None:
    told = found(declared(), known())
    print(*told or [f"no version that is let in has one of the {len(known())} holes on the list"], sep="\n")
    sys.exit(bool(told))


if __name__ == "__main__":
    main()
