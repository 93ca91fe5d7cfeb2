"""Few labels from the command line: fine-tune, distil, semi-supervised runs, the three steps, the comparison."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

import selfsight
from selfsight import cli
from selfsight.composition import catalogue
from selfsight.composition.overrides import compose_with
from selfsight.engine.monitor import Monitor
from selfsight.engine.session import Session
from selfsight.errors import UserError
from selfsight.jobs import compare, pipeline
from selfsight.reporting import classification
from selfsight.runs import comparison
from selfsight.runs.folder import RUN_VARIABLE, RunFolder

SMOKE = ["debug=smoke", "report=false", "seed=0"]


def go(*words: str) -> None:
    """A job in this process; a mistake is raised, not printed."""
    os.environ.pop(RUN_VARIABLE, None)
    try:
        cli.run(list(words))
    finally:
        os.environ.pop(RUN_VARIABLE, None)


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def runs(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretraining of two steps, fine-tuned on two labels a class."""
    runs = tmp_path_factory.mktemp("runs")
    shutil.copytree(finished_run, runs / "simclr")
    go("finetune", *SMOKE, f"run={runs}/simclr", "labels.per_class=2", f"runs={runs}", "name=tuned")
    return runs


def test_another_method_goes_on_from_a_finished_run(runs: Path) -> None:
    words = ["method=fixmatch", "labels.per_class=2", "trainer.max_epochs=1", "optimizer.lr=0", f"runs={runs}"]
    go("pretrain", *SMOKE, *words, f"start={runs}/simclr", "name=started")
    began, goes_on = load_file(runs / "simclr" / "backbone.safetensors"), weights(runs / "started")
    learned = [name for name in began if "running" not in name and "num_batches" not in name]
    assert learned
    assert all(torch.equal(began[name], goes_on[f"backbone.{name}"]) for name in learned)
    with pytest.raises(UserError, match="holds another network than the backbone of this run"):
        go("pretrain", *SMOKE, "backbone.width=8", f"start={runs}/simclr", f"runs={runs}", "name=wrong")
    assert not (runs / "wrong").exists()


def test_finetune_leaves_figures_labels_and_starts_from_the_projector(runs: Path) -> None:
    content, split = read(runs / "tuned" / "classification.json"), read(runs / "tuned" / "labels.json")
    figures = content["classifiers"]["student"]
    confusion = torch.tensor(figures["confusion"])
    assert content["classes"] == [str(digit) for digit in range(10)]
    assert len(split["indices"]) == 20
    assert figures["top1"] == pytest.approx(float(confusion.diagonal().sum() / confusion.sum()))
    known = [share for share in figures["per_class"] if share is not None]
    assert known == [pytest.approx(float(r[i] / r.sum())) for i, r in enumerate(confusion.float()) if r.sum()]
    assert {"top5", "ece", "best_top1", "median_top1"} <= figures.keys()
    source, tuned = weights(runs / "simclr"), weights(runs / "tuned")
    unused = "projector.1.linear.weight"  # beyond the layer that fine-tuning starts from
    assert torch.equal(source[unused], tuned[unused])
    assert not torch.equal(source["projector.0.linear.weight"], tuned["projector.0.linear.weight"])


def test_reports_of_runs_that_classify(runs: Path) -> None:
    """At the end of the run, and again later; its figures at every stage, too."""
    words = ["debug=smoke", "seed=0", f"runs={runs}"]
    go("finetune", *words, f"run={runs}/simclr", "labels.per_class=1", "name=tuned-report")
    go("distill", *words, f"teacher={runs}/tuned-report", "name=distilled-report")
    for name in ("tuned-report", "distilled-report"):
        report = runs / name / "report.html"
        first = report.read_text()
        report.unlink()
        go("report", f"run={runs}/{name}")
        assert "<h2>Classes</h2>" in first
        assert "<h2>Classes</h2>" in report.read_text()
    go("knn", f"run={runs}/tuned-report", "stage=all")
    assert "projection" in read(runs / "tuned-report" / "eval" / "knn-all.json")["result"]


