"""Evaluation jobs on runs as they are: without test images, labels or projector, and where nothing can be kept."""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from selfsight import cli
from selfsight.checkpoints.export import export_backbone
from selfsight.engine import measure, nodes
from selfsight.engine.options import resolved
from selfsight.engine.reload import projector
from selfsight.errors import UserError
from selfsight.evaluation import KNN, Diagnostics, FewShot, LinearProbe, ViewQuality
from selfsight.evaluation.features import Features
from selfsight.reporting.tables import table
from selfsight.runs import records
from selfsight.runs.folder import RunFolder


def pictures(root: Path, number: int, classes: tuple[str, ...] = ("",)) -> Path:
    """``number`` small noisy images a class, each class of a brightness of its own."""
    rng = np.random.default_rng(0)
    for c, name in enumerate(classes):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(number):
            pixels = rng.integers(80 * c, 80 * c + 60, (18, 18, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


def finished(path: Path, *words: str) -> Path:
    """A run as `selfsight pretrain` leaves it, as far as evaluations ask, with an untrained network."""
    small = ["backbone.width=4", "batch_size=4", "dataset.image_size=16", "num_workers=0", *words]
    cfg = cli.compose("pretrain", cli.checked("pretrain", small, sweep=False))
    path.mkdir(parents=True)
    RunFolder(path).write_config(cfg)
    torch.manual_seed(0)
    about = {"backbone": resolved(cfg.backbone), "image_size": 16, "dataset": cfg.dataset.name}
    scale = {"mean": list(cfg.dataset.mean), "std": list(cfg.dataset.std)}
    export_backbone(nodes.build(cfg.backbone), {**about, **scale}, path)
    return path


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a job says that refuses, one sentence on the error stream."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main(list(words))
    told = capsys.readouterr().err
    assert stop.value.code not in (0, None)
    assert told.count("selfsight: ") == told.splitlines()[-1].count("selfsight: ") == 1, told
    return told


@pytest.fixture
def untested(tmp_path: Path) -> Path:
    """A run on labelled images none of which is held out."""
    root = pictures(tmp_path / "photos", 6, ("a", "b"))
    return finished(tmp_path / "run", "dataset=folder", f"dataset.root={root}", "dataset.test_fraction=0")


def test_a_run_without_test_images_is_measured_by_what_needs_none(
    untested: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["diagnostics", f"run={untested}"])
    cli.main(["diagnostics", f"run={untested}", "evaluator=view_quality", "evaluator.views=2"])
    cli.main(["invariance", f"run={untested}", "evaluator.operations=flip"])
    kept = records.read(RunFolder(untested))
    assert set(kept) == {"diagnostics", "view_quality-views_2", "invariance-operations_flip"}
    assert kept["diagnostics"]["result"]["rank"] > 1
    for job, *words in (("knn",), ("linear", "linear.protocol=swav"), ("cluster",), ("episodes",)):
        told = refused(capsys, job, f"run={untested}", *words)
        assert "compares with the labels of test images, and data set 'folder' has no test images" in told
    assert set(records.read(RunFolder(untested))) == set(kept)


def test_the_report_of_a_run_without_test_images_maps_those_it_learned_from(untested: Path) -> None:
    cli.main(["report", f"run={untested}", "projection=pca"])
    told = (untested / "report.html").read_text()
    assert "features of 12 training images" in told
    assert "A training image, then the others closest to it." in told
    assert "Views" in told


def test_labelled_images_to_learn_from_and_none_to_test_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = pictures(pictures(tmp_path / "photos" / "train", 5, ("a", "b")).parent / "test", 6).parent
    run = finished(tmp_path / "run", "dataset=folder", f"dataset.root={root}")
    for words in ([], ["evaluator=published", "evaluator.epochs=1"]):
        told = refused(capsys, "linear", f"run={run}", *words)
        assert "the test images of data set 'folder' have no labels" in told
    cli.main(["report", f"run={run}", "projection=pca"])
    assert "features of 6 test images" in (run / "report.html").read_text()


class Split:
    """As much of a datamodule as the table asks for."""

    def __init__(self, train: torch.Tensor | None, test: torch.Tensor | None, held_out: bool = True) -> None:
        from selfsight.datamodules import ArrayImages, ImageData

        pixels = torch.zeros(4, 3, 4, 4, dtype=torch.uint8)
        parts = [ArrayImages(pixels, train), ArrayImages(pixels, test) if held_out else None]
        self.data = ImageData("toy", parts[0], parts[1], ("a", "b"), 4, (0.5,) * 3, (0.5,) * 3)


def test_the_table_leaves_out_what_cannot_be_measured_and_says_why() -> None:
    labels, none = torch.tensor([0, 1, 0, 1]), torch.full((4,), -1)
    evaluators = {"knn": KNN(), "few_shot": FewShot(), "rank": Diagnostics(), "views": ViewQuality()}
    whole = Split(labels, labels)
    assert measure.missing_labels_reason(whole) == ""
    assert set(measure.select_evaluators(evaluators, whole)) == {"knn", "few_shot", "rank"}
    assert set(measure.protocols(evaluators, whole)) == {"knn", "few_shot", "rank"}
    for data, reason in (
        (Split(None, labels), "the training images of data set 'toy' have no labels"),
        (Split(labels, None), "the test images of data set 'toy' have no labels"),
        (Split(labels, none), "the test images of data set 'toy' have no labels"),
        (Split(labels, None, held_out=False), "data set 'toy' has no test images"),
    ):
        assert measure.missing_labels_reason(data) == reason
        told = measure.protocols(evaluators, data)
        assert set(told) == {"rank", "views", "not measured"}
        assert told["not measured"] == f"knn, few_shot, since {reason}"
    assert measure.protocols({"rank": Diagnostics()}, Split(None, None)).keys() == {"rank"}
    shown = table({"pretrained": {"rank": 3.0}, "protocols": told})
    assert "not measured: knn, few_shot, since data set &#x27;toy&#x27; has no test images" in shown
    x = Features(torch.randn(4, 3), labels, torch.arange(4))
    assert measure.run_evaluator(Diagnostics(), x, None) == Diagnostics()(x, x)
    with pytest.raises(UserError, match="LinearProbe compares with the labels of test images"):
        measure.run_evaluator(LinearProbe(), x, None)


def test_embed_writes_every_image_with_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those without a label, too."""
    root = pictures(tmp_path / "photos", 10)
    (root / "labels.csv").write_text("".join(f"{i}.png,{'ab'[i % 2]}\n" for i in range(8)))
    run = finished(
        tmp_path / "run", "dataset=folder", f"dataset.root={root}", "dataset.test_fraction=0.25", "dataset.split=draw"
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    cli.main(["embed", f"run={run}", "out=~/deep/features.npz"])
    found = np.load(tmp_path / "deep" / "features.npz")
    names = {part: found[f"{part}_names"].tolist() for part in ("train", "test", "unlabelled")}
    assert [len(names[part]) for part in ("train", "test", "unlabelled")] == [6, 2, 2]
    assert {*names["train"], *names["test"]} == {f"{i}.png" for i in range(8)}
    assert sorted(names["unlabelled"]) == ["8.png", "9.png"]
    assert "unlabelled_labels" not in found
    for part in ("train", "test"):
        assert [int(name[0]) % 2 for name in names[part]] == found[f"{part}_labels"].tolist()
    assert found["unlabelled_x"].shape == (2, found["train_x"].shape[1])


def test_embed_writes_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row for each image, what has no label without one; neighbours are rows, and never the image itself."""
    root = pictures(tmp_path / "photos", 10)
    (root / "labels.csv").write_text("".join(f"{i}.png,{'ab'[i % 2]}\n" for i in range(8)))
    run = finished(
        tmp_path / "run", "dataset=folder", f"dataset.root={root}", "dataset.test_fraction=0.25", "dataset.split=draw"
    )
    with monkeypatch.context() as without:
        found = importlib.util.find_spec
        without.setattr("importlib.util.find_spec", lambda name, *of: None if name == "pyarrow" else found(name, *of))
        assert "pip install 'selfsight[parquet]'" in refused(capsys, "embed", f"run={run}", "out=x.parquet")
    import pyarrow.parquet as parquet

    cli.main(["embed", f"run={run}", f"out={tmp_path / 'x.parquet'}"])
    table = parquet.read_table(tmp_path / "x.parquet").to_pydict()
    assert table["split"] == ["train"] * 6 + ["unlabelled"] * 2 + ["test"] * 2
    for name, path, label, kind in zip(table["name"], table["path"], table["label"], table["class"], strict=True):
        assert Path(path) == root.resolve() / name
        expected = (None, None) if name in ("8.png", "9.png") else (int(name[0]) % 2, "ab"[int(name[0]) % 2])
        assert (label, kind) == expected
    x = np.array(table["embedding"])
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    products = x @ x.T - 9 * np.eye(10)
    for row, (near, similarity) in enumerate(zip(table["neighbors"], table["similarity"], strict=True)):
        assert row not in near
        np.testing.assert_allclose(similarity, np.sort(products[row])[::-1][:9], rtol=1e-4, atol=1e-5)
    assert len(table["x"]) == len(table["y"]) == 10


def test_places_that_cannot_be_written_are_one_sentence(
    untested: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert "is a folder; name a file" in refused(capsys, "embed", f"run={untested}", f"out={tmp_path}")
    (tmp_path / "file").touch()
    told = refused(capsys, "embed", f"run={untested}", f"out={tmp_path / 'file' / 'x.npz'}")
    assert "cannot be made" in told
    for name in ("eval", "features"):
        (untested / name).touch()
    with caplog.at_level(logging.WARNING, "selfsight"):
        told = refused(capsys, "diagnostics", f"run={untested}")
    assert "features cannot be kept" in caplog.text
    assert f"the folder of '{untested / 'eval' / 'diagnostics.json'}' cannot be made" in told


def test_the_projection_of_runs_that_have_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A method without a projector, one whose projector is for maps, and an exported backbone."""
    run = finished(tmp_path / "run", "method=rotation")
    for method, head in (("Rotation", None), ("PixPro", torch.nn.Sequential(torch.nn.Conv2d(4, 4, 1)))):
        with pytest.MonkeyPatch.context() as patch:
            made = type("Made", (), {"projector": head})()
            patch.setattr("selfsight.engine.reload.trained_method", lambda *_, made=made: made)
            assert projector(RunFolder(run)) is None
            if method == "Rotation":
                for job in ("knn", "embed", "linear"):
                    told = refused(capsys, job, f"run={run}", "stage=projection")
                    assert f"Rotation, the method of '{run}', has no projector of features" in told
    told = refused(capsys, "knn", f"backbone={run}", "dataset=digits", "stage=projection")
    assert "an exported backbone has lost its projector" in told


def test_an_evaluation_says_how_many_images_it_is_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = finished(tmp_path / "try", "limit_images=64", "dataset=digits")
    cli.main(["diagnostics", f"run={run}"])
    told = capsys.readouterr().out
    assert "digits (1,437 images, 10 classes), 360 test images; the run learned from 64 of them (limit_images)" in told


def test_figures_as_a_person_reads_them(capsys: pytest.CaptureFixture[str]) -> None:
    from selfsight.reporting.tables import show_stages
    from selfsight.runs.console import make_console

    assert records.number({"mean": 0.6186, "std": 0.1012, "interval": 0.0081}) == "0.6186 ± 0.0081"
    assert records.number({"mean": 0.5, "std": 0.25}) == "0.5000 ± 0.2500"
    shot = {"few_shot": {"1": {"mean": 0.5, "std": 0.25}}, "knn_k5_top1": 0.1}
    show_stages(make_console(), {"layer1": shot, "final": shot})
    told = capsys.readouterr().out
    assert told.count("0.5000 ± 0.2500") == 2
    assert "knn_k5" not in told


def test_names_of_records(tmp_path: Path) -> None:
    """The choice of a group, what differs from its file, and a number where that is not enough."""
    from omegaconf import OmegaConf

    from selfsight.composition.defaults import differences

    def named(choice: str, **values: Any) -> list[str]:
        name, changed = differences("evaluator", choice, OmegaConf.create(values))
        return [name, *records.changed_slug(changed)]

    linear = "selfsight.evaluation.probes.linear.LinearProbe"
    assert named("linear", _target_=linear) == ["linear"]
    usual = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1]
    assert named("logistic_cv", _target_=linear, folds=5, penalties=usual) == ["logistic_cv"]
    assert named("logistic_cv", _target_=linear, folds=3, penalties=usual) == ["logistic_cv", "folds_3"]
    assert named("linear", _target_=linear, seed=7) == ["linear", "seed_7"]
    dense = {"_target_": "selfsight.evaluation.dense.probes.DenseKNN", "size": 64, "stage": "layer3"}
    data = {"_target_": "selfsight.evaluation.dense.segmentation.folder", "root": "masks", "test_share": 0.5}
    assert named("dense_knn", **dense, data=data) == ["dense_knn", "test_share_0.5"]
    assert named("knn", _target_="torch.nn.Dropout", p=0.25) == ["dropout", "p_0.25"]
    assert len(records.joined(["x" * 300])) <= records.LONGEST

    record: dict[str, Any] = {"result": {}, "protocol": "", "data": ""}
    for number, settings in enumerate(({"k": 1}, {"k": 2}, {"k": 1}, {"k": 3}, {"k": 2})):
        path = records.free_path(tmp_path, "knn", settings)
        assert path.name == ["knn.json", "knn-2.json", "knn.json", "knn-3.json", "knn-2.json"][number]
        path.write_text(json.dumps(record | {"settings": settings}))
    (tmp_path / "old.json").write_text(json.dumps(record))
    assert records.free_path(tmp_path, "old", {"k": 1}).name == "old.json", "older records do not say"
    (tmp_path / "old.json").write_text(json.dumps(record)[:-5])
    with pytest.raises(UserError, match=r"old.json' cannot be read as the record of an evaluation"):
        records.free_path(tmp_path, "old", {"k": 1})


def test_a_sweep_leaves_nothing_in_the_working_directory(
    untested: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    cli.main(["invariance", "-m", f"run={untested}", "evaluator.operations=flip,hue", "evaluator.images=4"])
    assert len(records.read(RunFolder(untested))) == 2
    assert {path.name for path in Path().iterdir()} <= {"runs"}
    assert not list(Path().rglob(".hydra"))


@pytest.mark.parametrize(
    "job", ["embed", "prune", "detect", "export", "report", "explore", "compare-runs", "knn", "dense"]
)
def test_jobs_that_can_be_swept_keep_to_themselves(job: str) -> None:
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(cli.conf_dir()), version_base="1.3"):
        settings = compose(job, return_hydra_config=True).hydra
    assert (settings.output_subdir, settings.run.dir, settings.sweep.subdir) == (None, ".", ".")
