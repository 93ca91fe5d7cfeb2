"""What pyproject.toml declares is what is imported: no more, no less, and no sooner than it is asked for."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from selfsight.compat import left_out

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
#: distribution: what it is imported as, where that is another name
MODULES = {
    "faiss-cpu": "faiss",
    "huggingface-hub": "huggingface_hub",
    "hydra-core": "hydra",
    "mlflow-skinny": "mlflow",
    "opencv-python-headless": "cv2",
    "pillow": "PIL",
    "pillow-heif": "pillow_heif",
    "pyyaml": "yaml",
    "scikit-learn": "sklearn",
    "typing-extensions": "typing_extensions",
    "umap-learn": "umap",
}
#: declared for somebody who imports it in our name, and where we say so
BY_OTHERS = {
    "wandb": "conf/logger/wandb.yaml",
    "tensorboard": "conf/logger/tensorboard.yaml",
    "sqlalchemy": "conf/logger/mlflow.yaml",
    "alembic": "conf/logger/mlflow.yaml",
    "hydra-submitit-launcher": "ssl/selfsight/composition/overrides.py",
    "onnx": "ssl/selfsight/checkpoints/export.py",
    "onnxscript": "ssl/selfsight/checkpoints/export.py",
    "zensical": "docs/site/make_site.py",
    "latex2mathml": "docs/site/make_site.py",
    "mkdocstrings-python": "docs/site/zensical.toml",
}


def declared(entries: list[str]) -> set[str]:
    return {entry.partition("[")[0].partition(">")[0].partition("=")[0].strip() for entry in entries}


def extras() -> dict[str, set[str]]:
    every = PROJECT["optional-dependencies"].items()
    return {name: declared(entries) for name, entries in every if name not in ("all", "dev")}


@functools.cache
def imported() -> dict[str, set[str]]:
    """Modules of others that we import, with the files that do."""
    found: dict[str, set[str]] = {}
    for top in ("ssl/selfsight", "datamodules", "evaluation"):
        for path in (ROOT / top).rglob("*.py"):
            for name in _names(ast.parse(path.read_text())):
                module = name.partition(".")[0]
                if module not in sys.stdlib_module_names and module != "selfsight":
                    found.setdefault(module, set()).add(str(path.relative_to(ROOT)))
    return found


def _names(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", None) == "import_module":
            yield from (one.value for one in node.args if isinstance(one, ast.Constant) and "." not in str(one.value))


def test_what_is_imported_is_declared() -> None:
    known = {MODULES.get(name, name) for name in declared(PROJECT["dependencies"]).union(*extras().values())}
    missing = {module: files for module, files in imported().items() if module not in known}
    assert not missing


def test_what_is_declared_is_imported() -> None:
    found = set(imported())
    for name in declared(PROJECT["dependencies"]).union(*extras().values()):
        if name in BY_OTHERS:
            place = ROOT / BY_OTHERS[name]
            assert place.exists(), f"{name} is declared for {place}"
        else:
            assert MODULES.get(name, name) in found, f"nothing imports {name}"


def test_what_extras_bring_is_imported_when_it_is_used() -> None:
    """Never while a file is loaded, unless the file can do without: the package works without extras."""
    optional = {MODULES.get(name, name) for names in extras().values() for name in names}
    for place in {place for module in optional for place in imported().get(module, ())}:
        at_load = ast.Module(ast.parse((ROOT / place).read_text()).body, [])
        at_load.body = [node for node in at_load.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        assert not {name.partition(".")[0] for name in _names(at_load)} & optional, place


def test_timm_is_imported_in_one_place() -> None:
    """Whoever imports it past `selfsight.backbones` brings wandb along."""
    for place in imported()["timm"]:
        if not place.startswith("ssl/selfsight/backbones/"):
            nodes = ast.parse((ROOT / place).read_text()).body
            at_load = ast.Module([node for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))], [])
            assert "timm" not in {name.partition(".")[0] for name in _names(at_load)}, place


def test_all_brings_every_extra_of_a_user() -> None:
    (whole,) = PROJECT["optional-dependencies"]["all"]
    assert Requirement(whole).extras == set(PROJECT["optional-dependencies"]) - {"all", "docs", "dev"}


def test_every_sentence_names_an_extra_that_there_is() -> None:
    for top in ("ssl/selfsight", "datamodules", "evaluation", "conf", "docs"):
        for path in (ROOT / top).rglob("*"):
            if path.suffix in (".py", ".yaml", ".md"):
                named = set(re.findall(r"selfsight\[(\w+)\]", path.read_text()))
                assert named <= {*extras(), "all", "dev"}, f"{path} names {named - set(extras())}"


def test_versions_with_known_holes_are_left_out() -> None:
    """hydra-core below 1.3.8 runs what a configuration names, lightning below 2.6.6 what a checkpoint names."""
    entries = PROJECT["dependencies"]
    assert any(entry.startswith("hydra-core>=1.3.8") for entry in entries)
    assert any(entry.startswith("lightning>=2.6.6") for entry in entries)


@pytest.mark.slow
def test_what_libraries_only_look_at_comes_with_the_run_that_uses_it(tmp_path: Path) -> None:
    code = f"""