def test_the_report_shows_classes_confusion_and_all_accuracies(runs: Path) -> None:
    found = classification.section(RunFolder(runs / "tuned"))
    figures = read(runs / "tuned" / "classification.json")["classifiers"]["student"]
    for title, key in (
        ("top-1 (last epoch)", "top1"), ("top-1 (best epoch)", "best_top1"),
        ("top-1 (median of the last 20)", "median_top1"),
        ("top-5", "top5"), ("calibration error", "ece"),
    ):  # fmt: skip
        assert f"{title} {figures[key]:.1%}" in found
    assert "heatmap" in found
    worst = min(share for share in figures["per_class"] if share is not None)
    assert f"Accuracy by class: {figures['per_class'].index(worst)} {worst:.1%}" in found


def test_only_the_worst_of_many_classes_are_named() -> None:
    shares = [None, *(0.01 * i for i in reversed(range(50)))]
    said = classification.by_class(shares, [f"c{i}" for i in range(51)])
    assert said.startswith("Accuracy by class: c50 0.0% · c49 1.0%")
    assert said.endswith("c11 39.0% … and 10 better ones")


def test_head_alone(runs: Path) -> None:
    words = ["method.freeze_after=4", "layer=0", "labels.per_class=1", f"runs={runs}", "name=head"]
    go("finetune", *SMOKE, f"run={runs}/simclr", *words)
    source, tuned = weights(runs / "simclr"), weights(runs / "head")
    assert all(torch.equal(source[key], tuned[key]) for key in source if key.startswith("backbone."))
    assert tuned["classifier.weight"].abs().sum() > 0


def test_options_of_other_recipes(runs: Path) -> None:
    options = [
        "method.mixup=0.8",
        "method.cutmix=1",
        "method.label_smoothing=0.1",
        "method.layer_decay=0.5",
        "method.ema=0.5",
    ]
    go("finetune", *SMOKE, f"run={runs}/simclr", "labels.per_class=1", *options, f"runs={runs}", "name=options")
    assert read(runs / "options" / "classification.json")["classifiers"].keys() == {"student", "teacher"}


def test_the_labels_of_one_run_in_another(runs: Path) -> None:
    split = runs / "tuned" / "labels.json"
    go("pretrain", *SMOKE, "method=fixmatch", f"labels.split={split}", "mu=2", f"runs={runs}", "name=fixmatch")
    assert (runs / "fixmatch" / "labels.json").read_text() == split.read_text()
    row = list(csv.DictReader((runs / "fixmatch" / "metrics.csv").open()))[-1]
    assert {"student_top1", "teacher_top1"} <= row.keys()
    carried, kept = load_file(runs / "fixmatch" / "backbone.safetensors"), weights(runs / "fixmatch")
    averaged = {name: kept[f"teacher.module.backbone.{name}"] for name in carried}
    assert all(torch.equal(carried[name], averaged[name]) for name in carried)
    assert any(not torch.equal(carried[name], kept[f"backbone.{name}"]) for name in carried)
    summary = read(runs / "fixmatch" / "summary.json")
    assert summary["classifiers"].keys() == {"student", "teacher"}
    assert summary["classifiers"]["student"]["top1"] == pytest.approx(float(row["student_top1"]), abs=1e-6)


def test_simmatchv2_runs(runs: Path) -> None:
    go("pretrain", *SMOKE, "method=simmatchv2", "labels.per_class=1", "mu=2", f"runs={runs}", "name=simmatchv2")
    assert len(read(runs / "simmatchv2" / "labels.json")["indices"]) == 10


def test_a_student_may_be_given_other_labels_than_its_teacher(runs: Path) -> None:
    words = ["labels.rule=all", "method.alpha=0.5", f"runs={runs}", "name=all-labels"]
    go("distill", *SMOKE, f"teacher={runs}/tuned", *words)
    assert (
        len(read(runs / "all-labels" / "labels.json")["indices"]) == read(runs / "all-labels" / "labels.json")["images"]
    )


