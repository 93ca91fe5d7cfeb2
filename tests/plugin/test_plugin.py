"""A package from outside brings one of each kind of part; everything works by name, as docs/extending.md shows it."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm.models._registry as timm_registry
import torch

import selfsight
from selfsight import cli
from selfsight.composition.overrides import compose
from selfsight.runs.folder import RUN_VARIABLE, RunFolder

PACKAGE = Path(__file__).parent / "package"
PAGE = Path(__file__).parents[2] / "docs" / "extending.md"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working directory, where the package is installed; nothing of it stays."""
    here = tmp_path_factory.mktemp("plugin")
    for copy in ("source", "built"):  # building leaves traces that would make the source a plug-in, too
        shutil.copytree(PACKAGE, here / copy, ignore=shutil.ignore_patterns("__pycache__"))
    words = "-m pip install -q --disable-pip-version-check --no-index --no-deps --no-build-isolation"
    target = ["--target", str(here / "site"), str(here / "built")]
    subprocess.run([sys.executable, *words.split(), *target], check=True)
    (here / "work").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(here / "site")
        patch.setenv("PYTHONPATH", str(here / "site"), prepend=os.pathsep)
        patch.delenv(RUN_VARIABLE, raising=False)
        patch.chdir(here / "work")
        yield here / "work"
    for module in [name for name in sys.modules if name.partition(".")[0] == "example_plugin"]:
        del sys.modules[module]
    for known in (timm_registry._model_entrypoints, timm_registry._model_to_module):
        known.pop("pebble", None)
    timm_registry._module_to_models["network"].discard("pebble")


@pytest.fixture(scope="module")
def run(place: Path) -> RunFolder:
    cli.main(["pretrain", "recipe=example", "callbacks=diary", "logger=ledger", "evaluator.final.centroids._target_="
              "example_plugin.parts.Centroids", "report=false"])  # fmt: skip
    os.environ.pop(RUN_VARIABLE, None)
    return RunFolder(place / "runs" / "align-stripes-1")


def test_each_part_took_part(run: RunFolder, place: Path) -> None:
    cfg = run.config()
    assert dict(cfg.choices).items() >= {"method": "align", "backbone": "pebble", "optimizer": "sign_sgd"}.items()
    assert cfg.method == {"_target_": "example_plugin.method.Align", "hidden_dim": 32}
    assert (place / "diary.txt").read_text() == "epoch 0: 4 steps\nepoch 1: 8 steps\n"
    assert (run.path / "ledger" / "metrics.csv").is_file()
    summary = run.read_summary()
    from example_plugin.parts import Centroids

    features = [selfsight.Run(run.path).embed(split) for split in ("train", "test")]
    assert summary["pretrained"]["centroid_top1"] == Centroids()(*features)["centroid_top1"]
    assert summary["protocols"]["centroids"] == "nearest class mean"
    assert {"knn_top1", "linear_top1"} <= set(summary["pretrained"])


def test_the_optimizer_moves_by_its_rule(place: Path) -> None:
    from example_plugin.parts import SignSGD

    w = torch.tensor([1.0, -2.0], requires_grad=True)
    optimizer = SignSGD([w], lr=0.5)
    w.grad = torch.tensor([3.0, -0.1])
    optimizer.step()
    assert w.tolist() == [0.5, -1.5]


def test_the_step_of_a_view_is_in_the_batch(place: Path) -> None:
    """Halved values, of the brightest the data set has (209), before mean and std."""
    from selfsight.engine import build

    parts = build.parts(compose("pretrain", ["recipe=example"]))
    batch = next(iter(parts.datamodule.train_dataloader()))
    mean, std = parts.datamodule.data.mean[0], parts.datamodule.data.std[0]
    assert max(float(view.max()) for view in batch.views) * std + mean <= 105 / 255


def test_the_network_comes_back_as_it_was(run: RunFolder) -> None:
    backbone = selfsight.load(run.path)
    assert backbone.num_features == 8
    described = json.loads((run.path / "backbone.json").read_text())
    assert described["backbone"]["name"] == "pebble"
    assert type(backbone).__module__ == "example_plugin.network"