import sys
from selfsight import cli
words = ["pretrain", "debug=smoke", "report=false", "evaluator=knn", "runs={tmp_path}"]
cli.main([*words, "name=plain"])
assert "wandb" not in sys.modules, "nobody has asked for it"
assert "scipy.signal" not in sys.modules, "torchmetrics looks for an old name in it"
assert {{"timm", "torchmetrics"}} <= {{*sys.modules}}
import scipy.signal, wandb  # they are there all the same
assert wandb.__version__
assert scipy.signal.windows.hann(3).tolist() == [0, 1, 0]
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_leaving_out_leaves_nothing_behind() -> None:
    before = list(sys.meta_path)
    sys.modules.pop("this", None)
    with left_out("this", "antigravity"), pytest.raises(ModuleNotFoundError, match="'this'"):
        import this  # noqa: F401
    assert sys.meta_path == before
    assert "this" not in sys.modules


@pytest.mark.parametrize(
    ("meanwhile", "afterwards"),
    [
        ("import torchmetrics", "assert name not in sys.modules"),
        ("import scipy.signal; inspect.getmodule(inspect)", "assert name not in sys.modules"),
        ("import scipy.signal as held", "assert held.medfilt([1, 5, 1]).tolist() == [1, 1, 1]"),
        ("import torchmetrics; from scipy.signal import medfilt", "assert sys.modules[name].medfilt is medfilt"),
        ("from scipy.signal import *", "assert sys.modules[name].medfilt is medfilt"),
        ("import scipy.signal.windows", "assert scipy.signal.windows.hann is sys.modules[name].windows.hann"),
        ("import this", "assert 'scipy' not in sys.modules"),
    ],
)
def test_scipys_signals_are_left_out_until_they_are_used(meanwhile: str, afterwards: str) -> None:
    code = f"""
import inspect, sys
from selfsight.compat import without_signals
hooks, name = [*sys.meta_path], "scipy.signal"
with without_signals():
    {meanwhile}
assert sys.meta_path == hooks
{afterwards}
import scipy.signal.windows
assert scipy.signal is sys.modules["scipy.signal"] and scipy.signal.windows.hann(3).tolist() == [0, 1, 0]
assert scipy.signal.medfilt([1, 5, 1]).tolist() == [1, 1, 1]
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_signals_that_are_there_stay() -> None:
    code = """
import sys, scipy.signal as signals
from selfsight.compat import without_signals
with without_signals():
    import torchmetrics
assert sys.modules["scipy.signal"] is signals
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("room", ["ssl/selfsight", "datamodules", "evaluation"])
def test_nobody_writes_into_the_table_of_modules(room: str) -> None:
    for path in (ROOT / room).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            targets = node.targets if isinstance(node, (ast.Assign, ast.Delete)) else []
            assert not any(ast.unparse(one).startswith("sys.modules[") for one in targets), path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("logger", "extra"), [("tensorboard", "'selfsight[tensorboard]'"), ("mlflow", "'selfsight[mlflow]'")]
)
def test_a_logger_is_named_with_its_package(
    logger: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from selfsight import cli
    from selfsight.engine import build

    monkeypatch.setattr(build, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        cli.main(["pretrain", "debug=smoke", f"logger={logger}", f"runs={tmp_path / 'runs'}"])
    told = capsys.readouterr().err
    assert told.strip() == f"selfsight: logger={logger} needs a package: pip install {extra}."
    assert not (tmp_path / "runs").exists()
