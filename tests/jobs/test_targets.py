"""Several labels, and numbers, through the command line: the right columns in every table and record."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from selfsight import cli

from .test_evaluate import refused

SMALL = ["backbone.width=4", "dataset.image_size=16", "num_workers=0", "batch_size=8"]


def painted(root: Path, cells: str) -> Path:
    """Images of grey, one of them with a bright square, and a table of ``cells``: ``labels`` or ``numbers``."""
    root.mkdir()
    rng, rows = np.random.default_rng(0), []
    for i in range(32):
        grey = 20 + 6 * i
        pixels = np.full((18, 18, 3), grey, np.uint8) + rng.integers(0, 5, (18, 18, 3), dtype=np.uint8)
        if i % 3 == 0:
            pixels[4:12, 4:12] = 255
        Image.fromarray(pixels).save(root / f"{i:02}.png")
        labels = "|".join([*(["bright"] if i > 15 else []), *(["square"] if i % 3 == 0 else [])]) or "|"
        rows.append([f"{i:02}.png", labels] if cells == "labels" else [f"{i:02}.png", grey / 10])
    with (root / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows if cells == "labels" else [["file", "grey"], *rows])
    return root


@pytest.mark.slow
@pytest.mark.parametrize(("cells", "figure"), [("labels", "map"), ("numbers", "r2")])
def test_from_pretraining_to_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cells: str, figure: str
) -> None:
    monkeypatch.chdir(tmp_path)
    painted(tmp_path / "pictures", cells)
    data = ["dataset=folder", "dataset.root=pictures", "dataset.test_fraction=0.3"]
    words = ["recipe=digits/simclrv2", *data, *SMALL, "trainer.max_epochs=1", "name=run"]
    cli.main(["pretrain", *words])
    summary = json.loads((tmp_path / "runs/run/summary.json").read_text())
    assert {f"knn_{figure}", f"linear_{figure}"} <= set(summary["pretrained"])
    assert "few_shot" in summary["protocols"]["not measured"]
    for job in ("knn", "linear"):
        cli.main([job, "run=runs/run"])
        assert f"{job}_{figure}" in json.loads((tmp_path / f"runs/run/eval/{job}.json").read_text())["result"]
    told = refused(capsys, "retrieval", "run=runs/run")
    assert "in place of one class each" in told
    tuning = ["labels.rule=all", "trainer.max_epochs=2", "steps_per_epoch=2", "num_workers=0", "batch_size=8"]
    cli.main(["finetune", "run=runs/run", *tuning, "name=tuned"])
    figures = json.loads((tmp_path / "runs/tuned/classification.json").read_text())["classifiers"]["student"]
    assert {figure, f"best_{figure}", f"median_{figure}"} <= set(figures)
    page = (tmp_path / "runs/tuned/report.html").read_text()
    assert ("mAP" if figure == "map" else "R²") in page
    assert "top-1" not in page.split("<h2>Classes</h2>")[1].split("<h2")[0]


def test_methods_of_classes_say_what_the_images_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = painted(tmp_path / "pictures", "numbers")
    words = ["method=supce", "dataset=folder", f"dataset.root={root}", *SMALL, f"runs={tmp_path}"]
    told = refused(capsys, "pretrain", *words)
    assert "SupCE learns one class an image, and the images of 'folder' have the number grey" in told
