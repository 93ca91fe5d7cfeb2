"""A run folder is data: what its configuration names is built only where a part of a run is made of such things."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import re
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torchvision
import yaml

import selfsight
from selfsight import cli, plugins, trust
from selfsight.composition.catalogue import conf_dir
from selfsight.errors import UserError
from selfsight.runs.folder import RunFolder
from selfsight.trust import Trust, trusting

#: a module that leaves a file behind when it is imported
BITE = (
    "import pathlib\nimport torch\npathlib.Path('BITTEN').touch()\nclass Net(torch.nn.Flatten):\n    num_features = 3\n"
)

#: part: what a stranger might write there
PAYLOADS: dict[str, tuple[str, object]] = {
    "a loader": ("dataset", {"_target_": "torch.load", "f": "x.pt", "weights_only": False}),
    "a loader in an argument": ("dataset.seed", {"_target_": "numpy.load", "file": "x.npy", "allow_pickle": True}),
    "a loader in a list": ("method.weights", [1, [{"_target_": "torch.load", "f": "x.pt"}]]),
    "a writer": ("backbone.name", {"_target_": "pathlib.Path.write_text", "_args_": ["BITTEN", "x"]}),
    "a command": ("optimizer", {"_target_": "os.system", "command": "touch BITTEN", "_partial_": True}),
    "a function for later": ("backbone.norm", {"_target_": "hydra.utils.get_method", "path": "os.system"}),
    "a built-in": ("schedule.lr", {"_target_": "builtins.eval", "_args_": ["1"]}),
    "a job of ours": ("logger.csv", {"_target_": "selfsight.cli.run", "words": ["--version"]}),
    "a writer of ours": ("evaluator.final.knn", {"_target_": "selfsight.files.write_text", "path": "BITTEN"}),
    "through a module of ours": ("method", {"_target_": "selfsight.methods.base.torch.load", "f": "x.pt"}),
    "through a library": ("backbone", {"_target_": "torch.nn.functional.torch.load", "f": "x.pt"}),
    "a network in a data set": ("dataset", {"_target_": "torch.nn.Identity"}),
    "in a place of its own": ("extra", {"_target_": "torch.nn.Identity"}),
    "a module that is there": ("backbone", {"_target_": "bite.Net"}),
    "weights of somewhere": ("backbone.checkpoint_path", "x.pt"),
    "a network of somewhere": ("backbone.name", "hf-hub:somebody/something"),
    "a network of somewhere in capitals": ("backbone.name", "HF-HUB:somebody/something"),
    "a network of somewhere by position": ("backbone", {"_target_": "timm.create_model", "_args_": ["hf-hub:a/b"]}),
    "a file by position": ("backbone", {"_target_": "timm.create_model", "_args_": ["r", False, None, None, "x.pt"]}),
    "a folder of somewhere": ("backbone", {"_target_": "timm.create_model", "model_name": "local-dir:/tmp/x"}),
    "weights to fetch": ("backbone", {"_target_": "torchvision.models.resnet18", "weights": "DEFAULT"}),
    "weights of timm to fetch": ("backbone", {"_target_": "timm.create_model", "model_name": "r", "pretrained": True}),
    "weights to fetch inside": ("method.head", {"_target_": "torchvision.models.resnet18", "weights": "DEFAULT"}),
    "words on weights": ("then", {"next": {"job": "finetune", "words": ["+backbone.checkpoint_path=x.pt"]}}),
    "a reference": ("backbone._target_", "${oc.env:HOME}"),
    "words": ("then", {"next": {"job": "finetune", "words": ["method._target_=os.system"]}}),
    "words on folders": ("then", {"next": {"job": "finetune", "words": ["hydra.searchpath=[file:///tmp]"]}}),
}  # fmt: skip


@pytest.fixture
def stranger(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, object], Path]:
    """Makes a copy of a finished run in which one part is what it is given; the working directory holds `BITE`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bite.py").write_text(BITE)

    def make(key: str, value: object) -> Path:
        run = tmp_path / "run"
        shutil.copytree(finished_run, run)
        cfg = yaml.safe_load((run / "config.yaml").read_text())
        *parents, leaf = key.split(".")
        node = cfg
        for parent in parents:
            node = node[parent] if isinstance(node.get(parent), dict) else node.setdefault(parent, {})
        node[leaf] = value
        (run / "config.yaml").write_text(yaml.safe_dump(cfg, sort_keys=False))
        return run

    yield make
    assert not (tmp_path / "BITTEN").exists()
    assert "bite" not in sys.modules


