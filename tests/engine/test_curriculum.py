"""`callbacks=efficienttrain`: what a method sees in each epoch, and nothing else."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from selfsight import cli
from selfsight.backbones.registry import create
from selfsight.composition.overrides import compose
from selfsight.contracts import Batch
from selfsight.datamodules import ArrayImages, ImageData, ImageDataModule, SemiDataModule
from selfsight.datamodules.views.frequency import low_frequencies
from selfsight.datamodules.views.view import View
from selfsight.engine import build
from selfsight.engine.curriculum import EfficientTrain
from selfsight.errors import UserError
from selfsight.methods.base import Method
from selfsight.methods.simclrv2 import SimCLRv2
from selfsight.nn.distributed import all_reduce_sum, world_size
from selfsight.optim.curriculum import Curriculum, stages
from selfsight.optim.recipe import OptimizationRecipe
from selfsight.optim.schedule import Clock

from ..distributed.spawn import run_on
from ..jobs.test_evaluate import refused
from ..small import SmallNet

GOLDEN = np.load(Path(__file__).parents[1] / "parity" / "golden" / "efficienttrain.npz")
LENGTH = Clock(examples=8, batch_size=4, epochs=5, steps_per_epoch=2)
OUTPUTS = ("end_epoch", "band", "magnitude")
SIDES = (10, 10, 10, 12, 14)  # the paper's, at a sixteenth
VIEWS = (
    View(14, count=2, crop="resized", hflip=0.5, jitter=(0.4, 0.4, 0.4, 0.1), policy="randaugment", policy_magnitude=9),
    View(8, crop="resized"),
)


def images(n: int = 8) -> ImageData:
    grey = (0.5, 0.5, 0.5)
    pixels = torch.randint(0, 256, (n, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    train, test = ArrayImages(pixels, torch.arange(n) % 2), ArrayImages(pixels)
    return ImageData("noise", train, test, ("a", "b"), 16, grey, grey)


def module(views: Any = VIEWS, **options: Any) -> ImageDataModule:
    return ImageDataModule(images(), views, **{"batch_size": 4, "num_workers": 0, **options})


def five_epochs(cell: int = 2) -> Curriculum:
    return Curriculum(tuple(stages(5)), cell)


def one(data: Any, epoch: int) -> Any:
    return next(iter(data.train_dataloader().from_epoch(epoch)))


@pytest.mark.parametrize("case", ["stages_a", "stages_b", "stages_c"])
def test_stages_are_the_authors_epoch_by_epoch(case: str) -> None:
    epochs, *outputs = int(GOLDEN[f"{case}__hp__epochs"]), *(f"{case}__out__{name}" for name in OUTPUTS)
    ends, bands, magnitudes = (GOLDEN[name] for name in outputs)
    curriculum = Curriculum(tuple(stages(epochs)))
    for epoch in range(epochs):
        k = int(np.searchsorted(ends, epoch, side="right"))
        assert curriculum.side(224, epoch) == bands[k]
        assert curriculum.strength(epoch) == magnitudes[k] / 9
    assert curriculum.side(224, epochs + 10) == 224  # a run that has come to its end


def test_sides_are_whole_cells_and_never_larger_than_the_view() -> None:
    in_patches = Curriculum(tuple(stages(5)), 16)
    assert [[in_patches.side(size, e) for e in (0, 3, 4)] for size in (224, 96, 32, 28, 15)] == [
        [160, 192, 224], [64, 80, 96], [16, 32, 32], [16, 16, 28], [15, 15, 15]
    ]  # fmt: skip
    assert [stage.size for stage in map(Curriculum(tuple(stages(2))).at, range(2))] == [160, 224]  # no epoch for each


@pytest.mark.parametrize("engine", ["cpu", "device"])
def test_views_are_the_low_frequencies_of_weaker_ones_and_at_last_themselves(engine: str) -> None:
    grown = module(engine=engine)
    grown.follow(five_epochs())
    for epoch, side in enumerate(SIDES):
        weaker = [view if view.policy is None else replace(view, policy_magnitude=1 + 2 * epoch) for view in VIEWS]
        expected = one(module(weaker, engine=engine), epoch)
        views = one(grown, epoch).views
        assert [view.shape[-1] for view in views] == [side, side, {10: 6, 12: 6, 14: 8}[side]]
        for view, whole in zip(views, expected.views, strict=True):
            torch.testing.assert_close(view, low_frequencies(whole, view.shape[-1]), rtol=0, atol=0)
    plain = one(module(engine=engine), 4)
    assert all(map(torch.equal, views, plain.views))
    (evaluated,) = next(iter(grown.eval_dataloader("test"))).views
    assert evaluated.shape[-1] == 16


def test_both_streams_of_few_labels_grow() -> None:
    view = View(14, crop="resized")
    views = {"labelled": view, "weak": view, "strong": replace(view, policy="fixmatch")}
    data = SemiDataModule(images(), views, labels={"per_class": 1}, batch_size=2, mu=2, num_workers=0, engine="device")
    data.follow(five_epochs())
    for epoch, side in enumerate(SIDES):
        batch = one(data, epoch)
        assert {v.shape[-1] for v in (*batch.labelled.views, *batch.unlabelled.views)} == {side}


def test_the_magnitude_is_one_that_the_policy_has() -> None:
    view = View(14, policy="fixmatch", policy_magnitude=10)
    assert [view.weakened(m / 9).policy_magnitude for m in (1, 3, 5, 7, 9)] == [2, 3, 6, 8, 10]
    assert all(View(14, policy=policy).weakened(1 / 9) == View(14, policy=policy) for policy in ("usb", "autoaugment"))


class Looks(Method):
    """Learns a number from the mean of its views, and notes their sizes."""

    def __init__(self) -> None:
        super().__init__(SmallNet())
        self.w, self.seen = torch.nn.Parameter(torch.tensor(0.3)), list[tuple[int, int]]()

    def training_step(self, batch: Batch, batch_idx: int) -> Mapping[str, Tensor]:
        self.seen.append((self.epoch, batch.views[0].shape[-1]))
        return {"loss": (self.backbone(batch.views[0]).mean() * self.w - 1).square()}


def learned(epochs: int, folder: Path, resume: Path | None = None) -> Looks:
    torch.manual_seed(0)
    method = Looks()
    recipe = OptimizationRecipe(partial(torch.optim.SGD, momentum=0.9), 0.1, {})
    method.configure(recipe, LENGTH)
    keep = ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=7, save_top_k=-1)
    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", callbacks=[EfficientTrain(), keep], logger=False, default_root_dir=folder,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(method, datamodule=module(engine="device"), ckpt_path=resume, weights_only=True)
    return method


def test_a_run_that_goes_on_is_in_the_stage_where_it_was(tmp_path: Path) -> None:
    """Stopped in the middle of the epoch in which the images have grown."""
    through = learned(5, tmp_path / "through")
    assert through.seen == [(epoch, side) for epoch, side in enumerate(SIDES) for _ in range(2)]
    learned(4, tmp_path / "stopped")
    resumed = learned(5, tmp_path / "resumed", tmp_path / "stopped" / "step=7.ckpt")
    assert resumed.seen == through.seen[7:]
    for name, value in through.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


SMOKE = ("debug=smoke", "callbacks=efficienttrain", "trainer.max_epochs=5")


def test_as_it_is_typed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["method=supce", "views.engine=cpu", "views.global.policy=randaugment", "trainer.limit_batches=1"]
    cli.main(["pretrain", *SMOKE, *words, "evaluator.final={}", "report=false", f"runs={tmp_path}", "name=x"])
    told = " ".join(capsys.readouterr().out.split())
    assert "EfficientTrain: views of 12 (to epoch 3), 14 (to epoch 4), 16 (from epoch 5 on) pixels; " in told
    assert (
        "their magnitude is 0.11 (to epoch 1), 0.33 (to epoch 2), 0.56 (to epoch 3), 0.78 (to epoch 4), 1 (fr" in told
    )
    with (tmp_path / "x" / "metrics.csv").open() as file:
        assert len({row["epoch"] for row in csv.DictReader(file)}) == 5


def grown_on(rank: int) -> dict[str, Any]:
    """What a process sees of the growing images, and a network that has learned from its share of them."""
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    network, seen = SmallNet(norm=torch.nn.Identity), []
    method = SimCLRv2(network, projection_dim=4)
    method.projector = torch.nn.Linear(8, 4)  # without a norm, whose batch is a process's own
    data = module(engine="cpu")  # which draws image by image, whoever has it
    data.follow(five_epochs())
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    for epoch in (0, 3, 4):
        for batch in data.train_dataloader().from_epoch(epoch):
            batch.views = batch.views[:2]
            seen.append((batch.indices, batch.views[0]))
            optimizer.zero_grad()
            method.training_step(batch, 0)["loss"].backward()
            for p in method.parameters():
                p.grad = None if p.grad is None else all_reduce_sum(p.grad) / world_size()
            optimizer.step()
    return {"seen": seen, "state": method.state_dict()}


def test_two_processes_see_and_learn_what_one_does() -> None:
    one, two = grown_on(0), run_on(2, grown_on)
    for step, (indices, views) in enumerate(one["seen"]):
        parts = [process["seen"][step] for process in two]
        assert torch.equal(torch.cat([indices for indices, _ in parts]), indices)
        torch.testing.assert_close(torch.cat([views for _, views in parts]), views)
    assert [views.shape[-1] for _, views in one["seen"]] == [10, 10, 12, 12, 14, 14]
    for process in two:
        for name, value in one["state"].items():
            torch.testing.assert_close(process["state"][name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("words", "sides", "resting"),
    [
        (["method=spark", "dataset.image_size=32"], [24, 24, 32], set()),  # whole cells of 8
        (["method=byol", "backbone=vit_digits"], [12, 14, 16], {"pos_embed"}),  # of sines
        (["method=mocov3", "backbone=vit_tiny_cifar", "dataset.image_size=32", "method.freeze_patches=false"],
         [24, 28, 32], set()),
    ],
    ids=["spark", "byol on a ViT", "mocov3 on a ViT"],
)  # fmt: skip
def test_masked_networks_and_transformers_learn_from_images_that_grow(
    words: list[str], sides: list[int], resting: set[str]
) -> None:
    parts = build.parts(compose("pretrain", [*SMOKE, *words, "evaluator.final={}"]))
    method, data = parts.method.configure(parts.recipe, parts.length), parts.datamodule
    optimizer, before = method.configure_optimizers(), {n: p.clone() for n, p in method.backbone.named_parameters()}
    for step, epoch in enumerate((0, 3, 4)):
        batch = one(data, epoch)
        assert batch.views[0].shape[-1] == sides[step]
        method.begin_step(step)
        loss = method.training_step(batch, step)["loss"]
        assert loss.isfinite()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.end_step()
    still = {name for name, p in method.backbone.named_parameters() if torch.equal(p, before[name])}
    assert still == resting


def test_fine_tuning_takes_it_as_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["dataset=digits", "backbone=resnet_digits", "labels.per_class=1", "report=false", f"runs={tmp_path}"]
    cli.main(["finetune", *SMOKE, *words, "name=x"])
    assert "EfficientTrain: views of 12 (to epoch 3), 14 (to epoch 4), 16" in " ".join(capsys.readouterr().out.split())
    assert (tmp_path / "x" / "classification.json").is_file()


VIT = "backbone=vit_digits"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["method=mae", VIT, "views=mae"],
         "12, 14 and 16 pixels, which the method does not take (MAE got images of 12 x 12 and was made for 16 x 16);"),
        ([VIT, "backbone.dynamic_img_size=false"], "which the network does not take (MAEViT takes images of 16 x"),
        ([VIT, "backbone.patch_size=16"], "nothing to do: views of 16 pixels cannot be made smaller"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_a_sentence(
    words: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sentence in " ".join(refused(capsys, "pretrain", *SMOKE, f"runs={tmp_path}", *words).split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"magnitudes": [1, 2]}, "as many magnitudes, neither of which shrink"),
        ({"sizes": [224, 160, 96, 64, 32]}, "neither of which shrink"),
        ({"sizes": [], "magnitudes": []}, "was expected"),
    ],
)
def test_stages_that_are_none_are_refused(options: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        EfficientTrain(**options).prepare(Looks(), module(), LENGTH)


def test_kernels_of_one_size_are_refused() -> None:
    with pytest.raises(UserError, match=r"trainer\.cuda_graphs=true replays kernels of one size; leave it false"):
        EfficientTrain().prepare(Looks(), module(), LENGTH, graphs=True)


def test_a_teacher_of_one_size_is_refused() -> None:
    method = Looks()
    small = {"patch_size": 2, "embed_dim": 12, "depth": 1, "num_heads": 1}
    method.teacher = create("vit_tiny_mae", img_size=14, dynamic_img_size=False, **small)
    with pytest.raises(UserError, match="6, 8, 10, 12 and 14 pixels, which the teacher does not take"):
        EfficientTrain().prepare(method, module(), LENGTH)


def test_sides_are_whole_patches_of_the_teacher() -> None:
    method, data = Looks(), module([View(16)])
    method.teacher = create("vit_tiny_mae", img_size=16, patch_size=4, embed_dim=12, depth=1, num_heads=1)
    EfficientTrain().prepare(method, data, LENGTH)
    assert data.curriculum is not None
    assert data.curriculum.cell == 4


def test_a_run_of_one_epoch_is_the_last_stage() -> None:
    chosen, data = EfficientTrain(), module()
    chosen.prepare(Looks(), data, replace(LENGTH, epochs=1))
    assert chosen.about.endswith("; 1 of 5 stages in 1 epoch")
    assert [view.shape[-1] for view in one(data, 0).views] == [14, 14, 8]


def test_a_data_module_of_others_is_refused() -> None:
    with pytest.raises(UserError, match="and object is none; take datamodule=images or semi"):
        EfficientTrain().prepare(Looks(), object(), LENGTH)  # type: ignore[arg-type]
