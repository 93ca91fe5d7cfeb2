"""Batches depend on seed, epoch and step alone: not on workers, processes, engines of reading, or a stop in between."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from selfsight.contracts import Batch
from selfsight.datamodules import ArrayImages, ImageData, ImageDataModule, folder
from selfsight.datamodules import module as datamodule
from selfsight.datamodules.loading.loader import Loader, ahead
from selfsight.datamodules.loading.order import Request
from selfsight.datamodules.loading.reader import RawBatch
from selfsight.datamodules.module import TINY
from selfsight.datamodules.views.view import View
from selfsight.errors import UserError

from .writers import encoded, picture, write_pictures

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
LOOK: dict[str, Any] = {"mean": MEAN, "std": STD}


def in_memory(images: int = 20, size: int = 12, image_size: int | None = None) -> ImageData:
    pixels = torch.stack([torch.from_numpy(picture(i, size, size)).permute(2, 0, 1) for i in range(images)])
    labels = torch.arange(images) % 3
    test = ArrayImages(pixels[:7], labels[:7])
    return ImageData("made", ArrayImages(pixels, labels), test, ("a", "b", "c"), image_size or size, MEAN, STD)


def in_files(root: Path, images: int = 10, **changes: Any) -> ImageData:
    write_pictures(root, [f"{'ab'[i % 2]}/{i}.png" for i in range(images)], height=20, width=26)
    write_pictures(root, ["b/other.png"], height=11, width=30)
    options: dict[str, Any] = {
        "image_size": 12, "labels": "auto", "test": None, "test_fraction": 0.2, "unlabelled": None, "resident": False,
        "max_unreadable": 0.3, "seed": 0, "eval_resize": 14,
    }  # fmt: skip
    return folder(root=str(root), **LOOK, **{**options, **changes})


def random_views(size: int = 10) -> list[View]:
    everything = View(
        size, count=2, crop="resized", scale=(0.3, 1.0), hflip=0.5, jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8,
        grayscale=0.2, **LOOK,
    )  # fmt: skip
    return [everything, View(size // 2, crop="resized", hflip=0.5, **LOOK)]


def crops_only(size: int = 10) -> list[View]:
    return [View(size, crop="resized", hflip=0.5, **LOOK)]


def module(data: ImageData, views: Sequence[View] | None = None, **changes: Any) -> ImageDataModule:
    options: dict[str, Any] = {"batch_size": 4, "num_workers": 0, "engine": "cpu", "seed": 0}
    return ImageDataModule(data, views or random_views(), **{**options, **changes})


def same(first: Batch, second: Batch) -> bool:
    pairs = zip(
        [*first.views, *first.boxes, first.indices, first.labels],
        [*second.views, *second.boxes, second.indices, second.labels],
        strict=True,
    )
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("engine", ["cpu", "device"])
@pytest.mark.parametrize("kind", ["memory", "files"])
def test_batches_have_the_agreed_form(engine: str, kind: str, tmp_path: Path) -> None:
    data = in_memory() if kind == "memory" else in_files(tmp_path)
    made = module(data, engine=engine)
    loader = made.train_dataloader()
    batches = list(loader)
    assert len(batches) == len(loader) == made.steps_per_epoch == len(data.train) // 4
    for batch in batches:
        assert [tuple(view.shape) for view in batch.views] == [(4, 3, 10, 10), (4, 3, 10, 10), (4, 3, 5, 5)]
        assert all(view.dtype == torch.float32 for view in batch.views)
        assert [tuple(box.shape) for box in batch.boxes] == [(4, 8)] * 3
        assert torch.equal(batch.labels, data.train.labels[batch.indices])
        sizes = [data.train.read(i).shape[:2] for i in batch.indices.tolist()]
        assert all(torch.equal(box[:, 4:6], torch.tensor(sizes).float()) for box in batch.boxes)
        assert not torch.equal(batch.views[0], batch.views[1])
    drawn = torch.cat([batch.indices for batch in batches])
    assert len(drawn.unique()) == len(drawn)


@pytest.mark.parametrize("engine", ["cpu", "device"])
def test_views_are_normalised_crops_of_their_image(engine: str) -> None:
    data = in_memory(6)
    whole = [View(12, crop="resized", scale=(1.0, 1.0), ratio=(1.0, 1.0), **LOOK)]
    for batch in module(data, whole, engine=engine).train_dataloader():
        expected = data.train.pixels[batch.indices].float() / 255
        expected = (expected - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
        assert torch.allclose(batch.views[0], expected, atol=1e-5)


@pytest.mark.parametrize("engine", ["cpu", "device"])
def test_epochs_and_seeds_differ_and_repeat(engine: str) -> None:
    data = in_memory()
    first, again, other = (list(module(data, engine=engine, seed=s).train_dataloader()) for s in (0, 0, 1))
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    assert not any(same(a, b) for a, b in zip(first, other, strict=True))
    loader = module(data, engine=engine).train_dataloader()
    epochs = [list(loader), list(loader)]
    assert all(same(a, b) for a, b in zip(epochs[0], first, strict=True))
    of_image = [{int(i): v for b in epoch for i, v in zip(b.indices, b.views[0], strict=True)} for epoch in epochs]
    assert not any(torch.equal(of_image[0][i], of_image[1][i]) for i in of_image[0])


@pytest.mark.parametrize("engine", ["cpu", "device"])
def test_workers_change_nothing(engine: str, tmp_path: Path) -> None:
    data = in_files(tmp_path)
    alone = module(data, engine=engine, num_workers=0).train_dataloader()
    helped = module(data, engine=engine, num_workers=2).train_dataloader()
    for _ in range(2):
        for a, b in zip(alone, helped, strict=True):
            assert same(a, b)


def test_epoch_after_an_unfinished_one(tmp_path: Path) -> None:
    data = in_files(tmp_path, images=14)
    alone, helped = (module(data, num_workers=workers, batch_size=2).train_dataloader() for workers in (0, 2))
    list(alone)
    for _ in zip(range(2), helped, strict=False):
        pass
    assert all(same(a, b) for a, b in zip(alone, helped, strict=True))


def test_memory_and_files_give_the_same_crops(tmp_path: Path) -> None:
    files, kept = in_files(tmp_path), in_files(tmp_path, resident=True)
    for engine in ("cpu", "device"):
        pairs = zip(*(module(data, engine=engine).train_dataloader() for data in (files, kept)), strict=True)
        assert all(same(a, b) for a, b in pairs)


def test_both_engines_cut_the_same_crops_from_files(tmp_path: Path) -> None:
    data = in_files(tmp_path)
    pairs = zip(*(module(data, crops_only(), engine=e).train_dataloader() for e in ("cpu", "device")), strict=True)
    for cpu, device in pairs:
        assert torch.equal(cpu.boxes[0], device.boxes[0])
        assert torch.allclose(cpu.views[0], device.views[0], atol=1e-5)


def test_a_batch_travels_while_the_one_before_it_is_worked_with() -> None:
    read: list[int] = []

    def batches() -> Iterator[RawBatch]:
        for step in range(3):
            read.append(step)
            yield RawBatch(0, step, torch.tensor([step]), torch.tensor([7]), [torch.full((1, 3, 2, 2), step)])

    taken = [(batch.step, int(batch.views[0].sum()), len(read)) for batch in ahead(batches(), torch.device("cpu"))]
    assert taken == [(0, 0, 2), (1, 12, 3), (2, 24, 3)]


@pytest.mark.parametrize("travelling", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_stop_and_go_on(workers: int, travelling: bool, tmp_path: Path) -> None:
    data = in_files(tmp_path, images=14)

    def loader() -> Loader:
        made = module(data, num_workers=workers).train_dataloader()
        if travelling:  # as on an accelerator: one batch more is read than was handed out
            made._device = torch.device("cpu")
        return made

    whole = module(data, num_workers=workers).train_dataloader()
    expected = [batch for _ in range(2) for batch in whole]
    stopped = loader()
    start = iter(stopped)
    got = [next(start) for _ in range(2)]
    state = stopped.state_dict()
    resumed = loader()
    resumed.load_state_dict(state)
    got += [batch for _ in range(2) for batch in resumed]
    assert len(got) == len(expected)
    assert all(same(a, b) for a, b in zip(got, expected, strict=True))


class Student(LightningModule):
    """Adds up what it sees in a parameter, and notes every step."""

    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3))
        self.seen: list[tuple[int, float]] = []
        self.stop_at = stop_at

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if self.global_step == self.stop_at:
            raise KeyboardInterrupt
        assert isinstance(batch, Batch)
        self.seen.append((int(batch.indices.sum()), float(batch.views[0].double().sum())))
        return (self.weight * batch.views[0].mean((0, 2, 3))).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(
    student: Student, data: ImageData, epochs: int, root: Path, resume: Path | None = None, **options: Any
) -> Trainer:
    trainer = Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=root, enable_checkpointing=bool(options.get("callbacks")), **options,
    )  # fmt: skip
    trainer.fit(student, datamodule=module(data, engine="device"), ckpt_path=resume, weights_only=True)
    return trainer


@pytest.mark.parametrize(("steps", "limit"), [(2, None), (5, None), (7, None), (3, 3), (4, 3)])
def test_trainer_resumes_bit_by_bit(steps: int, limit: int | None, tmp_path: Path) -> None:
    data = in_memory()  # 5 steps an epoch
    whole, first, second = Student(), Student(), Student()
    fit(whole, data, 3, tmp_path, limit_train_batches=limit)
    keep = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=steps, save_top_k=-1)
    fit(first, data, 2, tmp_path, callbacks=[keep], limit_train_batches=limit)
    fit(second, data, 3, tmp_path, resume=tmp_path / f"step={steps}.ckpt", limit_train_batches=limit)
    assert len(second.seen) == 3 * (limit or 5) - steps
    assert second.seen == whole.seen[steps:]
    assert torch.equal(second.weight, whole.weight)


def test_trainer_resumes_from_the_end_of_an_epoch(tmp_path: Path) -> None:
    data = in_memory()
    whole, second = Student(), Student()
    fit(whole, data, 3, tmp_path)
    keep = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_on_train_epoch_end=True, save_top_k=-1)
    fit(Student(), data, 1, tmp_path, callbacks=[keep])
    fit(second, data, 3, tmp_path, resume=tmp_path / "epoch=0.ckpt")
    assert second.seen == whole.seen[5:]


def test_interrupted_step_is_repeated(tmp_path: Path) -> None:
    data = in_memory()
    whole, first, second = Student(), Student(stop_at=7), Student()
    fit(whole, data, 3, tmp_path)
    saved = tmp_path / "stopped.ckpt"

    class SaveWhenStopped(ModelCheckpoint):
        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            trainer.save_checkpoint(saved)

    with contextlib.suppress(KeyboardInterrupt, SystemExit):  # how it ends is a matter of Lightning's version
        fit(first, data, 3, tmp_path, callbacks=[SaveWhenStopped(dirpath=tmp_path / "others")])
    fit(second, data, 3, tmp_path, resume=saved)
    assert first.seen + second.seen == whole.seen


def test_two_processes_share_the_batch_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = list(module(in_memory(), batch_size=6).train_dataloader())
    parts = []
    for number in range(2):
        monkeypatch.setattr(datamodule, "world_size", lambda: 2)
        monkeypatch.setattr(datamodule, "rank", lambda number=number: number)
        parts.append(list(module(in_memory(), batch_size=6).train_dataloader()))
    assert len(parts[0]) == len(parts[1]) == len(alone) == 3
    for zero, one, whole in zip(*parts, alone, strict=True):
        joined = Batch(
            [torch.cat(pair) for pair in zip(zero.views, one.views, strict=True)],
            torch.cat([zero.indices, one.indices]),
            torch.cat([zero.labels, one.labels]),
            [torch.cat(pair) for pair in zip(zero.boxes, one.boxes, strict=True)],
        )
        assert same(joined, whole)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_every_image_in_order(workers: int, tmp_path: Path) -> None:
    for data in (in_memory(), in_memory(size=16, image_size=12), in_files(tmp_path)):
        made = module(data, num_workers=workers, eval_batch_size=3)
        for split in ("train", "test"):
            images = data.split(split)
            batches = list(made.eval_dataloader(split))
            assert torch.equal(torch.cat([b.indices for b in batches]), torch.arange(len(images)))
            assert torch.equal(torch.cat([b.labels for b in batches]), images.labels)
            assert all(b.views[0].shape[1:] == (3, 12, 12) for b in batches)
            assert [len(b) for b in batches[:-1]] == [3] * (len(batches) - 1)
    again = list(made.eval_dataloader("test"))
    assert torch.equal(again[0].views[0], batches[0].views[0])


def test_a_part_for_evaluation_is_spread_evenly_over_the_split() -> None:
    data = in_memory()
    made = module(data)
    all_of_it = torch.cat([b.views[0] for b in made.eval_dataloader("train")])
    some = torch.cat([b.views[0] for b in made.eval_dataloader("train", limit=4)])
    n = len(all_of_it)
    assert torch.equal(some, all_of_it[torch.linspace(0, n - 1, 4).long()])
    assert len(torch.cat([b.views[0] for b in made.eval_dataloader("train", limit=10 * n)])) == n


def test_evaluation_is_the_normalised_centre() -> None:
    data = in_memory()
    view = next(iter(module(data).eval_dataloader("test"))).views[0]
    expected = (data.test.pixels.float() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    assert torch.allclose(view, expected, atol=1e-6)
    wide = torch.zeros(1, 3, 8, 24, dtype=torch.uint8)
    wide[..., 8:16] = 255
    data = ImageData("wide", ArrayImages(wide.repeat(2, 1, 1, 1)), ArrayImages(wide), (), 8, MEAN, STD)
    plain = [View(8, crop="resized")]
    assert torch.equal(
        next(iter(module(data, plain, batch_size=2).eval_dataloader("test"))).views[0], torch.ones(1, 3, 8, 8)
    )


def test_parts_that_are_not_there() -> None:
    data = in_memory()
    with pytest.raises(UserError, match="has no unlabelled images"):
        module(data).eval_dataloader("unlabelled")
    with pytest.raises(UserError, match=r"'tset' is no part of a data set; .* Did you mean 'test'"):
        module(data).eval_dataloader("tset")


def test_learning_takes_unlabelled_images_too() -> None:
    data = in_memory(8)
    extra = torch.full((4, 3, 12, 12), 255, dtype=torch.uint8)
    data.unlabelled = ArrayImages(extra)
    batch = next(iter(module(data, batch_size=12).train_dataloader()))
    assert sorted(batch.indices.tolist()) == list(range(12))
    assert (batch.labels == -1).tolist() == (batch.indices >= 8).tolist()


def test_files_that_break_later_are_replaced_and_named(tmp_path: Path) -> None:
    data = in_files(tmp_path / "set", test_fraction=0)
    broken = [data.train.path(i) for i in (2, 3)]
    for path in broken:
        path.write_bytes(encoded(picture(0))[:200])
    data.unreadable.write_to(tmp_path / "unreadable.txt")
    for workers in (0, 2):
        drawn = torch.cat([b.indices for b in module(data, batch_size=11, num_workers=workers).train_dataloader()])
        assert sorted(drawn.tolist()) == [0, 1, 4, 4, 4, 5, 6, 7, 8, 9, 10]
    seen = torch.cat([b.indices for b in module(data).eval_dataloader("train")])
    assert seen.tolist() == [0, 1, 4, 5, 6, 7, 8, 9, 10]
    assert len((tmp_path / "unreadable.txt").read_text().splitlines()) == 2
    for path in (data.train.path(i) for i in (5, 6)):
        path.write_text("no image")
    with pytest.raises(UserError, match="4 of 11 files cannot be read"):
        list(module(data, batch_size=11).train_dataloader())


def test_engine_follows_the_images() -> None:
    assert module(in_memory(size=TINY), engine="auto").engine == "device"
    assert module(in_memory(size=TINY + 1), engine="auto").engine == "cpu"
    with pytest.raises(UserError, match=r"views.engine is 'gpu'; auto, cpu or device"):
        module(in_memory(), engine="gpu")


def test_workers_follow_the_images(tmp_path: Path) -> None:
    assert module(in_memory(), num_workers="auto").train_dataloader()._workers is None
    assert module(in_memory(), engine="device", num_workers=2).train_dataloader()._workers is None
    assert module(in_files(tmp_path), num_workers="auto").train_dataloader()._workers is not None


@pytest.mark.parametrize("engine", ["cpu", "device"])
@pytest.mark.parametrize("kept", ["of one size in memory", "of two sizes in files"])
def test_views_have_the_memory_order_that_is_asked_for(kept: str, engine: str, tmp_path: Path) -> None:
    data = in_memory() if "memory" in kept else in_files(tmp_path)
    batches = [next(iter(module(data, engine=engine, channels_last=last).train_dataloader())) for last in (True, False)]
    for last, plain in zip(*(batch.views for batch in batches), strict=True):
        assert last.is_contiguous(memory_format=torch.channels_last)
        assert plain.is_contiguous()
        assert torch.equal(last, plain)


def test_batch_larger_than_the_set() -> None:
    with pytest.raises(UserError, match="batch_size is 21 and an epoch has 20 images; choose batch_size=20 or less"):
        module(in_memory(), batch_size=21)


@pytest.mark.parametrize(("free", "resident"), [(10**9, True), (10_000, False)])
def test_what_does_not_fit_is_read_as_needed_and_said(
    tmp_path: Path, free: int, resident: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Decoded images (about 19 kB) stay in memory where twice as much is free; the views are the same either way."""
    expected = list(module(in_files(tmp_path)).train_dataloader())
    monkeypatch.setattr("selfsight.datamodules.images.memory.available_memory", lambda: free)
    with caplog.at_level("WARNING", "selfsight"):
        data = in_files(tmp_path, resident=True)
    assert data.train.in_memory is resident
    assert ("they are read as needed" in caplog.text) is not resident
    assert all(map(same, module(data).train_dataloader(), expected))


