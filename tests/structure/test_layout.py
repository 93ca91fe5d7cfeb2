"""The house rules: import floors, no package that shadows the standard library, configuration inside the wheel."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

#: part of selfsight -> its floor; a file imports from its own part or from lower floors
FLOORS = {
    "errors": 0,
    "files": 1, "plugins": 1, "validation": 1, "contracts": 1, "compat": 1, "cpu_memory": 1,
    "nn": 2, "trust": 2,
    "optim": 3, "losses": 3,
    "backbones": 4,
    "checkpoints": 5,
    "methods": 6, "datamodules": 6,
    "evaluation": 7,
    "composition": 8, "runs": 8,
    "engine": 9,
    "reporting": 10,
    "jobs": 11, "cli": 11, "__main__": 12,
    "api": 12,
}  # fmt: skip
SOURCES = {
    "selfsight": ROOT / "ssl" / "selfsight",
    "datamodules": ROOT / "datamodules",
    "evaluation": ROOT / "evaluation",
}


def files() -> Iterator[tuple[str, Path]]:
    for top, folder in SOURCES.items():
        for path in sorted(folder.rglob("*.py")):
            part = path.relative_to(folder).parts[0].removesuffix(".py") if top == "selfsight" else top
            if path.parent != folder or path.name != "__init__.py" or top != "selfsight":
                yield part, path


def imported(path: Path) -> Iterator[str]:
    """Parts of selfsight a file imports at run time (imports for type checking alone do not count)."""
    tree = ast.parse(path.read_text())
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            top = node.module == "selfsight"
            names = [f"selfsight.{alias.name}" for alias in node.names] if top else [node.module]
        for name in names:
            first, *rest = name.split(".")
            if first == "selfsight" and rest and rest[0] in FLOORS:
                yield rest[0]


@pytest.mark.parametrize(("part", "path"), [pytest.param(p, f, id=str(f.relative_to(ROOT))) for p, f in files()])
def test_imports_go_down(part: str, path: Path) -> None:
    for other in imported(path):
        allowed = other == part or FLOORS[other] < FLOORS[part] or {other, part} == {"jobs", "cli"}
        assert allowed, f"{path} imports {other}"


def test_every_file_stands_on_a_floor() -> None:
    assert {part for part, _ in files()} == set(FLOORS)


def test_standard_ssl_is_not_shadowed() -> None:
    assert not (ROOT / "ssl" / "__init__.py").exists()
    done = subprocess.run(
        [sys.executable, "-c", "import ssl; ssl.SSLContext; print(ssl.__file__)"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert not Path(done.stdout.strip()).is_relative_to(ROOT / "ssl")


def test_every_folder_of_the_source_is_in_the_wheel() -> None:
    import tomllib

    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    sources = {"selfsight": "selfsight", "datamodules": "selfsight.datamodules", "evaluation": "selfsight.evaluation"}
    expected = {
        ".".join((sources[top], *init.parent.relative_to(folder).parts))
        for top, folder in SOURCES.items()
        for init in folder.rglob("__init__.py")
    }
    assert expected | {"selfsight.conf"} == listed
