"""From a data set and a list of views to batches, with or without a trainer."""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor

from selfsight.contracts import Batch, Targets
from selfsight.datamodules.datasets.dataset import ImageData
from selfsight.datamodules.images.bands import Bands, Kind, scaled
from selfsight.datamodules.images.sets import ImageSet
from selfsight.datamodules.loading.clusters import ClusterOrder
from selfsight.datamodules.loading.loader import Loader, Reader, cores
from selfsight.datamodules.loading.order import Order
from selfsight.datamodules.loading.reader import EvaluationReader, PixelReader, RawBatch, TrainingReader
from selfsight.datamodules.views import band_views
from selfsight.datamodules.views.band_views import CpuBandViews, DeviceBandViews
from selfsight.datamodules.views.cpu_views import CpuViews
from selfsight.datamodules.views.device_views import DeviceViews
from selfsight.datamodules.views.frequency import low_frequencies
from selfsight.datamodules.views.image_ops import normalize
from selfsight.datamodules.views.view import View
from selfsight.nn.distributed import rank, world_size
from selfsight.optim.curriculum import Curriculum
from selfsight.validation import AUTO, expect, one_of, whole

log = logging.getLogger("selfsight")

ENGINES = ("auto", "cpu", "device")

#: side in pixels up to which whole batches in torch are the faster way on the CPU, too (measured with SimCLR's views:
#: 1.4 times as fast at 16 pixels, 0.8 at 32, 0.3 at 96)
TINY = 24
#: images that are worth a process of its own in evaluation
FEWEST = 16
#: of the processes that read
ALL = Fraction(1)


