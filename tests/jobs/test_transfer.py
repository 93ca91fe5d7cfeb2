"""Evaluators as a user types them: on other data than the run's, on an exported backbone, and on what cannot work."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from selfsight import cli
from selfsight.backbones.registry import create
from selfsight.checkpoints.export import export_backbone

from .test_pretrain import photographs

FOLDER = ["dataset=folder", "dataset.image_size=16", "dataset.test_fraction=0.25"]
AS_GIVEN = "test_fraction_0.25-image_size_16"  # what names of records say of these words


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("top")
    photos = photographs(top / "photos", 60, classes=3, size=20)
    words = [*FOLDER, f"dataset.root={photos}", "dataset.name=photos", "backbone.width=4"]
    cli.main(["pretrain", "debug=smoke", "report=false", *words, f"runs={top}", "name=trained"])
    return top / "trained"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def record(run: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "eval" / f"{name}.json").read_text())
    return content


def coloured(root: Path, colours: dict[str, tuple[int, int, int]], number: int = 12) -> Path:
    """Class folders of images with one colour a class and a little noise: hardly trained networks can tell."""
    rng = np.random.default_rng(0)
    for name, colour in colours.items():
        (root / name).mkdir(parents=True)
        for i in range(number):
            pixels = np.clip(np.array(colour) + rng.normal(0, 5, (20, 20, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


def test_transfer_has_results_of_its_own(run: Path, tmp_path: Path) -> None:
    cli.main(["knn", f"run={run}"])
    own = (run / "eval" / "knn.json").read_bytes()
    flowers = coloured(tmp_path / "flowers", {"rose": (200, 30, 60), "iris": (60, 30, 200)})
    cli.main(["knn", f"run={run}", *FOLDER, f"dataset.root={flowers}"])
    there = record(run, f"knn-folder-flowers-{AS_GIVEN}")
    assert there["result"]["knn_k1_top1"] == 1
    assert there["data"] == "folder (19 images, 2 classes)"
    assert there["protocol"].endswith("; on folder-flowers at 16 px, pretrained on photos")
    assert "photos" not in json.loads(own)["protocol"]

    # another folder, whose labels say nothing, has a file of its own; those before stay as they are
    noise = photographs(tmp_path / "noise", 40, classes=4, size=20)
    cli.main(["linear", f"run={run}", *FOLDER, f"dataset.root={noise}"])
    cli.main(["knn", f"run={run}", *FOLDER, f"dataset.root={noise}", "stage=layer2"])
    assert {p.stem for p in (run / "eval").iterdir()} == {
        "knn", f"knn-folder-flowers-{AS_GIVEN}", f"linear-folder-noise-{AS_GIVEN}",
        f"knn-folder-noise-{AS_GIVEN}-layer2",
    }  # fmt: skip
    assert record(run, f"linear-folder-noise-{AS_GIVEN}")["data"] == "folder (33 images, 4 classes)"
    assert record(run, f"knn-folder-flowers-{AS_GIVEN}") == there
    assert (run / "eval" / "knn.json").read_bytes() == own
    cli.main(["knn", f"run={run}"])  # the cache does not mix the two up
    assert record(run, "knn")["result"] == json.loads(own)["result"]


def test_evaluators_of_one_job_do_not_share_a_file(run: Path) -> None:
    words = ["linear", f"run={run}"]
    cli.main([*words])
    cli.main([*words, "evaluator=logistic_cv", "evaluator.folds=2", "evaluator.penalties=[1e-3,1e-2]"])
    cli.main([*words, "evaluator=linear_sgd", "evaluator.epochs=1"])
    cli.main([*words, "stage=last2"])
    few_folds = "logistic_cv-folds_2-penalties_0.001,0.01"
    assert {p.stem for p in (run / "eval").iterdir()} == {
        "linear", few_folds, "linear_sgd-epochs_1", "linear-last2"
    }  # fmt: skip
    assert "2-fold cross-validation" in record(run, few_folds)["protocol"]


def test_settings_of_one_evaluator_do_not_share_a_file(run: Path, tmp_path: Path) -> None:
    """Names say what is not as usual, and numbers the rest. The same words again find their own file."""
    words = ["knn", f"run={run}"]
    for more in ([], ["evaluator.k=[1,5]"], ["evaluator.k=5"], ["evaluator=retrieval", "evaluator.gallery=test"]):
        cli.main([*words, *more])
    cli.main([*words, "+dataset.image_size=8"])
    assert {p.stem for p in (run / "eval").iterdir()} == {
        "knn", "knn-k_1,5", "knn-k_5", "retrieval-gallery_test", "knn-photos-test_fraction_0.25-image_size_8"
    }  # fmt: skip
    for place, colour in (("here", (200, 30, 60)), ("there", (30, 200, 60))):
        root = coloured(tmp_path / place / "flowers", {"a": colour, "b": (60, 30, 200)})
        cli.main([*words, *FOLDER, f"dataset.root={root}"])
    first, second = (record(run, f"knn-folder-flowers-{AS_GIVEN}{number}") for number in ("", "-2"))
    assert [one["settings"]["dataset"]["root"] for one in (first, second)] == [
        str(tmp_path / place / "flowers") for place in ("here", "there")
    ]
    before = sorted((run / "eval").iterdir())
    cli.main([*words, *FOLDER, f"dataset.root={tmp_path / 'there' / 'flowers'}"])
    cli.main([*words, "evaluator.k=[1,5]"])
    assert sorted((run / "eval").iterdir()) == before
    with (run / "metrics.csv").open(newline="") as file:
        (last,) = csv.DictReader(file)
    assert {f"{name}/knn_top1" for name in ("knn", "knn-k_5", f"knn-folder-flowers-{AS_GIVEN}-2")} <= last.keys()


def test_class_tokens_of_a_transformer(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """DINO's linear evaluation and its kNN, as its page types them."""
    words = ["backbone=vit_tiny_dino", "backbone.patch_size=4", "+backbone.embed_dim=24", "+backbone.depth=4"]
    images = [*FOLDER, f"dataset.root={run.parent / 'photos'}"]
    small = ["method.out_dim=16", "method.hidden_dim=16", "method.bottleneck_dim=8", "views.local.size=8"]
    photographs(run.parent / "photos", 60, classes=3, size=20)
    cli.main(["pretrain", "debug=smoke", "report=false", "method=dino", *images, *words, *small, f"runs={tmp_path}",
              "name=vit"])  # fmt: skip
    vit = tmp_path / "vit"
    published = ["linear.protocol=dino", "linear.epochs=1"]
    cli.main(["linear", f"run={vit}", *published, "stage=token4"])
    assert "stage token4, the authors' token4 of ViT-S" in record(vit, "linear-dino-epochs_1-token4")["protocol"]
    assert "linear_token4_top1" in record(vit, "linear-dino-epochs_1-token4")["result"]
    cli.main(["linear", f"run={vit}", "stage=token-avg"])
    cli.main(["knn", f"run={vit}", "evaluator.k=[10,20]", "evaluator.temperature=0.07"])
    assert {"linear-token-avg", "knn-k_10,20"} < {path.stem for path in (vit / "eval").iterdir()}
    for job in (["linear", f"run={run}", *published], ["knn", f"run={run}"]):
        capsys.readouterr()
        with pytest.raises(SystemExit):
            cli.main([*job, "stage=token4"])
        assert "this ResNet has not: take final or last2" in capsys.readouterr().err