@pytest.mark.parametrize(
    ("words", "figure"),
    [
        ("knn run={run}", "knn_top1"),
        ("evaluate run={run} evaluator=centroids", "centroid_top1"),
    ],
)
def test_jobs_on_the_frozen_network(
    run: RunFolder, words: str, figure: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(words.format(run=run.path).split())
    assert figure in capsys.readouterr().out


def test_finetuning_the_report_and_a_sweep(run: RunFolder, place: Path) -> None:
    cli.main(["finetune", f"run={run.path}", "labels.per_class=2", "trainer.max_epochs=1", "steps_per_epoch=2",
              "report=false", "name=tuned"])  # fmt: skip
    tuned = RunFolder(place / "runs" / "tuned")
    assert tuned.config().backbone.name == "pebble"
    assert set(tuned.read_summary()["classifiers"]) == {"student"}
    cli.main(["report", f"run={run.path}"])
    page = (run.path / "report.html").read_text()
    assert {"centroid top1", "Align"} <= {*re.findall("centroid top1|Align", page)}
    cli.main(["pretrain", "-m", "recipe=example", "method.hidden_dim=8,16", "trainer.max_epochs=1", "report=false",
              "runs=swept"])  # fmt: skip
    widths = [RunFolder(place / "swept" / f"align-stripes-{i}").config().method.hidden_dim for i in (1, 2)]
    assert widths == [8, 16]


def test_help_and_near_misses_know_them(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "selfsight.cli", "pretrain", "--help"], capture_output=True, text=True, check=True
    )
    for name in ("align", "pebble", "stripes", "sign_sgd", "diary", "ledger", "dark"):
        assert re.search(rf"\b{name}\b", done.stdout), name
    with pytest.raises(SystemExit):
        cli.main(["pretrain", "method=algin"])
    assert "Did you mean 'align'?" in capsys.readouterr().err


# --- packages that are not right --------------------------------------------------------------------------------------


def installed(folder: Path, package: str, entry: str, code: str) -> None:
    """A package of one module, with what an installation leaves beside it."""
    module = package.replace("-", "_")
    (folder / f"{module}.py").write_text(code)
    described = folder / f"{module}-1.0.dist-info"
    described.mkdir(parents=True)
    (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (described / "entry_points.txt").write_text(f"[selfsight.plugins]\n{entry} = {module}\n")


@pytest.mark.parametrize(
    ("packages", "told"),
    [
        (
            [("bad-one", "bad", "import no_such_library\n")],
            "the plug-in 'bad' (package bad-one) does not import: ModuleNotFoundError: No module named "
            "'no_such_library'. Mend it, or take it away: pip uninstall bad-one.",
        ),
        (
            [("first-one", "same", ""), ("other-one", "same", "")],
            "two plug-ins have the name 'same', of the packages first-one and other-one; take one away: pip uninstall "
            "other-one.",
        ),
    ],
)
def test_a_wrong_package_is_named(
    packages: list[tuple[str, str, str]],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for package in packages:
        installed(tmp_path, *package)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.main(["pretrain", "debug=smoke"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"selfsight: {told}\n"
    assert not (tmp_path / "runs").exists()


@pytest.fixture(scope="module")
def typed(place: Path) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place.parent / "source")
        yield place.parent / "source"


# --- the page --------------------------------------------------------------------------------------------------------

SHOWN = re.compile(r"^`(example_plugin/\S+|pyproject\.toml)`[^\n]*\n\n```\w+\n(.*?)^```$", re.M | re.S)
TYPED = re.compile(r"^    selfsight (.*)$", re.M)


def test_the_page_shows_the_package() -> None:
    """Every file whose name stands above a block is in the package as it stands there, whole or a part of it."""
    shown = SHOWN.findall(PAGE.read_text())
    assert len(shown) >= 12
    for name, text in shown:
        assert text.strip() in (PACKAGE / name).read_text(), name


@pytest.mark.parametrize("words", TYPED.findall(PAGE.read_text()))
def test_what_the_page_types_can_be_typed(words: str, typed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands, from the folder of the package's source; where it names the choices, nothing is installed."""
    job, *rest = shlex.split(words)
    quick = ["trainer.max_epochs=1", "report=false"] if job == "pretrain" else []
    if "--config-dir" in rest:
        monkeypatch.setenv("PYTHONPATH", os.environ["PYTHONPATH"].partition(os.pathsep)[2])
        subprocess.run([sys.executable, "-m", "selfsight.cli", job, *rest, *quick], check=True)
        return
    cli.main([job, *rest, *quick])
    os.environ.pop(RUN_VARIABLE, None)