def test_a_full_gpu_leaves_the_images_in_main_memory_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10_000, 80_000))
    made = module(in_memory(), engine="device", device="cuda")
    with caplog.at_level("WARNING", "selfsight"):
        readers = [made._training_reader() for _ in range(2)]
    assert len(caplog.records) == 1
    assert "more than half of what is free on cuda: they stay in main memory" in caplog.text
    raw = readers[1][Request(0, 0, [3, 1], [3, 1])]
    assert torch.equal(raw.views[0], made.images.pixels[[3, 1]])


def test_long_epochs_over_few_images() -> None:
    made = module(in_memory(6), examples=24, batch_size=8)
    assert (made.steps_per_epoch, made.examples) == (3, 24)
    batches = list(made.train_dataloader())
    assert torch.cat([b.indices for b in batches]).bincount().tolist() == [4] * 6
    first = [v for b in batches for i, v in zip(b.indices, b.views[0], strict=True) if int(i) == 0]
    assert not torch.equal(first[0], first[1])  # the same image of one epoch, cut differently


def test_extreme_shapes(tmp_path: Path) -> None:
    for i, (height, width) in enumerate([(1, 1), (1, 300), (400, 1), (3, 5)]):
        write_pictures(tmp_path, [f"{i}.png"], height=height, width=width)
    options: dict[str, Any] = {"labels": "none", "test": None, "test_fraction": 0.25, "unlabelled": None}
    data = folder(root=str(tmp_path), image_size=12, resident=False, max_unreadable=0.0, seed=0, **LOOK, **options)
    for engine in ("cpu", "device"):
        made = module(data, engine=engine, batch_size=1)
        assert [b.views[0].shape for b in made.train_dataloader()] == [(1, 3, 10, 10)] * 3
        assert [b.views[0].shape for b in made.eval_dataloader("train")] == [(3, 3, 12, 12)]
