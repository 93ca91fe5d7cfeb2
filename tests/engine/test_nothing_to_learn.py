"""Configurations from which nothing can be learned are refused, or warned of, with what to type in their place."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from selfsight import cli
from selfsight.engine import checks
from selfsight.engine.monitor import Monitor
from selfsight.engine.nan_guard import NanGuard
from selfsight.engine.options import TrainerOptions
from selfsight.errors import UserError
from selfsight.methods.barlow import BarlowTwins
from selfsight.methods.base import Method
from selfsight.methods.byol import BYOL
from selfsight.methods.dino import DINO
from selfsight.methods.mocov3 import MoCoV3
from selfsight.methods.semi.fixmatch import FixMatch
from selfsight.methods.semi.softmatch import SoftMatch
from selfsight.methods.simclrv2 import SimCLRv2
from selfsight.methods.swav import SwAV
from selfsight.methods.vicreg import VICReg
from selfsight.runs.console import make_console
from selfsight.runs.folder import RunFolder

from ..small import SmallNet

LABELS = torch.arange(6) % 3


@pytest.mark.parametrize(
    ("kind", "setting", "sentence"),
    [
        (SwAV, {"num_prototypes": 1}, "num_prototypes of SwAV is 1; a whole number of at least 2"),
        (DINO, {"out_dim": 1}, "out_dim of DINO is 1; a whole number of at least 2"),
        (DINO, {"student_temperature": 0}, "student_temperature of DINO is 0; a number above 0"),
        (MoCoV3, {"temperature": 0.0}, "temperature of MoCoV3 is 0.0; a number above 0"),
        (BarlowTwins, {"lambd": -1}, "lambd of BarlowTwins is -1; a number of at least 0"),
        (VICReg, {"expander": []}, r"expander of VICReg is \[\]"),
        (SoftMatch, {"n_sigma": 0, "labels": LABELS, "num_classes": 3}, "n_sigma of SoftMatch is 0; a number above 0"),
        (SoftMatch, {"labels": LABELS % 1, "num_classes": 1}, "num_classes of SoftMatch is 1; .* at least 2"),
    ],
)
def test_settings_without_a_lesson(kind: Any, setting: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        kind(SmallNet(), **setting)


def batches(size: int, labels: torch.Tensor | None = None, classes: tuple[str, ...] = ("cat", "dog")) -> Any:
    facts = {"labels": labels, "num_classes": len(classes)}
    return SimpleNamespace(batch_size=size, facts=facts, dataset=SimpleNamespace(classes=classes, targets=None))


@pytest.mark.parametrize(
    ("learner", "compared"),
    [
        (SimCLRv2(SmallNet()), "SimCLRv2 the negatives"),
        (VICReg(SmallNet(), expander=(5,)), "VICReg variances and covariances"),
        (BarlowTwins(SmallNet(), projector=(5,)), "BarlowTwins correlations"),
    ],
)
def test_a_batch_of_one_has_nothing_to_be_compared_with(learner: Method, compared: str) -> None:
    with pytest.raises(UserError, match=rf"batch_size is 1, and of {compared} .* batch_size=2 or more"):
        checks.check_batch(learner, batches(1), processes=1)
    checks.check_batch(learner, batches(2), processes=1)


def test_an_image_a_process_cannot_be_normalised_over() -> None:
    learner = BYOL(SmallNet(), hidden_dim=4, dim=3)
    for size, processes in ((1, 1), (2, 2)):
        with pytest.raises(UserError, match=f"heads of BYOL normalise .* batch_size={2 * processes} or more"):
            checks.check_batch(learner, batches(size), processes)
    checks.check_batch(learner, batches(2), processes=1)


def test_labels_of_one_class() -> None:
    with pytest.raises(UserError, match="all labels are of one class, 'dog', and FixMatch learns to tell classes"):
        checks.check_classes(FixMatch, batches(4, torch.tensor([1, -1, 1])))
    checks.check_classes(FixMatch, batches(4, torch.tensor([1, 0, 1])))
    checks.check_classes(SimCLRv2, batches(4, torch.tensor([1, 1, 1])))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["method=fixmatch"], r"none of them is set; .* labels\.per_class=4\.$"),
        (["method=fixmatch", "labels.per_class=4", "labels.total=9"], "2 of the first three are set"),
        (["method=fixmatch", "labels.per_class=4", "labels.split=a.json"], "leave out labels.per_class"),
        (["method=fixmatch", "datamodule=images"], r"FixMatch learns from labelled and .* labels\.per_class=4\.$"),
        (
            ["datamodule=semi", "labels.per_class=4", "views=fixmatch", "batch_size=8", "presets=null"],
            "SimCLRv2 learns .* take datamodule=images",
        ),
    ],
)
def test_few_labels_are_asked_for_at_the_start(words: list[str], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=sentence):
        cli.run(["pretrain", "trainer.accelerator=cpu", f"runs={tmp_path}", *words])
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("kept", [["debug=smoke"], ["debug=smoke", "labels.total=20"], ["labels.rule=all"]])
def test_a_try_brings_labels_where_none_are_named(kept: list[str]) -> None:
    labels = cli.compose("pretrain", ["method=fixmatch", *kept]).labels
    assert labels.per_class == (1 if kept == ["debug=smoke"] else None)
    assert "labels" not in cli.compose("pretrain", ["debug=smoke"])


def test_an_epoch_without_loss_is_told_once(tmp_path: Path) -> None:
    folder, console = RunFolder(tmp_path), make_console()
    monitor = Monitor(folder, console, None, NanGuard(folder, console, TrainerOptions(), seed=0))
    assert monitor.warnings({"loss": 0.1}, {}, None) == []
    (sentence,) = monitor.warnings({"loss": 0.0}, {}, None)
    assert "batch_size=" in sentence
    assert monitor.warnings({"loss": 0.0}, {}, None) == []