@pytest.mark.parametrize("name", PAYLOADS)
def test_what_is_no_part_of_a_run_is_named_and_not_built(name: str, stranger: Callable[[str, object], Path]) -> None:
    key, value = PAYLOADS[name]
    with pytest.raises(UserError, match="trust=true") as refused:
        RunFolder.open(stranger(key, value))
    texts = [str(value), *re.findall(r"'(?:_target_|path)': '([^']+)'", str(value))]
    assert any(text.strip("[]'") in str(refused.value) for text in texts) or key in str(refused.value)


@pytest.mark.parametrize(
    "words",
    [
        ["knn", "run=RUN"], ["linear", "run=RUN"], ["embed", "run=RUN"], ["report", "run=RUN"], ["explore", "run=RUN"],
        ["replay", "run=RUN"], ["prune", "run=RUN"],
        ["export", "run=RUN", "format=timm"], ["detect", "run=RUN", "dataset.root=x"], ["finetune", "run=RUN"],
        ["distill", "teacher=RUN"], ["compare-runs", "RUN"], ["pretrain", "resume=RUN"],
    ],
    ids=lambda words: words[0],
)  # fmt: skip
def test_every_job_that_reads_a_folder_refuses_it(
    words: list[str], stranger: Callable[[str, object], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = stranger(*PAYLOADS["a module that is there"])
    with pytest.raises(SystemExit):
        cli.main([word.replace("RUN", str(run)) for word in words])
    assert "would build 'bite.Net' (backbone._target_)" in capsys.readouterr().err


def test_the_description_beside_a_backbone_is_data_too(stranger: Callable[[str, object], Path]) -> None:
    run = stranger("seed", 0)
    description = json.loads((run / "backbone.json").read_text())
    for backbone in ({"_target_": "bite.Net"}, {"name": "resnet18", "checkpoint_path": "x.pt"}):
        (run / "backbone.json").write_text(json.dumps(description | {"backbone": backbone}))
        with pytest.raises(UserError, match="trust=true"):
            selfsight.load(run)


# --- what may be built -----------------------------------------------------------------------------------------------


def test_what_the_person_names_or_stands_behind_is_built() -> None:
    content = {"backbone": {"_target_": "mine.Net", "act": [{"_target_": "mine.Act"}]}}
    with pytest.raises(UserError, match=r"'mine.Net' \(backbone._target_\)"):
        trust.check(content, "config.yaml")
    with trusting(Trust(named=frozenset({"mine.Net"}))), pytest.raises(UserError, match=r"mine.Act.*backbone.act\[0\]"):
        trust.check(content, "config.yaml")
    with trusting(Trust(named=trust.targets(content))):
        trust.check(content, "config.yaml")
    with trusting(Trust(everything=True)):
        trust.check(content, "config.yaml")
    assert trust.given() == Trust()


def test_trust_goes_beside_resume_and_is_not_kept(own_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(own_run.parent)
    (own_run.parent / "own_nets.py").write_text(
        "import torch\nclass Net(torch.nn.Sequential):\n    num_features = 3\n"
        "    def __init__(self):\n        super().__init__(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())\n"
    )
    words = ["debug=smoke", "report=false", "evaluator.final={}", "evaluator.online.evaluators={}"]
    cli.main(["pretrain", *words, "backbone._target_=own_nets.Net", "name=own", "method=simsiam"])
    config = Path("runs/own/config.yaml")
    assert "trust" not in yaml.safe_load(config.read_text())
    with pytest.raises(UserError, match=r"own_nets\.Net"):
        cli.run(["pretrain", "resume=runs/own"])
    cli.run(["pretrain", "resume=runs/own", "trust=true"])


def test_a_plugin_brings_what_it_defines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "brought").mkdir()
    (tmp_path / "brought" / "__init__.py").write_text("import os\nfrom os import system\n")
    (tmp_path / "brought" / "nets.py").write_text("from torch import load\nclass Net: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(plugins, "installed", lambda: (plugins.Plugin("brought", "brought", "brought"),))
    trust.check({"backbone": {"_target_": "brought.nets.Net"}}, "config.yaml")
    for target in ("brought.os.system", "brought.system", "brought.nets.load", "broughtelse.Net", "brought.none.Net"):
        with pytest.raises(UserError, match=target):
            trust.check({"backbone": {"_target_": target}}, "config.yaml")


def test_every_part_of_ours_may_stand_in_its_place() -> None:
    """All that the package's own files name, and what else the parts of a run are made of."""
    groups = [group for group in trust.PARTS if (conf_dir() / group).is_dir()]
    found = {}
    for group in groups:
        for path in (conf_dir() / group).rglob("*.yaml"):
            content = yaml.safe_load(path.read_text()) or {}
            found |= dict.fromkeys(trust.targets({group: content}), group)
    assert len(found) > 60
    for target, group in found.items():
        trust.check({group: {"x": {"_target_": target}}}, "conf")
    for group, target in {
        "backbone": "torchvision.models.resnet18", "method": "torch.nn.Linear", "optimizer": "torch.optim.NAdam",
        "schedule": "torch.optim.lr_scheduler.StepLR", "logger": "lightning.pytorch.loggers.CSVLogger",
        "callbacks": "lightning.pytorch.callbacks.EarlyStopping",
    }.items():  # fmt: skip
        trust.check({group: {"_target_": target}}, "conf")


OPEN_ROOMS = (
    "selfsight.datamodules", "selfsight.methods", "selfsight.methods.semi", "selfsight.backbones",
    "selfsight.evaluation", "selfsight.evaluation.probes", "selfsight.evaluation.dense",
    "selfsight.evaluation.detection", "selfsight.optim", "torch.nn", "torch.nn.modules", "torch.optim",
    "torchvision.models", "torchvision.transforms", "torchvision.transforms.v2", "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers",
)  # fmt: skip


def test_no_path_leads_out_of_the_rooms_that_are_open() -> None:
    """What the patterns let through is a class or one of the builders; nobody's imported module is on the way."""
    patterns = [re.compile(pattern, re.ASCII) for patterns in trust.PARTS.values() for pattern in patterns]

    def open_to(path: str) -> bool:
        return any(pattern.fullmatch(path) for pattern in patterns)

    functions = set()
    for room in OPEN_ROOMS:
        package = importlib.import_module(room)
        inner = [found.name for found in pkgutil.iter_modules(package.__path__, f"{room}.")]
        for module in [package, *(importlib.import_module(n) for n in inner if room.startswith("selfsight"))]:
            for name, value in inspect.getmembers(module):
                path = f"{module.__name__}.{name}"
                if isinstance(value, types.ModuleType):
                    assert value.__name__.startswith(room) or not any(open_to(f"{path}.{n}") for n in dir(value)), path
                elif open_to(path) and inspect.isfunction(value):
                    functions.add(value)
    builders = {torchvision.models.get_model_builder(name) for name in torchvision.models.list_models()}
    assert {f"{one.__module__}.{one.__name__}" for one in functions - builders if one.__module__ != "typing"} == {
        "selfsight.backbones.registry.create",
        "selfsight.evaluation.dense.segmentation.folder",
        "selfsight.evaluation.dense.segmentation.shapes",
        "selfsight.evaluation.dense.segmentation.voc",
        "selfsight.evaluation.detection.coco.coco",
        "selfsight.optim.schedule.teacher_momentum",
    }
