"""The wheel holds the whole source, and runs from a folder that knows nothing of the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

#: folder of the checkout -> its place in the wheel
PLACES = {"ssl/selfsight": "selfsight", **{top: f"selfsight/{top}" for top in ("datamodules", "evaluation", "conf")}}
NO_SOURCE = shutil.ignore_patterns("__pycache__", "*.egg-info")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since a build leaves folders behind in the tree it is made from."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in PLACES:
        shutil.copytree(ROOT / folder, source / folder, ignore=NO_SOURCE)
    done = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "made", "."],
        cwd=source, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return next((source / "made").glob("*.whl"))


@pytest.mark.slow
def test_every_file_is_in_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {
        f"{place}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, place in PLACES.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert packed == expected
    assert {"selfsight/py.typed", "selfsight/conf/recipe/imagenet/swav.yaml"} <= packed


@pytest.mark.slow
def test_the_wheel_runs_away_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """Unpacked it comes before the checkout that is installed here, which the run must not need."""
    installed, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    code = "import sys, selfsight.cli as cli; print(cli.__file__, cli.conf_dir()); cli.main(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, "pretrain", "debug=smoke", "report=false"],
        cwd=elsewhere, env={**os.environ, "PYTHONPATH": str(installed)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    module, conf = done.stdout.splitlines()[0].split()
    assert Path(module).is_relative_to(installed)
    assert Path(conf).is_relative_to(installed)
    assert [path.name for path in elsewhere.iterdir()] == ["runs"]
    assert (elsewhere / "runs" / "simclrv2-digits-1" / "backbone.safetensors").is_file()
