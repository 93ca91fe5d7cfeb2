"""`selfsight pretrain` as a user types it: what a run leaves behind, stopping and going on, bad input."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import selfsight
from selfsight import cli
from selfsight.engine.monitor import Monitor

TINY = ["limit_images=64", "batch_size=16", "report=false", "trainer.accelerator=cpu"]


def pretrain(*words: str) -> None:
    cli.main(["pretrain", *words])


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        pretrain(*words)
    told = capsys.readouterr().err
    assert stop.value.code not in (0, None)
    assert told.count("\n") == 1, told
    return told


def photographs(folder: Path, n: int, *, classes: int = 0, size: int = 24) -> Path:
    rng = np.random.default_rng(0)
    for i in range(n):
        where = folder / f"class{i % classes}" if classes else folder
        where.mkdir(parents=True, exist_ok=True)
        picture = rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(picture).resize((size, size + i % 5), Image.Resampling.BICUBIC).save(where / f"{i:03}.jpg")
    return folder


def test_a_run_leaves_everything_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pretrain("debug=smoke", f"runs={tmp_path}")
    folder = tmp_path / "simclrv2-digits-1"
    made = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert made == {
        "config.yaml", "data.json", "environment.json", "metrics.csv", "summary.json", "report.html",
        "backbone.json", "backbone.safetensors", "checkpoints/last.ckpt",
    }  # fmt: skip
    summary = json.loads((folder / "summary.json").read_text())
    assert {"pixels", "untrained", "pretrained", "train_seconds"} <= set(summary)
    for row in ("pixels", "untrained", "pretrained"):
        assert 0 <= summary[row]["knn_top1"] <= 1
        assert 0 <= summary[row]["linear_top1"] <= 1
        assert summary[row]["few_shot"]["1"].keys() == {"mean", "std"}
    told = capsys.readouterr().out
    assert re.search(r"epoch 1/1 +loss [\d.]+ .*kNN [\d.]+%.*rank [\d.]+.*images/s +0:00 left", told)
    assert "report:" in told
    report = (folder / "report.html").read_text()
    assert "http://" not in re.sub(r"<script>.*?</script>", "", report, flags=re.S)

    backbone = selfsight.load(folder)
    assert not backbone.training
    assert not any(p.requires_grad for p in backbone.parameters())
    assert backbone(torch.zeros(2, 3, 16, 16)).shape == (2, backbone.num_features)


def test_an_evaluator_in_the_place_of_the_whole_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluator=few_shot", "evaluator.shots=[2]", "evaluator.draws=1"]
    pretrain("debug=smoke", "report=false", *words, f"runs={tmp_path}", "name=one")
    summary = json.loads((tmp_path / "one" / "summary.json").read_text())
    assert summary["protocols"].keys() == {"few_shot"}
    assert all(summary[row].keys() == {"few_shot"} for row in ("pixels", "untrained", "pretrained"))
    assert "rank" in rows(tmp_path / "one")[-1], "diagnostics are always on"
    assert "knn_top1" not in rows(tmp_path / "one")[-1]


def test_jobs_on_a_run(own_run: Path) -> None:
    run = own_run
    summary = json.loads((run / "summary.json").read_text())
    cli.main(["knn", f"run={run}", "evaluator.k=[1]"])
    (record,) = (run / "eval").glob("knn*.json")
    kept = json.loads(record.read_text())
    assert kept["protocol"].startswith("weighted kNN, cosine")
    assert 0 < kept["result"]["knn_k1_top1"] <= 1
    cli.main(["embed", f"run={run}"])
    with np.load(run / "features.npz") as features:
        assert features["train_x"].shape == (1437, summary["pretrained"] and 128)
        assert features["test_labels"].shape == (360,)
    cli.main(["report", f"run={run}"])
    assert (run / "report.html").is_file()


@pytest.mark.parametrize(
    "chosen",
    [
        ("method=simclrv2",),
        ("method=simclrv2", "heads=matryoshka"),
        ("method=spark",),
        ("method=byol",),
        ("method=dino",),
    ],
)
def test_going_on_equals_not_stopping(chosen: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle of an epoch, then resume=: the same weights, bit for bit, as without it, masks included."""
    words = [*TINY, *chosen, "trainer.max_epochs=3", f"runs={tmp_path}", "evaluator.online.every=2"]
    pretrain(*words, "name=whole")

    count = 0
    plain = Monitor.on_train_batch_end

    def press_ctrl_c(self: Monitor, *args: object) -> None:
        nonlocal count
        count += 1
        if count == 6:  # 4 steps an epoch: in the middle of the second
            signal.raise_signal(signal.SIGINT)
        plain(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Monitor, "on_train_batch_end", press_ctrl_c)
    with pytest.raises(SystemExit) as stop:
        pretrain(*words, "name=parts")
    assert stop.value.code == 130
    assert not (tmp_path / "parts" / "summary.json").exists()
    monkeypatch.setattr(Monitor, "on_train_batch_end", plain)
    pretrain(f"resume={tmp_path / 'parts'}")

    whole, parts = (
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True) for name in ("whole", "parts")
    )
    assert whole["global_step"] == parts["global_step"] == 12
    for key, value in whole["state_dict"].items():
        assert torch.equal(value, parts["state_dict"][key]), key
    # of the clock, or of the views of the last steps, which are fewer after a stop among them
    passing = {"seconds", "images_per_second", "data_wait_share", "alignment", "uniformity", "view_knn_top1"}
    whole_rows, parts_rows = (
        [{k: v for k, v in row.items() if k not in passing} for row in rows(tmp_path / name)]
        for name in ("whole", "parts")
    )
    assert whole_rows == parts_rows
    summaries = [json.loads((tmp_path / n / "summary.json").read_text()) for n in ("whole", "parts")]
    assert summaries[0]["pretrained"] == summaries[1]["pretrained"]
    spent = sum(float(row["seconds"]) for row in rows(tmp_path / "parts"))
    assert summaries[1]["train_seconds"] > spent > 0, "the part before the stop counts"
    pretrain(f"resume={tmp_path / 'parts'}")  # nothing is left to do, and nothing is lost
    again = json.loads((tmp_path / "parts" / "summary.json").read_text())
    assert again["train_seconds"] == pytest.approx(summaries[1]["train_seconds"], abs=0.5)


