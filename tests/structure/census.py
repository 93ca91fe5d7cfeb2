"""Figures of the house: who takes the configuration, how much is untyped, what is imported by its name in a string.

python tests/structure/census.py
"""

from __future__ import annotations

import ast
import functools
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).parents[2]
SOURCES = (ROOT / "ssl" / "selfsight", ROOT / "datamodules", ROOT / "evaluation")
#: rooms above the datamodules, where what goes from hand to hand has a type
UPPER = ("composition", "runs", "engine", "reporting", "jobs")
#: where names in strings become objects: those that a configuration holds, and the command line's jobs
DOORS = (
    "compat.py", "plugins.py", "composition/targets.py", "composition/plugins.py", "engine/build.py", "jobs/launch.py",
    "__init__.py", "methods/__init__.py",  # what is asked for by name is imported when it is asked for
    "backbones/registry.py",  # each file of the folder registers what it defines
)  # fmt: skip


def upper_files() -> list[Path]:
    core = SOURCES[0]
    return [core / "cli.py", *(path for room in UPPER for path in sorted((core / room).rglob("*.py")))]


def untyped() -> dict[str, int]:
    """How often ``Any`` stands in an annotation, by file above the datamodules."""

    def count(path: Path) -> int:
        tree = ast.parse(path.read_text())
        return sum(isinstance(node, ast.Name) and node.id == "Any" for node in ast.walk(tree))

    return {str(path.relative_to(ROOT)): n for path in upper_files() if (n := count(path))}


def string_imports() -> list[str]:
    """Calls of ``import_module`` and ``__import__`` outside the doors."""
    found = []
    for source in SOURCES:
        for path in sorted(source.rglob("*.py")):
            if path.relative_to(source).as_posix() in DOORS:
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                called = getattr(node, "func", None)
                name = getattr(called, "attr", None) or getattr(called, "id", None)
                if isinstance(node, ast.Call) and name in ("import_module", "__import__"):
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    return found


def imports() -> dict[str, set[str]]:
    """Which files import which of ours while they are loaded, by module name."""
    modules = dict(_modules())
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        graph[module] = {
            target
            for name in _imported_at_load(ast.parse(path.read_text()))
            if (target := name if name in modules else name.rpartition(".")[0]) in modules and target != module
        }
    return graph


def circles() -> list[list[str]]:
    """Groups of files that import one another in a ring (Tarjan's strongly connected components)."""
    graph, index, low, stack, found = imports(), {}, {}, [], []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph[node]:
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            ring = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(ring) > 1:
                found.append(sorted(ring))

    for module in graph:
        if module not in index:
            visit(module)
    return found


def handed_on(words: tuple[str, ...] = ("debug=smoke",)) -> Counter[str]:
    """Functions of ours that take the configuration or a node of it from `jobs.pretrain.run` on, with their calls."""
    from omegaconf import DictConfig

    from selfsight.composition.overrides import checked, compose
    from selfsight.jobs import launch, pretrain

    seen: Counter[str] = Counter()
    places = [source.resolve() for source in SOURCES]
    resolved = functools.cache(lambda name: Path(name).resolve())  # symbolic links and other spellings are one place

    def watch(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event != "call" or code.co_name.startswith("<"):
            return
        path = resolved(code.co_filename)
        source = next((place for place in places if path.is_relative_to(place)), None)
        if source is None:
            return
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        if any(isinstance(frame.f_locals.get(name), DictConfig) for name in names):
            seen[f"{path.relative_to(source)}:{code.co_qualname}"] += 1

    with tempfile.TemporaryDirectory() as runs:
        cfg = compose("pretrain", checked("pretrain", [*words, f"runs={runs}"], sweep=False))
        run = pretrain.run

        def watched(cfg: DictConfig) -> Any:
            sys.setprofile(watch)
            try:
                return run(cfg)
            finally:
                sys.setprofile(None)

        pretrain.run = watched
        try:
            launch.start("pretrain", cfg)
        finally:
            pretrain.run = run
    return seen


def _modules() -> Iterator[tuple[str, Path]]:
    for source, package in zip(SOURCES, ("selfsight", "selfsight.datamodules", "selfsight.evaluation"), strict=True):
        for path in source.rglob("*.py"):
            name = ".".join((package, *path.relative_to(source).with_suffix("").parts))
            yield name.removesuffix(".__init__"), path


def _imported_at_load(tree: ast.Module) -> Iterator[str]:
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and getattr(node.test, "id", None) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        waiting.extend(ast.iter_child_nodes(node))


def main() -> None:
    taken, loose = handed_on(), untyped()
    files = {place.partition(":")[0] for place in taken}
    print(f"configuration of pretrain: {len(taken)} functions in {len(files)} files take it")
    for place in sorted(taken):
        print(f"    {place}")
    print(f"Any above the datamodules: {sum(loose.values())}")
    for file, n in sorted(loose.items(), key=lambda item: -item[1]):
        print(f"    {n:>3} {file}")
    print(f"imports by string outside the doors: {len(string_imports())}", *string_imports(), sep="\n    ")
    print(f"circles of imports: {len(circles())}", *map(" → ".join, circles()), sep="\n    ")
    jobs = sum(len(path.read_text().splitlines()) for path in (SOURCES[0] / "jobs").glob("*.py"))
    print(f"jobs: {jobs} lines")


if __name__ == "__main__":
    main()