class ImageDataModule(LightningDataModule):
    """Batches of views of the images of a data set.

    Two engines make the same views: ``cpu`` image by image, in worker processes; ``device`` for the whole batch, on the
    device of the trainer. A set in memory is kept on that device and the loader hands out numbers. Images in files are
    read by workers, which for the device engine also crop and flip them, so that only small uint8 views travel.

    Order and randomness are functions of seed, epoch and step. Without a trainer, iterate over `train_dataloader`:
    every iteration is an epoch.

    Args:
        data: what to learn from (`ImageData.everything`: labelled and unlabelled images).
        views: `View` descriptions, in the order of ``Batch.views``; a mapping gives its values.
        batch_size: images per step over all processes; has to be a multiple of their number.
        num_workers: processes that read images; ``auto``: none for a set in memory, else one a core, at most 8.
        worker_share: of these processes, for training; below 1 where another loader works at the same time.
        engine: ``cpu``, ``device``, or ``auto``: the device where it is an accelerator or the images are tiny, and the
            views have no operations of one's own.
        seed: of order and views.
        examples, last, split, replacement: images per epoch (None: one pass over the set), its last batch, how
            processes share it, and drawing with replacement; see `Order`.
        channels_last: memory format of the views.
        device: where views are made without a trainer.
        compile: compile the device's views.
        eval_batch_size: images per batch of `eval_dataloader`.

    Attributes:
        dataset: the `ImageData`. images: those learned from. views: their `View` descriptions.
        curriculum: what views are in each epoch; None: as they are described, see `follow`.

    Raises:
        UserError: a batch larger than the set, no view, an unknown engine, or a number that cannot be one.
    """

    def __init__(
        self,
        data: ImageData,
        views: Sequence[View] | Mapping[str, View],
        *,
        batch_size: int = 256,
        num_workers: int | str = "auto",
        engine: str = "auto",
        seed: int = 0,
        examples: int | None = None,
        last: str = "drop",
        split: str = "batch",
        replacement: bool = False,
        channels_last: bool = False,
        compile: bool = False,
        device: torch.device | str | None = None,
        eval_batch_size: int = 512,
        worker_share: Fraction = ALL,
    ) -> None:
        super().__init__()
        self.dataset, self.channels_last, self._compile = data, channels_last, compile
        self.seed = expect("seed", seed, whole(0))
        self._bands = data.bands
        self.views = list(views.values()) if isinstance(views, Mapping) else list(views)
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.num_workers = expect("num_workers", num_workers, AUTO | whole(0))
        self._worker_share = worker_share
        self._engine, self._device = expect("views.engine", engine, one_of(*ENGINES)), device
        self.images = data.everything()
        self.order = Order(
            len(self.images), batch_size, examples=examples, seed=seed, last=last, replacement=replacement, split=split
        )
        self._start = {"epoch": 0, "batch": 0}
        #: Not held, so that a loader without a trainer ends with its last reader, and its processes with it.
        self._loader: weakref.ref[Loader] | None = None
        self._pixels: Tensor | None = None
        self._fits = True
        self.curriculum: Curriculum | None = None
        self._weaker: dict[float, DeviceViews] = {}
        if self._bands is None and any(view.of_channels for view in self.views):
            self._bands = Bands(Kind(3, "uint8"), 0, 255, tuple(data.mean), tuple(data.std), 0)
        self.device_views: DeviceViews | DeviceBandViews
        if self._bands is None:
            self.device_views = DeviceViews(self.views, compile=compile)
        else:
            names = views if isinstance(views, Mapping) else {str(i): view for i, view in enumerate(self.views)}
            band_views.check(names, self._bands)
            self.views = [band_views.normalised_like(view, data.mean, data.std) for view in self.views]
            self.device_views = DeviceBandViews(self.views, self._bands)
        self._own_operations = any(view.transforms for view in self.views)
        if self._engine == "device":
            self.device_views.check()

    @property
    def data(self) -> ImageData:
        """`dataset`, as it was called in version 0.1."""
        return self.dataset

    @property
    def facts(self) -> dict[str, Any]:
        """What a method may ask to be told of the images, by the name of its argument.

        - ``num_classes``: classes of the data set, or columns of its targets; 0 without labels. ``classes``: names.
        - ``targets``: several labels or numbers in place of classes, see `Targets`; None where there are none.
        - ``num_images``: N, images learned from, with and without labels; ``Batch.indices`` count them.
        - ``labels``: ``[N]`` int64, -1 where an image has none; None where no image has one.
        - ``image_size``: side of the images that evaluation sees, in pixels.
        - ``mean``, ``std``: of each channel, with which images are normalised.
        """
        return {**self.dataset.facts, "labels": self.images.labels}

    @property
    def steps_per_epoch(self) -> int:
        """Batches per epoch."""
        return self.order.steps

    @property
    def examples(self) -> int:
        """Images per epoch."""
        return self.order.length

    @property
    def device(self) -> torch.device:
        if self._device is None and self.trainer is not None:
            return self.trainer.strategy.root_device
        return torch.device(self._device or "cpu")

    @property
    def engine(self) -> str:
        """The engine in use: ``cpu`` or ``device``."""
        if self._engine != "auto":
            return self._engine
        if self._own_operations:
            return "cpu"
        if self.device.type != "cpu":
            return "device"
        pixels = self.images.pixels
        return "device" if pixels is not None and max(pixels.shape[-2:]) <= TINY else "cpu"

    def follow(self, curriculum: Curriculum | None) -> None:
        """From the next `train_dataloader` on, training views are as large and as strong as it has them in each epoch.

        They are made as described, with that share of their magnitude, normalised, and cut to their low frequencies.
        Views of evaluation stay as they are. None: so do those of training.
        """
        self.curriculum = curriculum

    def within(self, clusters: Tensor) -> None:
        """Batches hold images of one cluster each from now on.

        Args:
            clusters: ``[N]`` int64, of each of `images`.

        Raises:
            UserError: no cluster fills a batch.
        """
        self.order = ClusterOrder(len(self.images), self.batch_size, seed=self.seed, labels=clusters)

    def train_dataloader(self) -> Loader:
        """Shuffled `Batch` es of views for this process; with a trainer, what `on_after_batch_transfer` finishes."""
        reader = self._training_reader()
        workers = self._workers(reader, self.images)
        loader = Loader(
            reader,
            self.order,
            self._hand_over,
            workers=max(1, math.floor(workers * self._worker_share)) if workers else 0,
            rank=rank(),
            world=world_size(),
            device=self.device if self.device.type == "cuda" else None,
            progress=self._progress,
        )
        loader.load_state_dict(self._start)
        self._loader = weakref.ref(loader)
        return loader

    def eval_dataloader(self, split: str, limit: int | None = None) -> Loader:
        """All ``train``, ``test`` or ``unlabelled`` images in order, un-augmented: one view ``[B, 3, S, S]``.

        The shorter side is resized to ``data.eval_resize`` (antialiased bilinear), the central square is cut out and
        normalised as the training views are. Files that cannot be read are left out: see ``indices``. With ``limit`` at
        most so many images, spread evenly over the split (files often stand sorted by class) and numbered among them.
        """
        images = self.dataset.split(split)
        if limit is not None and limit < len(images):
            images = images.select(torch.linspace(0, len(images) - 1, limit).long())
        size = self.dataset.image_size
        if images.pixels is not None and tuple(images.pixels.shape[-2:]) == (size, size):
            reader: Reader = PixelReader(images, images.pixels)
        else:
            channels = None if self.dataset.bands is None else self.dataset.channels
            reader = EvaluationReader(images, self.dataset.eval_resize or size, size, channels)
        batch = min(self.eval_batch_size, len(images))
        order = Order(len(images), batch, shuffle=False, last="keep")
        workers = min(self._workers(reader, images), -(-len(images) // FEWEST))
        return Loader(
            reader, order, lambda raw: self._evaluated(raw, images), workers=workers, once=True, shared=workers > 0
        )

    def close(self) -> None:
        """End the processes that read for training."""
        if (loader := self._training_loader()) is not None:
            loader.close()

    def teardown(self, stage: str) -> None:
        self.close()

    def state_dict(self) -> dict[str, int]:
        """Where the training stands: epoch and batch."""
        loader = self._training_loader()
        return self._start if loader is None else loader.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """The next `train_dataloader` goes on from there."""
        self._start = state

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self.finish(batch) if isinstance(batch, RawBatch) else batch

    def finish(self, raw: RawBatch) -> Batch:
        """Views of a batch that has come from the workers, on `device`."""
        raw = raw.to(self.device, non_blocking=True)
        boxes, on_device = raw.boxes, self._views_in(raw.epoch)
        if self.engine == "cpu":
            views = on_device.normalize(raw.views)
        else:
            generator = torch.Generator(self.device).manual_seed(self._step_seed(raw))
            if boxes:
                views = on_device.photometric(raw.views, generator)
            else:
                pixels = None if raw.views else self._resident()
                views, boxes = on_device(raw.views[0] if pixels is None else pixels[raw.indices], generator)
        if self.curriculum is not None:
            views = [low_frequencies(view, self.curriculum.side(view.shape[-1], raw.epoch)) for view in views]
        order = torch.channels_last if self.channels_last else torch.contiguous_format
        views = [view.contiguous(memory_format=order) for view in views]
        return Batch(views, raw.indices, raw.labels, boxes, self._targets(raw, self.images))

    def _views_in(self, epoch: int) -> DeviceViews | DeviceBandViews:
        """The views of the device, as strong as they are in an epoch."""
        strength = 1.0 if self.curriculum is None else self.curriculum.strength(epoch)
        if strength == 1 or not any(view.graded for view in self.views):
            return self.device_views
        if strength not in self._weaker:
            weaker = [view.weakened(strength) for view in self.views]
            self._weaker[strength] = DeviceViews(weaker, compile=self._compile)
        return self._weaker[strength]

    def _targets(self, raw: RawBatch, images: ImageSet) -> Targets | None:
        """Those of the images of a batch, on `device`: they are too small to travel with them."""
        return None if images.targets is None else images.targets[raw.indices.cpu()].to(self.device)

    def _training_loader(self) -> Loader | None:
        return None if self._loader is None else self._loader()

    def _training_reader(self) -> Reader:
        if self.engine == "cpu" or self.images.pixels is None:
            whole = self.engine == "cpu"
            if self._bands is not None:
                return TrainingReader(self.images, CpuBandViews(self.views, self._bands, self.seed, photometric=whole))
            made = CpuViews(self.views, self.seed, photometric=whole)
            return TrainingReader(self.images, made, self.curriculum)
        return PixelReader(self.images, None if self._resident() is not None else self.images.pixels)

    def _resident(self) -> Tensor | None:
        """The images in the memory of `device`; None, said once, when they do not fit."""
        pixels, device = self.images.pixels, self.device
        assert pixels is not None
        if self._pixels is None and self._fits:
            if device.type == "cuda":
                free, _ = torch.cuda.mem_get_info(device)
                self._fits = pixels.nbytes <= free // 2
            if self._fits:
                self._pixels = pixels.to(device)
            else:
                log.warning(
                    f"The images of '{self.dataset.name}' take {pixels.nbytes / 2**30:.1f} GiB, more than half of what "
                    f"is free on {device}: they stay in main memory."
                )
        return self._pixels

    def _workers(self, reader: Reader, images: ImageSet) -> int:
        if isinstance(reader, PixelReader):
            return 0
        if self.num_workers == "auto":
            return 0 if images.in_memory else min(8, cores())
        return int(self.num_workers)

    def _step_seed(self, raw: RawBatch) -> int:
        """One number of 63 bits for the randomness of this step in this process."""
        state = np.random.SeedSequence([self.seed, raw.epoch, raw.step, rank()]).generate_state(1, np.uint64)
        return int(state[0] >> np.uint64(1))

    def _hand_over(self, raw: RawBatch) -> RawBatch | Batch:
        self._note(raw, self.images)
        return raw if self.trainer is not None else self.finish(raw)

    def _evaluated(self, raw: RawBatch, images: ImageSet) -> Batch:
        self._note(raw, images)
        raw = raw.to(self.device, non_blocking=True)
        pixels = raw.views[0]
        if self.dataset.bands is not None and pixels.dtype != torch.float32:  # as they lie in memory
            pixels = scaled(pixels)
        view = normalize(pixels, self.views[0].mean, self.views[0].std)
        return Batch([view], raw.indices, raw.labels, targets=self._targets(raw, images))

    def _note(self, raw: RawBatch, images: ImageSet) -> None:
        self.dataset.unreadable.add((images.name(index), reason) for index, reason in raw.skipped)

    def _progress(self) -> tuple[int, int] | None:
        """Batches of the epoch whose step the trainer has finished, and all it takes of an epoch."""
        if self.trainer is None:
            return None
        current: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        return int(current.processed), int(self.trainer.num_training_batches)