def test_ctrl_c_at_the_keyboard_says_how_to_go_on(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "selfsight.cli", "pretrain", *TINY, "trainer.max_epochs=2000", f"runs={tmp_path}"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("*/metrics.csv")) and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    told, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert f"selfsight pretrain resume={tmp_path / 'simclrv2-digits-1'}" in told
    assert (tmp_path / "simclrv2-digits-1" / "checkpoints" / "last.ckpt").is_file()


def test_every_combination(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "selfsight.cli", "pretrain", "-m", "debug=smoke", "report=false", f"runs={tmp_path}",
         "seed=0,1"],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["simclrv2-digits-1", "simclrv2-digits-2"]


def test_a_folder_without_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = photographs(tmp_path / "photos", 40)
    pretrain(
        "debug=smoke", "dataset=folder", f"dataset.root={root}", "dataset.image_size=32", f"runs={tmp_path / 'runs'}"
    )
    told = capsys.readouterr().out
    assert re.search(r"epoch 1/1 .*kNN of views [\d.]+%", told)
    assert "logistic" not in told, "a protocol of what was not measured"
    assert "no labels: the images in" in told, "why there are none"
    summary = json.loads((tmp_path / "runs" / "simclrv2-folder-1" / "summary.json").read_text())
    assert "knn_top1" not in summary["pretrained"]
    assert set(summary["protocols"]) == {"diagnostics", "view_quality", "not measured"}
    assert all(0 <= summary[row]["view_knn_top1"] <= 1 for row in ("pixels", "untrained", "pretrained"))
    cli.main(["diagnostics", f"run={tmp_path / 'runs' / 'simclrv2-folder-1'}"])  # SimCLR's views are not normalised
    assert "rank" in capsys.readouterr().out


