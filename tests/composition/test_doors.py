"""Hydra's own options, a person's own choices and parts, and what a configuration says of itself."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from selfsight import cli
from selfsight.composition import catalogue, keys
from selfsight.composition.defaults import presets_line, stated
from selfsight.composition.overrides import checked, compose
from selfsight.datamodules import folder, select_labels
from selfsight.engine import build, nodes
from selfsight.errors import UserError
from tests.composition.test_words import fails


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a module of the person's own, and nothing of it left behind."""
    (tmp_path / "own_parts.py").write_text(
        "from lightning.pytorch import Callback, LightningModule\n"
        "from selfsight.methods.simclrv2 import SimCLRv2\n"
        "from torch import nn\n\n"
        "class Gentle(SimCLRv2):\n"
        "    def __init__(self, backbone: nn.Module, temperature: float = 0.7, calm: bool = True) -> None:\n"
        "        super().__init__(backbone, temperature=temperature)\n\n"
        "class Still(LightningModule):\n"
        "    pass\n\n"
        "class Bell(Callback):\n"
        "    def __init__(self, tone: str, loud: int = 3) -> None:\n"
        "        self.tone, self.loud = tone, loud\n\n"
        "def nothing() -> int:\n"
        "    return 3\n"
    )
    (tmp_path / "broken_parts.py").write_text("import numpy as np\nprint(np.no_such_thing)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delenv(catalogue.PATH_VARIABLE, raising=False)
    sys.path.append(str(tmp_path))
    yield tmp_path
    for name in ("own_parts", "broken_parts"):
        sys.modules.pop(name, None)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    cli.main(list(words))
    return capsys.readouterr().out


# --- what a configuration says of itself -----------------------------------------------------------------------------


def test_choices_and_job_are_kept() -> None:
    cfg = compose("pretrain", ["method=swav", "backbone=regnety_002", "logger=null"])
    assert cfg.job == "pretrain"
    found = {group: cfg.choices.get(group) for group in ("method", "dataset", "backbone", "views", "presets", "recipe")}
    assert found == {
        "method": "swav", "dataset": "digits", "backbone": "timm", "views": "swav", "presets": "digits/swav",
        "recipe": None,
    }  # fmt: skip
    assert compose("profile", []).job == "profile"
    assert compose("knn", []).choices == {"evaluator": "knn", "dataset": None}


def test_every_key_is_there_with_its_value() -> None:
    """What files leave out is in the signatures; a part is made the same with it and without."""
    cfg = compose("pretrain", [])
    assert cfg.evaluator.final.knn.temperature == 0.07
    assert cfg.trainer.accumulate == 1
    assert cfg.views["global"].solarize_threshold == 128
    assert "params" not in cfg.optimizer, "a run gives it itself"
    for name in cli.choices("evaluator", "evaluate"):
        node = compose("evaluate", [f"evaluator={name}"]).evaluator
        short = OmegaConf.create({"evaluator": stated(node), "stage": "final"}).evaluator
        assert len(short) <= len(node)
        whole = OmegaConf.create({"evaluator": node, "stage": "final"}).evaluator
        made = [re.sub(r"0x\w+|[()\[\]]", "", repr(nodes.build(one))) for one in (short, whole)]
        assert made[0] == made[1], name


def test_what_is_stated_is_what_the_file_states() -> None:
    node = compose("evaluate", ["evaluator=logistic_cv"]).evaluator
    assert stated(node) == OmegaConf.load(catalogue.file("evaluator", "logistic_cv"))


def test_presets_are_told_and_can_be_left_out() -> None:
    line = presets_line(compose("pretrain", ["method=swav", "optimizer.lr=1"]))
    assert line is not None
    assert line.startswith("values for digits: ")
    assert " 30 prototypes," in line
    assert " lr " not in line, "it is the person's own"
    for word in ("presets=null", "tuned=null", "~presets", "dataset=cifar10"):
        cfg = compose("pretrain", ["method=swav", word])
        assert presets_line(cfg) is None
        assert cfg.method.num_prototypes == 3000
    assert compose("pretrain", ["dataset=cifar10", "method=swav", "tuned=digits/swav"]).method.num_prototypes == 30


@pytest.mark.parametrize(
    ("job", "words"),
    [
        ("pretrain", ["backbone=regnety_002", "logger=null", "dataset.seed=3", "optimizer=lars"]),
        ("pretrain", ["~evaluator.final", "~method.chunk_size", "evaluator.online.evaluators={}"]),
        ("pretrain", ["+callbacks.x._target_=lightning.pytorch.callbacks.Timer", "callbacks.x.interval=epoch"]),
        ("compare", ["labels_per_class=4"]),
        ("knn", ["backbone=d/x=y", "evaluator.k=[3]"]),
    ],
)
def test_what_is_checked_stays_as_it_is(job: str, words: list[str]) -> None:
    once = checked(job, words)
    assert compose(job, once) == compose(job, words) == compose(job, checked(job, once))


# --- Hydra's options -------------------------------------------------------------------------------------------------


def test_cfg_prints_what_would_run(capsys: pytest.CaptureFixture[str]) -> None:
    told = OmegaConf.create(printed(capsys, "pretrain", "--cfg", "job", "method=swav"))
    assert told == compose("pretrain", ["method=swav"])
    part = printed(capsys, "pretrain", "-c", "job", "-p", "views.global", "--resolve", "method=swav")
    assert part.startswith("# @package views.global\n")
    assert OmegaConf.create(part).size == 16
    assert OmegaConf.create(printed(capsys, "pretrain", "--cfg=hydra")).hydra.job.name == "pretrain"
    assert {"hydra", "method"} <= {*OmegaConf.create(printed(capsys, "pretrain", "--cfg", "all"))}
    assert printed(capsys, "pretrain", "--cfg", "job", "--package", "seed") == "0\n"
    assert "there is no part 'nope'" in fails(capsys, "pretrain", "--cfg", "job", "--package", "nope")
    assert "is no key 'sed'" not in fails(capsys, "pretrain", "--cfg", "job", "sed=1").replace("'sed'", "'seed'")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["pretrain", "--cfg"], "job, hydra or all was expected"),
        (["pretrain", "--cfg", "every"], "--cfg is 'every'; job, hydra or all was expected"),
        (["pretrain", "--config-dirr", "x"], "Did you mean '--config-dir'?"),
        (["pretrain", "--config-dir", "nowhere"], "'nowhere' is no folder"),
        (["pretrain", "hydra.searchpath=[pkg://no_such_package]"], "names no package"),
        (["pretrain", "--config-name", "mine"], "there is no configuration 'mine'"),
        (["pretrain", "--config-name", "knn"], "is one for `selfsight knn`"),
        (["pretrain", "hydra/launcher=joblib"], "it is for sweeps; add -m"),
        (["pretrain", "hydra.job.chdir=true"], "would have no effect"),
        (["knn", "hydra.run.dir=here"], "a run's folder is runs=DIR and name=NAME"),
        (["pretrain", "-m", "seed=0,1", "hydra.sweep.subdir=x"], "all of a sweep are in hydra.sweep.dir"),
        (["pretrain", "-m", "optimizer.lr=interval(0,1)"], "hydra/sweeper=optuna"),
        (["pretrain", "-m", "method=glob(zz*)"], "fits none of adamatch,"),
        (["pretrain", "-m", "seed=glob(*)"], "glob"),
        (["pretrain", "backbone=[resnet18,resnet34]"], "several choices of backbone"),
        (["pretrain", "-sc", "install=tcsh"], "one of bash"),
        (["evaluate"], "evaluator has to be given: evaluator=NAME"),
    ],
)
def test_a_wrong_option(capsys: pytest.CaptureFixture[str], here: Path, words: list[str], expected: str) -> None:
    assert expected in fails(capsys, *words)


