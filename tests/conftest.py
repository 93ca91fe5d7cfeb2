"""What many tests share: one finished run, and the mark of the quick lane."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from filelock import FileLock

from selfsight import cli
from selfsight.runs.folder import RUN_VARIABLE

#: folders whose tests are quick unless they are marked slow (`make quick`)
QUICK = ("parity", "properties", "structure")
TESTS = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0]
        if folder in QUICK and item.get_closest_marker("slow") is None:
            item.add_marker("quick")


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished `selfsight pretrain debug=smoke`, made once for all workers. To be looked at, and not written to."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    run = shared / "finished" / "simclr"
    with FileLock(shared / "finished.lock"):
        if not (run / "summary.json").is_file():
            shutil.rmtree(run, ignore_errors=True)  # of a worker that was stopped
            cli.main(["pretrain", "debug=smoke", "report=false", f"runs={run.parent}", f"name={run.name}"])
            os.environ.pop(RUN_VARIABLE, None)
    return run


@pytest.fixture
def own_run(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of `finished_run`, for tests that add to it."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))