@pytest.mark.parametrize("test", ["none", "unlabelled"])
def test_labelled_images_and_nothing_to_test_on(tmp_path: Path, capsys: pytest.CaptureFixture[str], test: str) -> None:
    """The run comes to its end, and says what could not be measured, and why."""
    root = tmp_path / "photos"
    for name in ("a", "b"):
        photographs(root / "train" / name, 20)
    if test == "unlabelled":
        photographs(root / "test", 6)
    words = ["dataset=folder", f"dataset.root={root}", "dataset.image_size=16", "dataset.test_fraction=0"]
    pretrain("debug=smoke", "backbone=resnet_digits", *words, f"runs={tmp_path / 'runs'}")
    told = " ".join(capsys.readouterr().out.split())
    reason = {"none": "has no test images", "unlabelled": "the test images of data set 'folder' have no labels"}[test]
    assert "labels from the folders in" in told
    assert re.search(f"not measured: knn, linear, few_shot, since .*{reason}", told)
    folder = tmp_path / "runs" / "simclrv2-folder-1"
    summary = json.loads((folder / "summary.json").read_text())
    assert "knn_top1" not in summary["pretrained"]
    assert summary["pretrained"]["rank"] > 1
    assert "Embedding map" in (folder / "report.html").read_text()


def test_batches_that_make_a_step_are_not_one_batch_and_the_run_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["debug=smoke", "report=false", "evaluator.final={}", "batch_size=8", "trainer.accumulate=2"]
    for method, told in (("simclrv2", True), ("rotation", False)):
        pretrain(*words, f"method={method}", f"runs={tmp_path}")
        said = " ".join(capsys.readouterr().out.split())
        assert ("2 batches of 8 make a step, not one of 16: the negatives of an image are" in said) is told


def test_not_a_number_stops_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = refused(capsys, *TINY, "optimizer.lr=1e30", "trainer.max_epochs=3", f"runs={tmp_path}")
    assert "lower optimizer.lr" in told
    assert "checkpoint" not in told, "none was written"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["method=pixpro", "backbone=resnet18"], "feature maps of 1 x 1"),
        (["trainer.devices=99"], "99 devices"),
        (["optimizer.lr=-1"], "optimizer.lr is -1"),
    ],
)
def test_refused_at_the_first_step_leaves_no_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], expected: str
) -> None:
    assert expected in refused(capsys, "debug=smoke", *words, f"runs={tmp_path}")
    assert not list(tmp_path.iterdir())


def test_bad_files_among_good_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = photographs(tmp_path / "photos", 12)
    whole = (root / "000.jpg").read_bytes()
    (root / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "text.jpg").write_text("this is no picture")
    words = ["debug=smoke", "report=false", "dataset=folder", f"dataset.root={root}", "dataset.image_size=32"]
    words += ["backbone=resnet_digits", f"runs={tmp_path / 'runs'}"]
    assert "2 of 14 files cannot be read" in refused(capsys, *words)
    assert not (tmp_path / "runs").exists()
    pretrain(*words, "dataset.max_unreadable=0.2")
    named = (tmp_path / "runs" / "simclrv2-folder-1" / "unreadable.txt").read_text()
    assert [line.split("\t")[0] for line in named.splitlines()] == ["cut.jpg", "text.jpg"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["batch_size=5000"], "batch"),
        (["trainer.accelerator=gpu"], "trainer.accelerator=cpu"),
        (["backbone=convnext_tiny", "backbone.stem=cifar"], "stem=cifar is for ResNets"),
        (["views.global.count=3"], "learns from 2 views"),
        (["trainer.accelerator=tpu"], "auto, cpu, gpu or cuda"),
        (["trainer.max_epochs=0"], "trainer.max_epochs is 0"),
        (["name=../outside"], "without '/'"),
        (["method=fixmatch", "labels.fraction=0.001"], "left without any label"),
    ],
)
def test_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], expected: str
) -> None:
    if "trainer.accelerator=gpu" in words and torch.cuda.is_available():
        words = ["trainer.devices=4096"]
        expected = "devices"
    told = refused(capsys, *words, f"runs={tmp_path / 'runs'}")
    assert expected in told
    assert not (tmp_path / "runs").exists()


def test_bad_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def told(root: Path) -> str:
        return refused(capsys, "debug=smoke", "dataset=folder", f"dataset.root={root}", f"runs={tmp_path / 'runs'}")

    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds no image" in told(empty).lower()
    assert "nowhere" in told(tmp_path / "nowhere")
    text = tmp_path / "text"
    text.mkdir()
    for i in range(30):
        (text / f"{i}.jpg").write_text("this is no picture")
    assert "cannot be read" in told(text)
    assert not (tmp_path / "runs").exists()