def test_distill_to_itself_and_to_another(runs: Path) -> None:
    go("distill", *SMOKE, f"teacher={runs}/tuned", f"runs={runs}", "name=self")
    assert (runs / "self" / "labels.json").read_text() == (runs / "tuned" / "labels.json").read_text()
    config = (runs / "self" / "config.yaml").read_text()
    assert "temperature: 0.1" in config
    tuned, student = weights(runs / "tuned"), weights(runs / "self")
    assert torch.equal(student["teacher.0.conv1.weight"], tuned["backbone.conv1.weight"])
    small = ["student=resnet_digits", "method.alpha=0.5", f"runs={runs}", "name=small"]
    go("distill", *SMOKE, f"teacher={runs}/self", *small)
    assert "temperature: 1.0" in (runs / "small" / "config.yaml").read_text()


class Stop(Exception):
    """The process is gone."""


@pytest.mark.parametrize("job", ["finetune", "distill"])
def test_a_stopped_step_goes_on_to_the_same_numbers(runs: Path, job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    start = {"finetune": [f"run={runs}/simclr", "labels.per_class=1"], "distill": [f"teacher={runs}/tuned"]}[job]
    words = [job, *SMOKE, *start, "trainer.max_epochs=2", f"runs={runs}"]
    go(*words, f"name={job}-whole")
    whole = Monitor.on_train_epoch_end

    def gone(self: Any, trainer: Any, module: Any) -> None:
        whole(self, trainer, module)
        if trainer.current_epoch == 1:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(Monitor, "on_train_epoch_end", gone)
        with pytest.raises(Stop):
            go(*words, f"name={job}-stopped")
    go(job, f"resume={runs}/{job}-stopped")
    first, second = weights(runs / f"{job}-whole"), weights(runs / f"{job}-stopped")
    assert all(torch.equal(first[key], second[key]) for key in first)
    same = [read(runs / f"{job}-{name}" / "classification.json") for name in ("whole", "stopped")]
    assert same[0] == same[1]


def test_three_steps_in_one_command(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smoke = "['debug=smoke','report=false']"
    words = [*SMOKE, "recipe=simclrv2_3step", "labels.per_class=1", f"then.finetune.words={smoke}"]
    words += [f"then.distill.words={smoke}", f"runs={runs}", "name=steps"]
    with monkeypatch.context() as patch:
        fit = Session.fit

        def gone(session: Session) -> bool:
            if session.job == "distill":
                raise Stop
            return fit(session)

        patch.setattr(Session, "fit", gone)
        with pytest.raises(Stop):
            go("pretrain", *words)
    before = weights(runs / "steps" / "finetune")
    go("pretrain", f"resume={runs}/steps")
    after = weights(runs / "steps" / "finetune")
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert read(runs / "steps" / "distill" / "summary.json")["classifiers"]["student"]["top1"] >= 0
    splits = {(runs / "steps" / step / "labels.json").read_text() for step in ("finetune", "distill")}
    assert len(splits) == 1


def test_the_steps_of_a_shrunk_run_are_as_short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever lengths their own words say; a step that names a choice of debug itself has its own."""
    own = ["debug=smoke", "trainer.max_epochs=7"]
    words = ["debug=smoke", "recipe=simclrv2_3step", f"then.finetune.words={own}", "labels.per_class=1"]
    cfg = cli.compose("pretrain", cli.checked("pretrain", words, sweep=False))
    performed: dict[str, Any] = {}

    def perform(job: str, words: list[str], folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
        performed[job] = compose_with(job, words, settings)
        return {}

    monkeypatch.setattr(pipeline, "perform", perform)
    pipeline.follow(cfg, RunFolder(tmp_path))
    assert performed["finetune"].trainer.max_epochs == 7
    distilled = performed["distill"]
    assert distilled.optimizer.lr == 0.002
    for key in ("max_epochs", "limit_batches", "devices", "compile"):
        assert distilled.trainer[key] == cfg.trainer[key]
    assert (distilled.batch_size, distilled.num_workers, distilled.limit_images) == (4, 0, 64)


def test_comparison_goes_on_row_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["compare", "recipe=digits/few_labels", "approaches=[linear_simclrv2,fixmatch]", "labels_per_class=[1]"]
    words += ["workers=1", "words=['debug=smoke']", f"runs={tmp_path}"]
    true = compare.accuracy
    calls: list[tuple[str, int]] = []

    def counted(cfg: Any, folder: Any, name: str, labels: int, seed: int) -> float:
        calls.append((name, seed))
        if len(calls) == 3:
            raise Stop
        return true(cfg, folder, name, labels, seed)

    monkeypatch.setattr(compare, "accuracy", counted)
    with pytest.raises(Stop):
        go(*words, "seeds=1")
    table = tmp_path / "compare-digits" / "comparison.csv"
    first = table.read_text()
    assert first.splitlines()[0] == "approach,labels_per_class,seed,accuracy"
    assert len(first.splitlines()) == 2
    go(*words, "seeds=1")
    assert table.read_text().startswith(first)
    assert [name for name, _ in calls] == ["simclrv2", "fixmatch", "linear_simclrv2", "simclrv2", "linear_simclrv2"]
    page = (tmp_path / "compare-digits" / "comparison.html").read_text()
    assert "error_y" in page
    assert "linear_simclrv2" in page
    with pytest.raises(UserError, match="another words; give this one a name"):
        go(*words[:-2], "words=['debug=smoke','batch_size=4']", words[-1])


def test_comparison_of_figures(tmp_path: Path) -> None:
    """Of each run what it has measured at its end, and of raw pixels what stands beside one of them."""
    steps = "approaches=[pixels,simclrv2,fixmatch]"
    words = ["compare", "recipe=all_methods", steps, "labels_per_class=[1]", "seeds=1", "workers=1"]
    go(*words, "words=['debug=smoke']", f"runs={tmp_path}")
    folder = tmp_path / "compare-digits"
    rows = list(csv.DictReader((folder / "comparison.csv").open()))
    assert list(rows[0]) == ["approach", "figure", "seed", "value"]
    found = {(row["approach"], row["figure"]): float(row["value"]) for row in rows}
    assert len(found) == 3 * 5
    simclr, fixmatch = (read(folder / "runs" / name / "summary.json") for name in ("simclrv2-0", "fixmatch-1-0"))
    for approach, row in (("simclrv2", "pretrained"), ("pixels", "pixels")):
        assert found[approach, "knn_top1"] == pytest.approx(simclr[row]["knn_top1"], abs=1e-6)
        assert np.isnan(found[approach, "classifier_top1"])
    assert found["simclrv2", "seconds"] == pytest.approx(simclr["train_seconds"], abs=1e-6)
    assert np.isnan(found["pixels", "seconds"])
    teacher = fixmatch["classifiers"]["teacher"]["top1"]
    assert found["fixmatch", "classifier_top1"] == pytest.approx(teacher, abs=1e-6)
    assert "Methods on digits" in (folder / "comparison.html").read_text()
    assert len(comparison.read(folder / "comparison.csv")) == 15


def test_every_method_of_the_table_has_its_presets() -> None:
    recipe = OmegaConf.load(catalogue.file("recipe", "all_methods"))
    assert set(recipe.approaches) == set(recipe.steps)
    for name, step in recipe.steps.items():
        words = dict(word.split("=") for word in step.get("words", ()))
        assert step.job == "linear" or words["presets"] == f"digits/{words['method']}", name
        assert step.job == "linear" or catalogue.files("presets", words["presets"]), name


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes with eight images each, two to test, and a folder without labels that holds one of those."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    places = [f"train/{c}/{c}_{i}.png" for c in ("cat", "dog") for i in range(8)]
    places += [f"test/{c}/t{i}.png" for c in ("cat", "dog") for i in range(2)] + [f"more/{i}.png" for i in range(8)]
    for place in places:
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(root / place), rng.integers(0, 255, (24, 24, 3), dtype=np.uint8))
    (root / "more" / "0.png").write_bytes((root / "test" / "cat" / "t0.png").read_bytes())
    return root


def folder_words(photos: Path) -> list[str]:
    return ["dataset=folder", f"dataset.root={photos}/train", f"dataset.test={photos}/test", "dataset.image_size=16"]


SCRATCH = ["finetune", *SMOKE, "backbone=resnet_digits"]


def test_lists_of_names_in_both_published_formats(photos: Path, tmp_path: Path) -> None:
    """One name a line, with the class folder in front (as in train/cat/cat_0.png) or without."""
    names = ["cat_0.png", "cat_3.png", "dog_1.png", "dog_5.png"]
    kept = []
    for kind, lines in (("names", names), ("paths", [f"{name[:3]}/{name}" for name in names])):
        (tmp_path / f"{kind}.txt").write_text("\n".join(lines) + "\n")
        words = [f"labels.list={tmp_path}/{kind}.txt", f"runs={tmp_path}", f"name={kind}"]
        go(*SCRATCH, *folder_words(photos), *words)
        kept.append(read(tmp_path / kind / "labels.json")["indices"])
    assert kept == [[0, 3, 9, 13]] * 2


def test_sparks_recipe_on_the_data_and_network_of_a_run(photos: Path, tmp_path: Path) -> None:
    """What the recipe says of both stands on top of what the run had."""
    where = [f"runs={tmp_path}"]
    go("pretrain", *SMOKE, *folder_words(photos), *where, "name=source")
    words = ["recipe=imagenet/spark_finetune", f"run={tmp_path}/source", *SMOKE, "dataset.eval_resize=18"]
    go("finetune", *words, *where, "name=tuned")
    cfg = RunFolder(tmp_path / "tuned").config()
    assert (cfg.dataset.root, cfg.dataset.eval_resize) == (f"{photos}/train", 18)
    assert (cfg.backbone.name, cfg.backbone.drop_path) == ("resnet10_slim", 0.05)
    assert cfg.method.erasing == 0.25
    assert read(tmp_path / "tuned" / "classification.json")["classifiers"].keys() == {"student", "teacher"}


def test_maes_recipe_pools_patches_with_a_norm_of_its_own(photos: Path, tmp_path: Path) -> None:
    """The pretrained norm, which comes before a token is taken, is left behind; the positions learn now."""
    tiny = ["backbone=vit_digits", "+backbone.drop_path=0.0", "method.decoder_dim=8", "method.decoder_depth=1"]
    where = [f"runs={tmp_path}", *SMOKE]
    go("pretrain", "method=mae", *tiny, "method.decoder_heads=2", *folder_words(photos), *where, "name=mae")
    words = ["recipe=imagenet/mae_finetune", f"run={tmp_path}/mae", *where, "optimizer.lr=1"]
    go("finetune", *words, "name=tuned")
    before, after = (load_file(tmp_path / name / "backbone.safetensors") for name in ("mae", "tuned"))
    assert {name.replace("norm.", "fc_norm.") if name.startswith("norm.") else name for name in before} == set(after)
    assert not torch.equal(before["pos_embed"], after["pos_embed"])
    assert 0 < (after["fc_norm.weight"] - 1).abs().max() < 0.5, "began at 1"
    tuned = selfsight.load(tmp_path / "tuned").eval()
    assert tuned.blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(tuned(x), tuned.fc_norm(tuned.forward_features(x)[:, 1:].mean(1)))
    go("finetune", *words, "+method.ema=0.9", "backbone.pool=token", "name=token")
    assert set(load_file(tmp_path / "token" / "backbone.safetensors")) == set(before)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["backbone=resnet18"], "leave out backbone="),
        (["+dataset.eval_resiz=20"], "takes no such value"),
        (["+dataset.eval_resize=20"], "'digits', which takes no such value"),
        (["+backbone.drop_pat=0.1"], "with these arguments .*drop_pat"),
    ],
)
def test_values_that_the_run_cannot_take(runs: Path, words: list[str], expected: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=expected):
        go("finetune", *SMOKE, f"run={runs}/simclr", "labels.per_class=1", *words, f"runs={tmp_path}/new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("lines", "words", "expected"),
    [
        (["cat_0.png", "dog_0.png", "dog_99.png"], [], "1 of 3 names .* are not in the data set: 'dog_99.png'"),
        (["cat_0.png", "dog_0.png", "cat_0.png"], [], "1 images stand in .* twice"),
        (["cat_0.png", "cat_1.png"], [], "class 'dog' would be left without any label"),
        (["cat_0.png", "dog_0.png"], ["labels.sha256=imagenet_1percent"], "it is another list"),
        (None, ["labels.per_class=9"], "18 labels are asked for .* and 16 exist"),
        (None, [], "give one of labels.per_class, labels.total and labels.fraction"),
        (None, ["labels.per_class=1", "layer=1"], "layer 1 of the projection head was asked for"),
    ],
)
def test_wrong_labels(photos: Path, tmp_path: Path, lines: list[str] | None, words: list[str], expected: str) -> None:
    if lines is not None:
        (tmp_path / "list.txt").write_text("\n".join(lines))
        words = [*words, f"labels.list={tmp_path}/list.txt"]
    with pytest.raises(UserError, match=expected):
        go(*SCRATCH, *folder_words(photos), *words, f"runs={tmp_path}/runs")
    assert not (tmp_path / "runs").exists()


def test_labels_of_minus_one_are_none(photos: Path, tmp_path: Path) -> None:
    """Of the images of a CSV some have no label: they are not drawn, and they are still learned from."""
    from selfsight.datamodules import ArrayImages, hide_labels, select_labels
    from selfsight.datamodules.datasets.dataset import ImageData

    labels = torch.tensor([-1, 0, 1, -1, 0, 1])
    images = ArrayImages(torch.zeros(6, 3, 4, 4, dtype=torch.uint8), labels)
    data = ImageData("six", images, None, ("a", "b"), 4, (0.5,) * 3, (0.5,) * 3)
    split = select_labels(images, rule="all")
    assert split.indices == (1, 2, 4, 5)
    hidden = hide_labels(data, split)
    assert hidden.unlabelled is not None
    assert len(hidden.unlabelled) == 2
    with pytest.raises(UserError, match=r"6 labels are asked for .* and 4 exist"):
        select_labels(images, per_class=3)


def test_test_images_among_the_unlabelled(photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    words = [f"dataset.unlabelled={photos}/more", "labels.per_class=2", "mu=2", "batch_size=4", f"runs={tmp_path}"]
    go("pretrain", *SMOKE, "method=fixmatch", *folder_words(photos), *words)
    assert "1 of the 8 unlabelled images of 'folder' are test images too" in caplog.text


def test_a_teacher_of_other_classes(runs: Path, photos: Path, tmp_path: Path) -> None:
    words = ["labels.per_class=1", f"runs={tmp_path}/runs"]
    with pytest.raises(UserError, match=r"answers with 10 classes and the data set has 2: class 0 is '0' .* 'cat'"):
        go("distill", *SMOKE, f"teacher={runs}/tuned", *folder_words(photos), *words)


FIXMATCH = ["recipe=digits/few_labels", "approaches=fixmatch"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["finetune", "labels.per_class=1"], "give a run to fine-tune"),
        (["compare"], "recipe=digits/few_labels"),
        (["pretrain", "recipe=digits/few_labels"], "one for `selfsight compare`"),
        (["compare", "recipe=digits/few_labels", "approaches=[fixmach]"], "Did you mean 'fixmatch'?"),
        (["compare", "recipe=digits/few_labels", "steps.linear_swav.after=swaf"], "Did you mean 'swav'?"),
        (["compare", "recipe=digits/few_labels", "steps.linear_swav.after=null"], "name it with `after`"),
        (["compare", "recipe=digits/few_labels", "approaches=[]"], "approaches=[simclrv2,finetune,"),
        (
            ["compare", "recipe=digits/few_labels", *FIXMATCH, "words=['trainer.max_epoch=3']"],
            "Did you mean 'trainer.max_epochs'?",
        ),
        (["compare", *FIXMATCH, "words=['trainer.max_epochs=0']"], "trainer.max_epochs is 0"),
        (["compare", *FIXMATCH, "labels_per_class=[1,143]"], "142 images and 143 labels"),
        (["distill"], "teacher has to be given"),
        (
            ["compare", *FIXMATCH, "words=['trainer.max_epochs=0']"],
            "Words for every step stand in words='[\"key=value\"]', for this one in steps.simclrv2.words.",
        ),
    ],
)
def test_wrong_commands(words: list[str], expected: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        go(*words, f"runs={tmp_path}/runs")
    assert expected in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_a_batch_that_the_images_do_not_fill_is_refused_before_the_first_step(tmp_path: Path) -> None:
    for name in range(24):
        (tmp_path / "photos" / "ab"[name % 2]).mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(tmp_path / "photos" / "ab"[name % 2] / f"{name}.png"), np.full((8, 8, 3), 9 * name, np.uint8))
    words = ["compare", "recipe=digits/few_labels", "dataset=folder", f"dataset.root={tmp_path}/photos"]
    with pytest.raises(UserError) as caught:
        go(*words, "approaches=[supervised,linear_simclrv2]", "labels_per_class=[1]", f"runs={tmp_path}/runs")
    assert re.match(
        "the step 'simclrv2' is refused: batch_size is 256 .* choose batch_size=8. Words", str(caught.value)
    )
    assert not (tmp_path / "runs").exists()


def test_a_comparison_refused_in_its_first_step_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: Any) -> float:
        raise UserError("not this one")

    monkeypatch.setattr(compare, "accuracy", refused)
    words = ["compare", *FIXMATCH, "labels_per_class=1", "workers=1", "seeds=1"]
    with pytest.raises(UserError, match="not this one"):
        go(*words, f"runs={tmp_path}")
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(UserError, match="exists already and is no comparison"):
        go(*words, f"runs={tmp_path}", "name=mine")
    assert (tmp_path / "mine" / "notes.txt").is_file()


def test_distill_from_a_run_that_classifies_nothing(runs: Path) -> None:
    with pytest.raises(UserError, match="holds no finished fine-tuning"):
        go("distill", *SMOKE, f"teacher={runs}/simclr", f"runs={runs}")


def test_a_layer_the_head_has_not(runs: Path) -> None:
    with pytest.raises(UserError, match=r"layer 7 .* head has 2 layers"):
        go("finetune", *SMOKE, f"run={runs}/simclr", "layer=7", "labels.per_class=1", f"runs={runs}")


@pytest.mark.slow
def test_comparison_survives_being_killed(tmp_path: Path) -> None:
    """SIGKILL with two workers at it: they go, too, and the same command ends with the rows of one that ran through."""
    words = [
        "compare",
        "recipe=digits/few_labels",
        "approaches=[finetune,linear_simclrv2]",
        "labels_per_class=[1,2]",
        "seeds=1",
    ]
    words += ["words=['debug=smoke','trainer.max_epochs=2']", "workers=2"]
    command = [sys.executable, "-m", "selfsight.cli", *words, f"runs={tmp_path / 'killed'}"]
    table = tmp_path / "killed" / "compare-digits" / "comparison.csv"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not table.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert table.exists()
    before = comparison.read(table)
    time.sleep(1.5)  # for the workers to notice
    subprocess.run(command, check=True, capture_output=True)
    go(*words[:-1], "workers=1", f"runs={tmp_path / 'whole'}")
    killed, whole = comparison.read(table), comparison.read(tmp_path / "whole" / "compare-digits" / "comparison.csv")
    assert killed[: len(before)] == before
    assert sorted(killed) == sorted(whole)
    assert len(whole) == 4
