from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from selfsight.contracts import Batch, SemiBatch
from selfsight.errors import UserError
from selfsight.evaluation import KNN, Features, OnlineEvaluation, extract

from .conftest import TinyBackbone


class Toy(LightningModule):
    """Pulls two views together, and nothing else: it learns, towards a point."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.modes: list[bool] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.modes.append(all(part.training for part in self.modules()))
        a, b = (self.backbone(view) for view in getattr(batch, "unlabelled", batch).views[:2])
        return (a - b).square().sum()

    def classifiers(self) -> dict[str, nn.Module]:
        return {}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class ToyData(LightningDataModule):
    def __init__(self, labels: bool = True, semi: bool = False, test: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.images = torch.randn(48, 3, 9, 9, generator=generator)
        self.labels = torch.arange(48) % 3 if labels else None
        self.semi = semi
        self.data = SimpleNamespace(test=object() if test else None)

    def batch(self, rows: Tensor, noise: float = 0.0, views: int = 1) -> Batch:
        made = [self.images[rows] + noise * torch.randn_like(self.images[rows]) for _ in range(views)]
        return Batch(made, rows, None if self.labels is None else self.labels[rows])

    def train_dataloader(self) -> DataLoader[Any]:
        made = [self.batch(rows, 0.1, 2) for rows in torch.arange(48).split(16)]
        given: Any = [SemiBatch(each, each) for each in made] if self.semi else made
        return DataLoader(given, batch_size=None)

    def eval_dataloader(self, split: str, limit: int | None = None) -> list[Batch]:
        rows = (torch.arange(32) if split == "train" else torch.arange(32, 48))[:limit]
        return [self.batch(part) for part in rows.split(10)]


def fit(tmp_path: Path, data: ToyData, evaluation: OnlineEvaluation, epochs: int = 3) -> tuple[Trainer, Toy]:
    torch.manual_seed(0)
    trainer = Trainer(
        max_epochs=epochs, callbacks=[evaluation], accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path, log_every_n_steps=1,
    )  # fmt: skip
    method = Toy(TinyBackbone())
    trainer.fit(method, datamodule=data)
    return trainer, method


def test_online_equals_offline_and_training_goes_on_in_training_mode(tmp_path: Path) -> None:
    data, heard = ToyData(), []
    evaluation = OnlineEvaluation({"knn": KNN(k=[1, 5])})
    evaluation.on_result.append(heard.append)
    trainer, method = fit(tmp_path, data, evaluation)
    assert heard == evaluation.results
    assert [(r["epoch"], r["step"]) for r in heard] == [(1, 3), (2, 6), (3, 9)]
    train, test = (extract(method.backbone, data.eval_dataloader(split))["final"] for split in ("train", "test"))
    offline = KNN(k=[1, 5])(train, test)
    assert {name: heard[-1][name] for name in offline} == offline
    assert trainer.callback_metrics["knn_top1"].item() == pytest.approx(offline["knn_top1"])
    assert all(method.modes), "evaluation left a module in eval mode"
    for name in ("rank", "feature_std", "alignment", "uniformity", "view_knn_top1"):
        assert isinstance(heard[-1][name], float)


def test_features_come_in_the_precision_of_the_training_and_are_compared_in_float32(tmp_path: Path) -> None:
    class Asks:
        needs_labels = False
        protocol = "types"

        def __call__(self, train: Features, test: Features) -> dict[str, Any]:
            seen.append((train.x.dtype, (train.x @ test.x.T).dtype))
            return {}

    seen: list[Any] = []
    made: list[tuple[bool, torch.dtype]] = []
    method = Toy(TinyBackbone())
    method.backbone.register_forward_hook(lambda m, args, out: made.append((m.training, out.dtype)))
    trainer = Trainer(
        max_epochs=1, callbacks=[OnlineEvaluation({"asks": Asks()})], accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        precision="bf16-mixed",
    )  # fmt: skip
    trainer.fit(method, datamodule=ToyData(labels=False))
    measured = [dtype for training, dtype in made if not training]
    assert measured[0] == made[0][1] == torch.bfloat16
    assert seen == [(torch.float32, torch.float32)]


def test_evaluation_does_not_change_what_is_learnt(tmp_path: Path) -> None:
    _, measured = fit(tmp_path, ToyData(), OnlineEvaluation({"knn": KNN()}))
    _, alone = fit(tmp_path, ToyData(), OnlineEvaluation({}, every=1000))
    for name, value in measured.state_dict().items():
        assert torch.equal(value, alone.state_dict()[name]), name


def test_large_sets_are_measured_in_part_and_the_protocol_says_so(tmp_path: Path) -> None:
    seen: list[int] = []

    class Count(KNN):
        def __call__(self, train: Features, test: Features) -> dict[str, float]:
            seen.extend([len(train), len(test)])
            return super().__call__(train, test)

    evaluation = OnlineEvaluation({"knn": Count()}, limit=12)
    fit(tmp_path, ToyData(), evaluation, epochs=1)
    assert seen == [12, 12]
    assert "at most 12 images" in evaluation.protocol["knn"]


def test_every_second_epoch_and_the_last(tmp_path: Path) -> None:
    evaluation = OnlineEvaluation({"knn": KNN()}, every=2)
    fit(tmp_path, ToyData(), evaluation, epochs=5)
    assert [r["epoch"] for r in evaluation.results] == [2, 4, 5]


@pytest.mark.parametrize("semi", [False, True])
def test_without_labels_views_are_found_instead(tmp_path: Path, semi: bool) -> None:
    evaluation = OnlineEvaluation({"knn": KNN()})
    fit(tmp_path, ToyData(labels=False, semi=semi), evaluation, epochs=1)
    (result,) = evaluation.results
    assert "knn_top1" not in result
    assert result["view_knn_top1"] > 0.5, "noise of a tenth does not hide an image"


def test_a_set_without_test_images_is_measured_on_its_training_images(tmp_path: Path) -> None:
    evaluation = OnlineEvaluation({"knn": KNN()})
    fit(tmp_path, ToyData(test=False), evaluation, epochs=1)
    assert "rank" in evaluation.results[0]
    assert "knn_top1" not in evaluation.results[0], "kNN on its own bank would be a lie"


def test_collapse_is_said(tmp_path: Path) -> None:
    class Point(TinyBackbone):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 1e-4 + 1

    evaluation = OnlineEvaluation({"knn": KNN()})
    method = Toy(Point())
    trainer = Trainer(
        max_epochs=1, callbacks=[evaluation], accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(method, datamodule=ToyData())
    assert evaluation.results[0]["warning"].startswith("Collapse")


@pytest.mark.parametrize(("momentum", "warned"), [(1.0, True), (0.9, False)])
def test_an_average_that_never_moves_is_said(tmp_path: Path, momentum: float, warned: bool) -> None:
    class Averaged(Toy):
        def __init__(self, backbone: nn.Module) -> None:
            super().__init__(backbone)
            self.measured = copy.deepcopy(backbone)

        def on_train_batch_end(self, *given: Any) -> None:
            for mine, learnt in zip(self.measured.parameters(), self.backbone.parameters(), strict=True):
                mine.data.lerp_(learnt.data, 1 - momentum)

    evaluation = OnlineEvaluation({})
    trainer = Trainer(
        max_epochs=1, callbacks=[evaluation], accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(Averaged(TinyBackbone()), datamodule=ToyData())
    assert ("has not moved" in evaluation.results[0].get("warning", "")) is warned


def test_features_that_are_no_numbers_name_epoch_and_step(tmp_path: Path) -> None:
    class Overflows(TinyBackbone):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if self.training else super().forward(x) * torch.inf

    trainer = Trainer(
        max_epochs=1, callbacks=[OnlineEvaluation({})], accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"after epoch 1 \(step 3\) the features of 32 of 32 .* lower optimizer.lr"):
        trainer.fit(Toy(Overflows()), datamodule=ToyData())


def test_what_the_authors_measure_is_measured(tmp_path: Path) -> None:
    """An average, where a method carries one away; any part of it that is asked for by name."""

    class Averaged(Toy):
        def __init__(self, backbone: nn.Module) -> None:
            super().__init__(backbone)
            self.average = copy.deepcopy(backbone)

        @property
        def measured(self) -> nn.Module:
            return self.average

    def seen(part: str | None) -> list[str]:
        method, calls = Averaged(TinyBackbone()), []
        for name in ("backbone", "average"):
            network = method.get_submodule(name)
            network.register_forward_hook(lambda m, *_, n=name: None if m.training else calls.append(n))
        trainer = Trainer(
            max_epochs=1, callbacks=[OnlineEvaluation({"knn": KNN()}, part=part)], accelerator="cpu", logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(method, datamodule=ToyData())
        return calls

    assert set(seen(None)) == {"average"}
    assert set(seen("backbone")) == {"backbone"}