def test_a_stage_reaches_the_probes_that_look_at_images(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["evaluator.data.train=8", "evaluator.data.test=4", "evaluator.size=16"]
    for stage in ("final", "layer1"):
        cli.main(["dense", f"run={run}", "evaluator=dense_knn", *small, f"stage={stage}"])
    names = ("dense_knn-shapes-size_16-train_8-test_4", "dense_knn-shapes-size_16-train_8-test_4-layer1")
    found = [record(run, name)["result"]["dense_knn_miou"] for name in names]
    assert found[0] != found[1]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        cli.main(["invariance", f"run={run}", "stage=layer1"])
    assert "looks at the last stage alone" in capsys.readouterr().err


def test_an_exported_backbone(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Named by its folder, though `backbone` is the name of a group elsewhere; as good as in its run."""
    flowers = coloured(run.parent / "flowers", {"rose": (200, 30, 60), "iris": (60, 30, 200)})
    cli.main(["knn", f"backbone={run}", *FOLDER, f"dataset.root={flowers}"])
    told = capsys.readouterr().out
    assert told.splitlines()[0] == "folder (19 images, 2 classes), 5 test images"
    assert "1.0000" in told.splitlines()[1]
    assert "on folder-flowers at 16 px, pretrained on photos" in told
    assert not (run / "eval").exists()


def no_number(run: Path) -> list[str]:
    weights = load_file(run / "backbone.safetensors")
    weights["bn1.weight"] = torch.full_like(weights["bn1.weight"], torch.nan)
    save_file(weights, run / "backbone.safetensors")
    spec = json.loads((run / "backbone.json").read_text())
    del spec["sha256"]
    (run / "backbone.json").write_text(json.dumps(spec))
    return ["knn", f"run={run}"]


def other_network(run: Path) -> list[str]:
    spec = json.loads((run / "backbone.json").read_text())
    spec["backbone"] = {"name": "resnet18"}
    (run / "backbone.json").write_text(json.dumps(spec))
    return ["knn", f"backbone={run}", "dataset=digits"]


def one_class(run: Path) -> list[str]:
    root = coloured(run.parent / "one", {"only": (90, 90, 90)})
    return ["linear", f"run={run}", *FOLDER, f"dataset.root={root}", "dataset.labels=folders"]


def masks_of_another_size(run: Path) -> list[str]:
    root = run.parent / "masked"
    for part, shape in (("images", (20, 20, 3)), ("masks", (20, 10))):
        (root / part).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(np.zeros(shape, np.uint8)).save(root / part / f"{i}.png")
    target = "evaluator.data._target_=selfsight.evaluation.dense.segmentation.folder"
    return ["dense", f"run={run}", "evaluator.size=16", target, f"evaluator.data.root={root}"]


def small_images(run: Path) -> list[str]:
    spec = {"backbone": {"name": "alexnet_rotnet"}, "image_size": 224, "mean": None, "std": None}
    (run.parent / "alexnet").mkdir()
    export_backbone(create("alexnet_rotnet"), spec, run.parent / "alexnet")
    return ["knn", f"backbone={run.parent / 'alexnet'}", "dataset=digits", "dataset.image_size=30"]


def no_backbone(run: Path) -> list[str]:
    (run / "backbone.safetensors").unlink()
    return ["knn", f"run={run}"]


def no_checkpoint(run: Path) -> list[str]:
    (run / "checkpoints" / "last.ckpt").unlink()
    return ["knn", f"run={run}", "stage=projection"]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (no_number, "features are NaN or infinite, so the backbone has diverged"),
        (other_network, "holds another network than the 'resnet18'"),
        (one_class, "telling classes apart takes two"),
        (lambda run: ["knn", f"run={run}", "evaluator.k=[5,9000]"], "9000"),
        (masks_of_another_size, "has 10 x 20 pixels and its image 20 x 20"),
        (small_images, "was given images of 30 x 30 pixels and needs at least 63"),
        (no_backbone, "has not come to its end"),
        (no_checkpoint, "there is no checkpoint"),
    ],
)
def test_what_cannot_work_is_one_sentence(
    run: Path, capsys: pytest.CaptureFixture[str], make: Callable[[Path], list[str]], expected: str
) -> None:
    words = make(run)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    told = capsys.readouterr().err
    assert stop.value.code not in (0, None)
    assert expected in told
    assert told.count("\n") == 1
    assert not (run / "eval").exists()
