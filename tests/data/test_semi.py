"""Labelled and unlabelled batches: their sizes, what they may know, and a stop in between."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from selfsight.contracts import SemiBatch
from selfsight.datamodules import (
    ArrayImages,
    DistillationDataModule,
    ImageData,
    LabelledDataModule,
    SemiDataModule,
    select_labels,
)
from selfsight.datamodules.views.view import View
from selfsight.errors import UserError

from .test_module import LOOK, in_memory, same

VIEWS = {
    "labelled": View(8, crop="padded", padding=1, hflip=0.5, **LOOK),
    "weak": View(8, crop="padded", padding=1, hflip=0.5, **LOOK),
    "strong": View(10, count=2, crop="resized", jitter=(0.4, 0.4, 0.4, 0.1), **LOOK),
}


def module(data: ImageData | None = None, views: dict[str, View] = VIEWS, **changes: Any) -> SemiDataModule:
    options: dict[str, Any] = {
        "labels": {"per_class": 2}, "mu": 3, "batch_size": 4, "steps_per_epoch": 5, "include_labelled": True,
        "replacement": False, "num_workers": 0, "engine": "cpu", "seed": 0,
    }  # fmt: skip
    return SemiDataModule(data or in_memory(30), views, **{**options, **changes})


@pytest.mark.parametrize("engine", ["cpu", "device"])
def test_form_of_the_batches(engine: str) -> None:
    data = in_memory(30)
    made = module(data, engine=engine)
    kept = made.split.tensor()
    batches = list(made.train_dataloader())
    assert len(batches) == made.steps_per_epoch == 5
    assert made.examples == 20
    for batch in batches:
        assert (len(batch.labelled), len(batch.unlabelled)) == (4, 12)
        assert [tuple(v.shape) for v in batch.labelled.views] == [(4, 3, 8, 8)]
        assert [tuple(v.shape) for v in batch.unlabelled.views] == [(12, 3, 8, 8), (12, 3, 10, 10), (12, 3, 10, 10)]
        assert torch.equal(batch.unlabelled.labels, data.train.labels[batch.unlabelled.indices])
        assert torch.equal(batch.labelled.labels, data.train.labels[kept[batch.labelled.indices]])
    assert made.labelled_count == 6
    assert {i for b in batches for i in b.labelled.indices.tolist()} == set(range(6))
    drawn = torch.cat([b.unlabelled.indices for b in batches])
    assert drawn.bincount(minlength=30).tolist() == [2] * 30


def test_labelled_images_may_be_left_out_of_the_unlabelled() -> None:
    data = in_memory(30)
    made = module(data, include_labelled=False, steps_per_epoch=None)
    assert made.steps_per_epoch == 24 // 12
    assert len(made.unlabelled.images) == 24
    chosen = {data.train.pixels[i].numpy().tobytes() for i in made.split.indices}
    assert not any(made.unlabelled.images.pixels[i].numpy().tobytes() in chosen for i in range(24))
    assert made.unlabelled.images.labels.bincount().tolist() == [8, 8, 8]


def test_the_two_streams_are_cut_differently() -> None:
    one_class = {**VIEWS, "weak": VIEWS["labelled"]}
    made = module(views=one_class, labels={"fraction": 1.0}, mu=1)
    for batch in made.train_dataloader():
        assert not torch.equal(batch.labelled.indices, batch.unlabelled.indices)
        assert not torch.equal(batch.labelled.boxes[0], batch.unlabelled.boxes[0])


def test_evaluation_knows_the_labelled_images_only() -> None:
    made = module()
    train = torch.cat([b.labels for b in made.eval_dataloader("train")])
    assert train.bincount().tolist() == [2, 2, 2]
    assert sum(len(b) for b in made.eval_dataloader("test")) == 7


def test_stop_and_go_on() -> None:
    whole = [b for loader in [module().train_dataloader()] for _ in range(2) for b in loader]
    stopped = module().train_dataloader()
    start = iter(stopped)
    got = [next(start) for _ in range(3)]
    resumed = module().train_dataloader()
    resumed.load_state_dict(stopped.state_dict())
    got += [b for _ in range(2) for b in resumed]

    def equal(first: SemiBatch, second: SemiBatch) -> bool:
        return same(first.labelled, second.labelled) and same(first.unlabelled, second.unlabelled)

    assert len(got) == len(whole) == 10
    assert all(equal(a, b) for a, b in zip(got, whole, strict=True))


class Student(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[tuple[float, float]] = []

    def training_step(self, batch: SemiBatch, batch_idx: int) -> torch.Tensor:
        self.seen.append(tuple(float(part.views[-1].double().sum()) for part in (batch.labelled, batch.unlabelled)))
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_trainer_resumes_both_streams(tmp_path: Path) -> None:
    whole, second = Student(), Student()
    for student, resume in ((whole, None), (second, tmp_path / "step=7.ckpt")):
        keep = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=7, save_top_k=-1)
        trainer = Trainer(
            accelerator="cpu", max_epochs=2, logger=False, enable_progress_bar=False, enable_model_summary=False,
            callbacks=[keep], default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(student, datamodule=module(engine="device"), ckpt_path=resume, weights_only=True)
    assert len(whole.seen) == 10
    assert second.seen == whole.seen[7:]


def test_a_given_split_is_used() -> None:
    data = in_memory(30)
    split = select_labels(data.train, rule="usb", per_class=1, seed=4)
    assert module(data, labels=split).split is split


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"labels": {"per_class": 99}}, "99 labels are asked for|297 labels are asked for"),
        ({"labels": {"fraction": 0.05}}, "would be left without any label"),
        ({"mu": 0}, "mu is 0"),
        ({"mu": 9, "steps_per_epoch": None}, "a step takes 9 x 4 unlabelled images and there are 30"),
        ({"views": {"weak": VIEWS["weak"]}}, "needs the view 'labelled', and views has weak"),
    ],
)
def test_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        module(**changes)


def test_set_without_labels() -> None:
    data = in_memory(30)
    data.train = ArrayImages(data.train.pixels)
    with pytest.raises(UserError, match="no labels to choose from"):
        module(data)


def test_unlabelled_test_images_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    data = in_memory(30)
    data.unlabelled = ArrayImages(torch.cat([data.test.pixels[:3], 255 - data.test.pixels[:2]]))
    with caplog.at_level(logging.WARNING, "selfsight"):
        module(data)
    assert "3 of the 5 unlabelled images" in caplog.text


def test_labelled_images_alone_and_all_images_with_the_other_labels_hidden() -> None:
    data = in_memory(30)
    options: dict[str, Any] = {
        "labels": {"per_class": 2},
        "batch_size": 4,
        "num_workers": 0,
        "engine": "cpu",
        "seed": 0,
    }
    few = LabelledDataModule(data, [VIEWS["weak"]], steps_per_epoch=None, **options)
    everything = DistillationDataModule(data, [VIEWS["weak"]], **options)
    assert few.split == everything.split
    kept = few.split.tensor()
    seen = torch.cat([batch.indices for batch in few.train_dataloader()])
    assert set(seen.tolist()) <= set(range(6))
    assert len(everything.images) == 30
    labels = torch.cat([torch.stack([b.indices, b.labels], 1) for b in everything.train_dataloader()])
    shown = {int(i): int(y) for i, y in labels}
    assert all((y >= 0) == (i < 6) for i, y in shown.items())
    assert all(data.train.labels[kept[i]] == y for i, y in shown.items() if i < 6)


def test_a_list_or_a_split_stands_alone(tmp_path: Path) -> None:
    data = in_memory(30)
    file = tmp_path / "labels.json"
    module(data).split.write(file)
    assert module(data, labels={"split": str(file), "rule": "balanced", "seed": 3}).split == module(data).split
    with pytest.raises(UserError, match=r"labels.split already says .* leave out labels.per_class"):
        module(data, labels={"split": str(file), "per_class": 2})
    assert module(data, labels={"rule": "all"}, batch_size=1, mu=1).labelled_count == 30
