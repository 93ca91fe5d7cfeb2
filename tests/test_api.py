"""selfsight in Python: the lines that a person writes, and what each of them gives."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from omegaconf import DictConfig
from PIL import Image
from torch import nn

import selfsight as ss
import selfsight.methods
from selfsight import cli
from selfsight.composition.keywords import word_of, words_of
from selfsight.errors import UserError
from selfsight.evaluation import KNN, Features
from selfsight.methods.base import Method

from .every_method import every_method

SMOKE: dict[str, Any] = {"debug": "smoke", "report": False}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of 24 pictures, told apart by their colour."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(48):
        where = root / ("blue", "red")[i % 2]
        where.mkdir(exist_ok=True)
        pixels = rng.integers(0, 90, (20, 20, 3), dtype=np.uint8)
        pixels[..., 0 if i % 2 else 2] += 150
        Image.fromarray(pixels).save(where / f"{i:02}.png")
    return root


@pytest.fixture(scope="module")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> ss.Run:
    return ss.pretrain(
        method="swav", dataset="folder", root=photos, image_size=16, backbone="resnet_digits", epochs=1,
        runs=tmp_path_factory.mktemp("runs"), name="colours", **SMOKE,
        **{"dataset.test_fraction": 0.25, "dataset.split": "draw"},
    )  # fmt: skip


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_settings_are_those_of_the_command_line(run: ss.Run, photos: Path) -> None:
    cfg = run.config
    assert isinstance(cfg, DictConfig)
    assert cfg.dataset.root == str(photos)
    assert cfg.dataset.test_fraction == 0.25
    assert cfg.trainer.max_epochs == 1
    assert cfg.choices.method == "swav"
    assert cfg.choices.backbone == "resnet_digits"
    assert cfg.debug == "smoke"
    assert cfg.report is False


def test_a_run_knows_what_it_holds(run: ss.Run) -> None:
    assert run.path.name == "colours"
    assert run.summary["pretrained"]["knn_top1"] == run.headline["knn_top1"]
    assert repr(run).startswith(f"Run('{run.path}', knn_top1 ")

    metrics = run.metrics
    assert isinstance(metrics, pandas.DataFrame)
    assert metrics["epoch"].tolist() == [1]
    assert metrics["loss"].dtype == float
    assert metrics["loss"].iloc[0] > 0

    assert type(run.method).__name__ == "SwAV"
    assert not run.backbone.training
    trained = run.method.backbone.state_dict()
    assert all(torch.equal(trained[key], value.cpu()) for key, value in run.backbone.state_dict().items())


def test_features_come_with_their_names_and_labels(run: ss.Run, photos: Path) -> None:
    train, test = run.embed("train"), run.embed("test")
    assert (len(train), len(test)) == (36, 12)
    assert train.x.shape == (36, run.backbone.num_features)
    assert len(set(train.names) | set(test.names)) == 48
    assert train.labels is not None
    for name, label in zip(train.names, train.labels.tolist(), strict=True):
        assert (photos / name).is_file()
        assert name.startswith(("blue", "red")[label])
    assert run.embed("train", stage="layer2").x.shape[1] < train.x.shape[1]
    kept = list((run.path / "features").iterdir())
    assert torch.equal(run.embed("train").x, train.x)
    assert list((run.path / "features").iterdir()) == kept, "made once, kept for the next time"


def test_probes_are_those_of_the_command_line(run: ss.Run) -> None:
    assert run.knn() == KNN()(run.embed("train"), run.embed("test"))
    assert run.knn(k=[1]).keys() == {"knn_k1_top1", "knn_top1"}
    assert run.linear()["linear_top1"] == pytest.approx(run.summary["pretrained"]["linear_top1"])
    assert run.linear(stage="layer3")["linear_top1"] == 1, "colour is what the layers below tell best"


def test_neighbours_of_a_file_an_array_and_a_number_are_the_same(run: ss.Run, photos: Path) -> None:
    test = run.embed("test")
    file = photos / test.names[3]
    by_file = run.neighbours(file, k=5)
    by_array = run.neighbours(np.asarray(Image.open(file)), k=5)
    by_number = run.neighbours(int(test.indices[3]), k=5)
    assert len(by_file) == 5
    assert by_file == by_array
    assert [one.name for one in by_file] == [one.name for one in by_number]
    similarities = [one.similarity for one in by_file]
    assert similarities == sorted(similarities, reverse=True)
    assert similarities == pytest.approx([one.similarity for one in by_number], abs=1e-5)
    train = run.embed("train")
    assert [train.names[one.position] for one in by_file] == [one.name for one in by_file]
    (first, *_) = run.neighbours(photos / train.names[0])
    assert run.neighbours(train.names[0])[0] == first  # as it calls its images itself
    assert first.name == train.names[0]
    assert first.similarity == pytest.approx(1, abs=1e-5)


def test_a_map_and_a_report(run: ss.Run) -> None:
    figure = run.map(projection="pca")
    assert sum(len(trace.x) for trace in figure.data if trace.visible) == 12
    assert sum(len(trace.x) for trace in run.map("train", projection="pca").data if trace.visible) == 36
    assert run.report(projection="pca") == run.path / "report.html"
    assert "Prototypes" in (run.path / "report.html").read_text()


def test_fine_tuning_a_run(run: ss.Run, tmp_path: Path) -> None:
    tuned = ss.finetune(run, labels_per_class=4, runs=tmp_path, **SMOKE)
    assert tuned.config.run == str(run.path)
    assert tuned.summary["labels"] == 8
    assert tuned.headline["student_top1"] == tuned.summary["classifiers"]["student"]["top1"]
    assert tuned.knn().keys() == run.knn().keys()
    assert tuned.config.labels.per_class == 4


def test_the_last_run(elsewhere: Path) -> None:
    with pytest.raises(UserError, match="no run in 'runs/' yet"):
        ss.Run()
    made = ss.pretrain(**SMOKE, seed=1)
    assert made.path.resolve().parent == elsewhere / "runs"
    assert ss.Run("last").path.samefile(made.path)
    assert ss.Run("last").config.seed == 1


def test_loading_by_path_and_by_run(run: ss.Run) -> None:
    x = torch.rand(2, 3, 16, 16)
    assert torch.equal(ss.load(run)(x), ss.load(str(run.path))(x))
    assert torch.equal(ss.load(run)(x), run.backbone.cpu()(x))


def test_features_of_any_folder_by_any_network(run: ss.Run, photos: Path) -> None:
    found = ss.embed(run, photos)
    assert len(found) == 48
    by_name = dict(zip(found.names, found.x, strict=True))
    train = run.embed("train")
    for name, x in zip(train.names, train.x, strict=True):
        torch.testing.assert_close(by_name[name], x)
    assert found.labels is not None
    assert torch.equal(ss.embed(run.backbone, photos).x, found.x)
    assert torch.equal(ss.embed(run.path, photos, stage="layer2").x, ss.embed(run, photos, stage="layer2").x)
    assert ss.embed(ss.backbone("resnet18"), photos, image_size=32).x.shape == (48, 512), "a network of timm's"


def test_test_folders_are_images_too(run: ss.Run, photos: Path, tmp_path: Path) -> None:
    for part in ("train", "test"):
        shutil.copytree(photos, tmp_path / part)
    assert len(ss.embed(run, tmp_path)) == 96


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"method": "swaw"}, "there is no method 'swaw'; choose from .* Did you mean 'swav'?"),
        ({"epoch": 3}, "Did you mean"),
        ({"epochs": 0}, "trainer.max_epochs is 0"),
        ({"optimizer.lr": "fast"}, "optimizer.lr"),
        ({"backbone": nn.Identity()}, "backbone was given a Identity; text, numbers, lists"),
        ({"dataset": "folder", "root": "nowhere"}, "nowhere"),
    ],
)
def test_a_mistake_is_the_sentence_of_the_command_line(elsewhere: Path, settings: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told) as caught:
        ss.pretrain(**SMOKE, **settings)
    assert "\n" not in str(caught.value)
    assert caught.value.__suppress_context__
    assert caught.value._render_traceback_() == [f"UserError: {caught.value}"]
    assert not (elsewhere / "runs").exists()


def test_mistakes_on_a_run(run: ss.Run, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    mistakes = {
        "no unlabelled images; there are train, test": lambda: run.embed("unlabelled"),
        "Did you mean 'layer3'": lambda: run.linear(stage="layer33"),
        "KNN takes no temprature; .* Did you mean 'temperature'": lambda: run.knn(temprature=1),
        "no test image 99; give a position from 0 to 11": lambda: run.neighbours(99),
        "cannot be read as an image": lambda: run.neighbours(tmp_path / "text.png"),
        r"\[H, W, 3\] uint8 was expected": lambda: run.neighbours(np.zeros((3, 8, 8))),
        "projection is 'tsn'": lambda: run.map(projection="tsn"),
        "is no run folder": lambda: ss.Run(photos),
        "does not say its image_size": lambda: ss.embed(nn.Linear(3, 3), photos),
        "nowhere": lambda: ss.embed(run, "nowhere"),
    }
    for told, mistake in mistakes.items():
        with pytest.raises(UserError, match=told):
            mistake()


def test_images_without_labels(tmp_path: Path, photos: Path) -> None:
    run = ss.pretrain(
        dataset="folder", root=photos / "red", image_size=16, backbone="resnet_digits", runs=tmp_path, **SMOKE,
        **{"dataset.test_fraction": 0},
    )  # fmt: skip
    assert run.embed().labels is None
    assert sum(len(trace.x) for trace in run.map(projection="pca").data if trace.visible) == 24
    assert len(run.neighbours(0, k=3)) == 3
    with pytest.raises(UserError, match="KNN compares with the labels of test images"):
        run.knn()


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        ("method", "swav", "method=swav"),
        ("lr", 0.3, "optimizer.lr=0.3"),
        ("report", False, "report=false"),
        ("name", None, "name=null"),
        ("root", Path("my photos/a=b"), 'dataset.root="my photos/a=b"'),
        ("evaluator.k", (1, np.int64(5)), "evaluator.k=[1, 5]"),
        ("views.global.scale", np.array([0.5, 1.0]), "views.global.scale=[0.5, 1.0]"),
        ("method.betas", [{"a": torch.tensor(2)}], "method.betas=[{a: 2}]"),
        ("evaluator.final", {}, "evaluator.final={}"),
    ],
)
def test_settings_as_words(key: str, value: object, word: str) -> None:
    assert word_of(key, value) == word


def test_a_mapping_is_a_word_for_each_of_its_values() -> None:
    settings = {"trainer": {"max_epochs": 8, "precision": "32-true"}, "evaluator": {"online": {"every": 5}}, "lr": 0.3}
    words = list(words_of(settings))
    assert words == [
        "trainer.max_epochs=8", 'trainer.precision="32-true"', "evaluator.online.every=5", "optimizer.lr=0.3",
    ]  # fmt: skip
    cfg = cli.compose("pretrain", words)
    assert (cfg.trainer.max_epochs, cfg.evaluator.online.every, cfg.optimizer.lr) == (8, 5, 0.3)


def test_every_method_is_found_by_its_class() -> None:
    """In `selfsight.methods`, without any of them being imported before it is asked for."""
    kinds = {kind.__name__: kind for kind in [*every_method(), Method]}
    assert kinds.keys() <= set(selfsight.methods.__all__)
    for name in selfsight.methods.__all__:
        found = getattr(selfsight.methods, name)
        assert issubclass(found, Method)
        assert found is kinds.get(name, found)
    code = "import sys, selfsight, selfsight.methods; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- parts of one's own ----------------------------------------------------------------------------------------------


class Trunk(nn.Sequential):
    """Somebody's network: no interface, a map in the end."""

    def __init__(self, width: int = 6) -> None:
        super().__init__(nn.Conv2d(3, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, 2 * width, 3, 2, 1))


class Spread:
    """An evaluator as docs/evaluation.md has it: a callable, and nothing else."""

    def __call__(self, train: Features, test: Features) -> dict[str, float]:
        return {"spread": float(train.x.std())}


def test_a_network_and_an_evaluator_of_ones_own_go_on_with_their_run(elsewhere: Path) -> None:
    own = {"backbone._target_": f"{__name__}.Trunk", "evaluator.final.spread._target_": f"{__name__}.Spread"}
    run = ss.pretrain(**SMOKE, **own)
    assert run.summary["pretrained"]["spread"] == pytest.approx(float(run.embed("train").x.std()), rel=1e-4)
    assert isinstance(ss.load(run), Trunk)
    tuned = ss.finetune(run, labels_per_class=1, steps_per_epoch=1, **SMOKE)
    assert "student" in tuned.summary["classifiers"]
    with pytest.raises(UserError, match=rf"would build '{__name__}.*add trust=true"):
        ss.Run(run.path).knn()
    again = ss.Run(run.path, trust=True)
    assert isinstance(ss.load(again), Trunk)
    assert again.knn() == run.knn()