def test_a_run_folder_nobody_may_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    assert "runs=DIR" in refused(capsys, "debug=smoke", f"runs={tmp_path / 'file'}")


def test_loggers_need_no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    pretrain("debug=smoke", "report=false", "logger=[tensorboard,wandb]", f"runs={tmp_path}", "name=told")
    board = tmp_path / "told" / "tensorboard"
    events = EventAccumulator(str(board)).Reload()
    assert {"loss", "data_wait_share", "final/knn_top1"} <= set(events.Tags()["scalars"])
    assert "views/0" in events.Tags()["images"]
    found = re.search(r'tensor_name: "test:(\d+)"', (board / "projector_config.pbtxt").read_text())
    assert found is not None
    of_images = board / f"{int(found[1]):05}" / "test"
    rows = (of_images / "metadata.tsv").read_text().splitlines()
    assert rows[0] == "class\tname"
    assert len(rows) == 1 + len((of_images / "tensors.tsv").read_text().splitlines())
    assert {row.split("\t")[0] for row in rows[1:]} <= set("0123456789")
    side = math.ceil(math.sqrt(len(rows) - 1))
    assert Image.open(of_images / "sprite.png").size == (32 * side, 32 * side)

    pretrain(f"resume={tmp_path / 'told'}", "extend=1")
    folders = list((tmp_path / "told" / "wandb").glob("offline-run-*"))
    ids = {folder.name.rpartition("-")[2] for folder in folders}
    assert ids == {(tmp_path / "told" / "tracker_id.txt").read_text().strip()}, "one run there, too"
    for folder in folders:
        assert list((folder / "files" / "media" / "images").glob("views_*.png"))
        until = time.monotonic() + 60  # wandb's own process writes the last records of its file after we are told
        while not (sent := [one.artifact for one in tracked(folder) if one.HasField("artifact")]):
            assert time.monotonic() < until
            time.sleep(0.2)
        (artifact,) = sent
        assert (artifact.type, artifact.name) == ("model", "told-backbone")
        kept = {entry.path: entry.local_path for entry in artifact.manifest.contents}
        assert kept == {name: str(tmp_path / "told" / name) for name in ("backbone.safetensors", "backbone.json")}


def test_mlflow_has_one_run_with_its_epochs_keys_and_backbone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without an address in a file of the run folder, under the id that the folder keeps."""
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    pretrain("debug=smoke", "report=false", "logger=mlflow", f"runs={tmp_path}", "name=told")
    folder = tmp_path / "told"
    pretrain(f"resume={folder}", "extend=1")
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    (run,) = client.search_runs([one.experiment_id for one in client.search_experiments()])
    assert (run.info.run_id, run.info.run_name) == ((folder / "mlflow_run.txt").read_text().strip(), "told")
    assert run.info.status == "FINISHED"
    assert run.data.params["choices.method"] == "simclrv2"
    assert run.data.params["optimizer.lr"] == "0.002"
    assert [point.step for point in client.get_metric_history(run.info.run_id, "loss")] == [2, 4]
    assert {"data_wait_share", "final/knn_top1"} <= set(run.data.metrics)
    kept = {Path(file.path).name for file in client.list_artifacts(run.info.run_id, "backbone")}
    assert kept == {"backbone.safetensors", "backbone.json"}
    assert client.list_artifacts(run.info.run_id, "views")

    capsys.readouterr()
    words = ("debug=smoke", "logger=mlflow", "logger.mlflow.tracking_uri=nowhere://x", f"runs={tmp_path}", "name=no")
    assert "logger=mlflow cannot use 'nowhere://x'" in refused(capsys, *words)
    assert not (tmp_path / "no").exists()


def tracked(folder: Path) -> Iterator[Any]:
    """The records that wandb has kept in the folder of an offline run, to be sent later.

    Its file has LevelDB's log format: blocks of 32 KiB, in them pieces with checksum, length and kind (1: a whole
    record, 4: the last piece of one).
    """
    from wandb.proto.wandb_internal_pb2 import Record

    content = next(folder.glob("*.wandb")).read_bytes()
    place, record = 7, b""  # after the file's own header
    while place + 7 <= len(content):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)
        if place + 7 + length > len(content):  # not written to its end yet
            return
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield Record.FromString(record)
            record = b""