def test_info_shows_the_search_path(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    write(here / "conf" / "method" / "gentle.yaml", "_target_: own_parts.Gentle\n")
    told = printed(capsys, "pretrain", "--config-dir", "conf", "--info", "searchpath")
    assert str(here / "conf") in told
    assert str(cli.conf_dir()) in told
    assert "method/simclrv2" in printed(capsys, "pretrain", "-i", "defaults")


def test_the_shell_completes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, here: Path) -> None:
    write(here / "conf" / "method" / "gentle.yaml", "_target_: own_parts.Gentle\n")

    def offered(line: str, *options: str) -> list[str]:
        monkeypatch.setenv("COMP_LINE", line)
        return printed(capsys, "-sc", "query=bash", *options).split()

    assert "complete -o nospace" in printed(capsys, "-sc", "install=bash")
    assert offered("selfsight pre") == ["pretrain", "prepare"]
    assert offered("selfsight pretrain method=sw") == ["method=swav"]
    assert offered("/usr/bin/selfsight pretrain trainer.max_e") == ["trainer.max_epochs="]
    assert "seed=" in offered("selfsight pretrain see")
    assert offered("selfsight pretrain method=gen", "--config-dir", "conf") == ["method=gentle"]


def test_folders_of_runs_as_hydra_names_them(here: Path) -> None:
    from selfsight.composition.words import hydra_words

    def left(*words: str, many: bool = False) -> list[str]:
        return hydra_words("pretrain", words, many=many, run=True)[2]

    assert left("hydra.run.dir=out/first", "seed=1") == ["runs=out", "name=first", "seed=1"]
    assert left("hydra.run.dir=first") == ["runs=.", "name=first"]
    assert left("hydra.sweep.dir=out", many=True) == ["hydra.sweep.dir=out", "runs=out"]
    assert left("hydra.sweep.dir=logs", "runs=out", many=True) == ["hydra.sweep.dir=logs", "runs=out"]
    assert hydra_words("pretrain", ["hydra.mode=MULTIRUN", "seed=0,1"], many=False, run=True)[0]
    cfg = compose("pretrain", left("hydra.run.dir='${now:%Y}/first'"))
    assert (cfg.runs.isdecimal(), cfg.name) == (True, "first")


# --- choices of one's own --------------------------------------------------------------------------------------------

GENTLE = """# @package _global_
# Attracts, gently.
defaults:
  - override /views: simclr_small
method:
  _target_: own_parts.Gentle
  calm: false
"""


def test_a_folder_of_ones_own(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    write(here / "conf" / "method" / "gentle.yaml", GENTLE)
    write(here / "conf" / "recipe" / "mine" / "calm.yaml", "# @package _global_\njob: pretrain\nbatch_size: 8\n")
    write(here / "conf" / "recipe" / "mine" / "few.yaml", "# @package _global_\njob: finetune\nbatch_size: 8\n")
    for option in (["--config-dir", "conf"], ["hydra.searchpath=[conf]"], [f"hydra.searchpath=[file://{here}/conf]"]):
        told = OmegaConf.create(printed(capsys, "pretrain", "--cfg", "job", "method=gentle", *option))
        assert told.method == {"_target_": "own_parts.Gentle", "calm": False, "temperature": 0.7}
        assert told.choices.method == "gentle"
        assert told.choices.views == "simclr_small"
    own = ["--config-dir", "conf"]
    assert "gentle" in printed(capsys, "pretrain", "--help", *own)
    assert "mine/calm" in printed(capsys, "pretrain", "--help", *own)
    assert "mine/few" not in printed(capsys, "pretrain", "--help", *own)
    assert "gentle" in printed(capsys, "--help", *own)
    assert "Did you mean 'gentle'?" in fails(capsys, "pretrain", "method=gentel", *own)
    assert "one for `selfsight finetune`" in fails(capsys, "pretrain", "recipe=mine/few", *own)
    assert "'method.calmer'. Did you mean 'method.calm'?" in fails(
        capsys, "pretrain", "method=gentle", "method.calmer=true", *own
    )
    assert "there is no method 'gentle'" in fails(capsys, "pretrain", "method=gentle")
    with catalogue.searching(["conf"]):
        done = subprocess.run(
            [sys.executable, "-m", "selfsight.cli", "pretrain", "--help"], capture_output=True, text=True, check=True
        )
    assert "gentle" in done.stdout, "a process that is started knows it, too"
    assert catalogue.PATH_VARIABLE not in os.environ


def test_a_configuration_in_place_of_the_jobs(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    text = "# Mine.\ndefaults:\n  - pretrain\n  - extra: one\n  - _self_\n  - override method: supcon\nbatch_size: 12\n"
    write(here / "conf" / "mine.yaml", text)
    write(here / "conf" / "extra" / "one.yaml", "# @package _global_\nseed: 7\n")
    write(here / "conf" / "extra" / "two.yaml", "# @package _global_\nseed: 9\n")
    own = ["--config-dir", "conf", "--config-name", "mine"]
    told = OmegaConf.create(printed(capsys, "pretrain", "--cfg", "job", *own))
    assert (told.job, told.choices.method, told.batch_size, told.seed) == ("pretrain", "supcon", 12, 7)
    assert OmegaConf.create(printed(capsys, "pretrain", "--cfg", "job", "extra=two", *own)).seed == 9
    assert "Mine." in printed(capsys, "pretrain", "--help", *own)
    added = ["pretrain", "--cfg", "job", "--config-dir", "conf"]
    assert OmegaConf.create(printed(capsys, *added, "+extra=two")).seed == 9
    assert "+extra=NAME adds it (one, two)" in fails(capsys, *added, "extra=two")


@pytest.mark.parametrize(
    ("path", "text", "words", "expected"),
    [
        (
            "recipe/a.yaml",
            "# @package _global_\nbatchsize: 3\n",
            "recipe=a",
            "'batchsize' ({path}). Did you mean 'batch_",
        ),
        (
            "recipe/a.yaml",
            "# @package _global_\ntrainer: {max_epoch: 3}\n",
            "recipe=a",
            "'trainer.max_epoch' ({path}).",
        ),
        (
            "method/a.yaml",
            GENTLE.replace("calm:", "clam:"),
            "method=a",
            "'method.clam' ({path}). Did you mean 'method.cal",
        ),
        (
            "method/a.yaml",
            GENTLE.replace("Gentle", "Gentel"),
            "method=a",
            "no 'Gentel' in own_parts. Did you mean 'Gentle'",
        ),
        ("method/a.yaml", GENTLE.replace("Gentle", "Still"), "method=a", "which is no Method of selfsight"),
        ("callbacks/a.yaml", "a: {_target_: own_parts.Gentle}\n", "callbacks=a", "which is no Callback of lightning"),
        ("callbacks/a.yaml", "a: {_target_: own_parts.Bell}\n", "callbacks=a", "callbacks.a.tone has to be given"),
        ("method/a.yaml", "a: [1\n", "method=a", "cannot be read as YAML"),
        ("method/a.yaml", "- 1\n", "method=a", "is no configuration"),
        ("method/swav.yaml", GENTLE, "method=swav", "method=swav is in two places"),
    ],
)
def test_a_file_that_is_not_right(
    capsys: pytest.CaptureFixture[str], here: Path, path: str, text: str, words: str, expected: str
) -> None:
    file = write(here / "conf" / path, text)
    told = fails(capsys, "pretrain", "--config-dir", "conf", "debug=smoke", *words.split())
    assert expected.format(path=file) in told
    assert not (here / "runs").exists()


# --- parts of one's own by _target_ ----------------------------------------------------------------------------------


def test_a_target_begins_anew(here: Path) -> None:
    """It has the defaults of its own signature, not those of what was chosen in its place."""
    cfg = compose("pretrain", ["method=swav", "method._target_=own_parts.Gentle", "method.calm=false"])
    assert cfg.method == {"_target_": "own_parts.Gentle", "calm": False, "temperature": 0.7}
    assert cfg.choices.method == "own_parts.Gentle"
    assert compose("pretrain", ["dataset=cifar10"]).choices.presets is None
    cfg = compose("pretrain", ["optimizer._target_=torch.optim.NAdam"])
    assert (cfg.optimizer.lr, cfg.optimizer.momentum_decay) == (0.002, 0.004)
    cfg = compose("pretrain", ["schedule.lr._target_=selfsight.optim.schedule.Constant", "schedule.lr.value=2"])
    assert cfg.schedule.lr == {"_target_": "selfsight.optim.schedule.Constant", "value": 2}
    dense = ["evaluator.data._target_=selfsight.evaluation.dense.segmentation.folder", "evaluator.data.root=masks"]
    assert compose("dense", dense).evaluator.data.root == "masks"


def test_callbacks_and_loggers_by_name(here: Path) -> None:
    for sign in ("", "+", "++"):
        words = [f"{sign}callbacks.bell._target_=own_parts.Bell", f"{sign}callbacks.bell.tone=high"]
        cfg = compose("pretrain", words)
        assert cfg.callbacks == {"bell": {"_target_": "own_parts.Bell", "tone": "high", "loud": 3}}
    (made,) = build.callbacks(cfg)
    assert (made.tone, made.loud) == ("high", 3)  # type: ignore[attr-defined]
    for several in (["logger=wandb", "logger=csv"], ["logger=[wandb,csv]"], ["logger=[csv]", "logger=wandb"]):
        assert {*compose("pretrain", several).logger} == {"wandb"}, "metrics.csv is always written"
    assert {*compose("pretrain", ["logger=[wandb,tensorboard]"]).logger} == {"wandb", "tensorboard"}
    assert {*compose("pretrain", ["logger=wandb", "logger=tensorboard"]).logger} == {"wandb", "tensorboard"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["method._target_=own_part.Gentle"], "no module 'own_part'. Did you mean 'own_parts'?"),
        (["method._target_=foo.Gentle"], "there is no module 'foo'.\n"),
        (["method._target_=own_parts.Gentel"], "no 'Gentel' in own_parts. Did you mean 'Gentle'?"),
        (["method._target_=selfsight.methods.swav.SwaV"], "Did you mean 'SwAV'?"),
        (["method._target_=broken_parts.Gentle"], "'broken_parts' does not import: AttributeError: module 'numpy'"),
        (["method._target_=swav"], "a dotted path such as package.module.Name was expected"),
        (["method._target_=sys.path"], "which is no class and no function"),
        (["method._target_=own_parts.Gentle", "method.num_prototypes=3"], "there is no key 'method.num_prototypes'"),
        (["method._target_=own_parts.Gentle", "method.temprature=3"], "Did you mean 'method.temperature'?"),
        (["method._target_=own_parts.Gentle", "method.calm=3"], "true or false was expected"),
        (["+callbacks.x._target_=own_parts.Bell", "callbacks.x.tone=a", "callbacks.x.lod=2"], "'callbacks.x.loud'"),
        (["+callbacks.x._target_=own_parts.nothing"], "callbacks.x (own_parts.nothing) makes a int; a callback"),
        (["dataset._target_=own_parts.nothing"], "dataset (own_parts.nothing) makes a int; an ImageData"),
        (["evaluator.final.x._target_=own_parts.nothing"], "evaluator.final.x (own_parts.nothing) is no evaluator"),
        (["evaluator.online.evaluators.x._target_=own_parts.nothing"], "evaluators.x (own_parts.nothing) is no evalu"),
        (["evaluator.final={}", "evaluator.final.x._target_=own_parts.nothing"], "evaluator.final.x (own_parts"),
        (["+callbacks.x._target_=torch.nn.ReLU"], "which is no Callback of lightning"),
        (["optimizer._target_=torch.nn.ReLU"], "which is no Optimizer of torch"),
        (["+new.key=1"], "there is no key 'new.key'."),
        (["++seeds=1"], "there is no key 'seeds'. Did you mean 'seed'?"),
        (["+trainer.max_step=1"], "Did you mean 'trainer.max_steps'?"),
        (["~method.temprature"], "Did you mean 'method.temperature'?"),
        (["~evaluator.online"], "cannot do without evaluator.online"),
        (["~seed"], "cannot do without seed; give it a value: seed=VALUE"),
        (["evaluator.online=null"], "set one of them."),
    ],
)
def test_a_wrong_part(capsys: pytest.CaptureFixture[str], here: Path, words: list[str], expected: str) -> None:
    assert expected in fails(capsys, "pretrain", "debug=smoke", *words)
    assert not (here / "runs").exists()


def test_what_is_emptied_may_be_filled_again_and_emptied_after(here: Path) -> None:
    own = "evaluator.final.x._target_=selfsight.evaluation.KNN"
    for empty in ("evaluator.final={}", "~evaluator.final"):
        assert list(compose("pretrain", [empty, own]).evaluator.final) == ["x"]
    assert {"knn", "x"} <= {*compose("pretrain", [own]).evaluator.final}


def test_a_part_that_a_job_has_not(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    told = fails(capsys, "linear", "run=last", "backbone._target_=own_parts.Gentle")
    assert "there is no key 'backbone._target_'" in told
    assert "there is no key 'evaluator.x'" in fails(capsys, "knn", "run=last", "evaluator.x._target_=own_parts.nothing")


def test_what_is_taken_away_is_at_its_default_or_empty() -> None:
    assert compose("pretrain", ["~evaluator.final"]).evaluator.final == {}
    assert compose("pretrain", ["~evaluator.online.evaluators.knn"]).evaluator.online.evaluators == {}
    assert compose("pretrain", ["dataset=folder", "~dataset.eval_resize"]).dataset.eval_resize is None
    assert compose("pretrain", ["optimizer=sgd", "~optimizer.momentum"]).optimizer.momentum == 0
    assert "lr" not in compose("pretrain", ["~schedule.lr"]).schedule
    assert compose("pretrain", ["~trainer.max_epochs"]).trainer.max_epochs == 100


# --- words -----------------------------------------------------------------------------------------------------------


def test_what_others_call_a_thing_leads_to_a_key(capsys: pytest.CaptureFixture[str]) -> None:
    """Every right-hand side of the table is a key or a group of pretrain."""
    cfg = compose("pretrain", ["dataset=folder", "dataset.root=x"])
    there = {*keys.flat_keys(cfg), *catalogue.job_groups("pretrain")}
    assert {*keys.CALLED_ELSEWHERE.values()} <= there
    for word, meant in {
        "learning_rate=1": "optimizer.lr", "optimizer.learning_rate=1": "optimizer.lr",
        "epochs=1": "trainer.max_epochs",
        "batchsize=1": "batch_size", "optimizer.wd=1": "optimizer.weight_decay", "gpus=1": "trainer.devices",
        "trainer.gpus=1": "trainer.devices", "data=x": "dataset", "arch=x": "backbone", "workers=1": "num_workers",
        "trainer.val_check_interval=1": "evaluator.online.every",
    }.items():  # fmt: skip
        assert f"Did you mean '{meant}'?" in fails(capsys, "pretrain", word)
    for job, word, meant in [("compare", "gpus=2", "workers"), ("prepare", "image_size=64", "shortest")]:
        assert f"Did you mean '{meant}'?" in fails(capsys, job, word)


def test_help_on_a_choice_shows_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    told = printed(capsys, "pretrain", "method=swav", "trainer=default", "--help")
    assert "method=swav\n" in told
    for line in ("  num_prototypes: 30", "  max_steps: null", "  queue_start_epoch: 15"):
        assert line in told


# --- quickly ---------------------------------------------------------------------------------------------------------

AT_ONCE = [
    ["pretrain", "batch_size=0"],
    ["pretrain", "trainer.max_epoch=3"],
    ["pretrain", "metod=swav"],
    ["pretrain", "optimizer.learning_rate=1"],
    ["pretrain", "dataset=folder"],
    ["pretrain", "dataset=folder", "dataset.root=nowhere"],
    ["pretrain", "method=fixmatch", "labels.list=nowhere"],
    ["finetune", "run=nowhere"],
    ["knn", "run=nowhere"],
    ["pretrain", "resume=nowhere"],
    ["distill"],
    ["pretrain", "method=fixmatch"],
    ["pretrain", "init_from=nowhere"],
    ["pretrain", "dataset=folder", "dataset.root=photos"],
    ["pretrain", "dataset=folder", "dataset.root=photos", "batch_size=1", "dataset.labels=nowhere.csv"],
    ["pretrain", "dataset=folder", "dataset.root=photos", "batch_size=1", "dataset.test=nowhere"],
    ["pretrain", "dataset=folder", "dataset.root=photos", "batch_size=1", "dataset.only=nowhere"],
    ["prune", "run=nowhere"],
    ["knn", "weights=nowhere", "dataset=digits"],
    ["prepare", "source=nowhere", "out=there"],
    ["compare-runs", "nowhere", "here"],
    ["pretrain", "dataset=cifar10"],
    ["pretrain", "recipe=imagenet/swav"],
    ["knn", "run=lats"],
    ["runs", "sort=knn"],
    ["import", "source=nowhere.pth", "out=there"],
]


def test_what_needs_no_torch_is_refused_without_it(here: Path) -> None:
    write(here / "photos" / "a" / "1.png", "")
    code = (
        "import sys\nfrom selfsight.cli import main\n"
        f"for words in {AT_ONCE!r}:\n"
        "    try:\n        main(words)\n    except SystemExit as stop:\n        assert stop.code, words\n"
        "    assert 'torch' not in sys.modules, words\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) == len(AT_ONCE)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["pretrain", "dataset=folder", "dataset.root=photos"],
            r"batch_size is 256 and 'photos' has 9 files, .* choose batch_size=4, or add recipe=small",
        ),
        (["knn", "run=lats"], "'lats' is no run folder .* Did you mean 'last'"),
        (["pretrain", "dataset=cifar10"], "'data', which does not exist: dataset.download=true fetches it, or dataset"),
        (["pretrain", "dataset=imagenet"], "'data/imagenet', which does not exist: dataset.root=DIR says where it is"),
    ],
)
def test_what_is_refused_says_what_to_type(
    capsys: pytest.CaptureFixture[str], here: Path, words: list[str], sentence: str
) -> None:
    for number in range(9):
        write(here / "photos" / "a" / f"{number}.png", "")
    with pytest.raises(SystemExit):
        cli.main(words)
    assert re.search(sentence, capsys.readouterr().err)


def test_a_place_is_refused_early_as_it_is_later(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    write(here / "file", "")
    write(here / "photos" / "a" / "1.png", "")
    for root in ("nowhere", "file", None):
        with pytest.raises(UserError) as said:
            folder(root)  # type: ignore[arg-type]
        with pytest.raises(SystemExit):
            cli.main(["pretrain", "dataset=folder", *([] if root is None else [f"dataset.root={root}"])])
        assert capsys.readouterr().err == f"selfsight: {said.value}\n"
    images: Any = compose("pretrain", [])
    with pytest.raises(UserError) as said:
        select_labels(build.dataset(images).train, rule="list", file="nowhere")
    with pytest.raises(SystemExit):
        cli.main(["pretrain", "method=fixmatch", "labels.list=nowhere"])
    assert capsys.readouterr().err == f"selfsight: {said.value}\n"
