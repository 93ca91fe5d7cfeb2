"""An iterable over the batches of an epoch that can be stopped anywhere and taken up again."""

from __future__ import annotations

import gc
import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from selfsight.cpu_memory import keep_freed_memory
from selfsight.datamodules.loading.order import Order, Request, requests
from selfsight.datamodules.loading.reader import RawBatch


class Reader(Protocol):
    def __getitem__(self, request: Request) -> RawBatch: ...


class Loader:
    """The batches of one process; every iteration is one epoch, the first one from where `load_state_dict` left off.

    Args:
        reader: makes the batch of a request, in ``workers`` processes (0: in this one).
        order: order of the images.
        finish: last step of every batch, in this process.
        rank, world: this process and their number.
        device: accelerator that batches are brought to, see `ahead`; None leaves them in main memory.
        once: there will be one epoch; the worker processes end with it instead of waiting for the next one.
        shared: every batch is read by all worker processes together, not by one of them.
        progress: batches of the epoch that the consumer has finished and those it wants of an epoch, where it knows
            better than we do: an interrupted step is then repeated, not skipped.

    Attributes:
        waited: seconds for which batches were waited for so far, all epochs together.
    """

    def __init__(
        self,
        reader: Reader,
        order: Order,
        finish: Callable[[RawBatch], Any],
        *,
        workers: int,
        rank: int = 0,
        world: int = 1,
        device: torch.device | None = None,
        once: bool = False,
        shared: bool = False,
        progress: Callable[[], tuple[int, int] | None] = lambda: None,
    ) -> None:
        self.order, self.finish, self.progress = order, finish, progress
        self.rank, self.world = rank, world
        self.epoch = 0
        self.given = 0
        self.waited = 0.0
        self._resumed = True  # the first iteration does not advance the epoch
        self._reader, self._device = reader, device
        self._pin = device is not None and device.type != "cpu"
        self._workers = _Workers(reader, workers, self._pin, once) if workers else None
        self._parts = workers if shared else 1

    def __len__(self) -> int:
        return self.order.steps

    def __iter__(self) -> Iterator[Any]:
        if not self._resumed:
            self.epoch, self.given = self.epoch + 1, 0
        self._resumed = False
        batches = self._read(requests(self.order, self.epoch, self.given, self.rank, self.world))
        for raw in self._timed(batches if self._device is None else ahead(batches, self._device)):
            self.given += 1
            yield self.finish(raw)

    def _timed(self, batches: Iterator[RawBatch]) -> Iterator[RawBatch]:
        while True:
            began = time.perf_counter()
            raw = next(batches, None)
            self.waited += time.perf_counter() - began
            if raw is None:
                return
            yield raw

    def _read(self, steps: Iterator[Request]) -> Iterator[RawBatch]:
        if self._workers is None:
            for step in steps:
                raw = self._reader[step]
                yield raw.pin_memory() if self._pin else raw
            return
        read = self._workers.read(part for step in steps for part in step.parts(self._parts))
        while parts := list(itertools.islice(read, self._parts)):
            yield RawBatch.joined(parts)

    def close(self) -> None:
        """End the worker processes now; a further iteration starts others.

        Left to the garbage collector, they may be collected in a process that is forked later, and complain there.
        """
        if self._workers is not None:
            self._workers.close()

    def state_dict(self) -> dict[str, int]:
        done, wanted = self.progress() or (self.given, len(self))
        done = min(done, self.given)
        return {"epoch": self.epoch, "batch": done} if done < wanted else {"epoch": self.epoch + 1, "batch": 0}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.given, self._resumed = state["epoch"], state["batch"], True

    def from_epoch(self, epoch: int, batch: int = 0) -> Loader:
        """The next iteration is ``epoch``, from ``batch`` on; returns itself."""
        self.load_state_dict({"epoch": epoch, "batch": batch})
        return self


def ahead(batches: Iterator[RawBatch], device: torch.device) -> Iterator[RawBatch]:
    """The same batches on ``device``, each brought there while the one before it is still worked with.

    Copies have a stream of their own; who takes a batch waits for its copy alone, on the device.
    """
    backend = torch.get_device_module(device)
    copies = backend.Stream() if device.type == "cpu" else backend.Stream(device)

    def send(raw: RawBatch) -> tuple[RawBatch, Any]:
        with backend.stream(copies):
            return raw.to(device, non_blocking=True), copies.record_event()

    def receive(batch: RawBatch, arrived: Any) -> RawBatch:
        stream = backend.current_stream(device)
        stream.wait_event(arrived)
        batch.record_stream(stream)
        return batch

    coming = None
    for raw in batches:
        next_one = send(raw)
        if coming is not None:
            yield receive(*coming)
        coming = next_one
    if coming is not None:
        yield receive(*coming)


class _Workers:
    """Processes that read what the current epoch asks for."""

    def __init__(self, reader: Reader, workers: int, pin: bool, once: bool) -> None:
        self._current = _Current()
        self._loader = DataLoader(
            _Map(reader),
            batch_size=None,
            sampler=self._current,
            num_workers=workers,
            collate_fn=_unchanged,
            worker_init_fn=_start_worker,
            persistent_workers=not once,
            prefetch_factor=2,
            pin_memory=pin,
        )

    def read(self, steps: Iterator[Request]) -> Iterator[RawBatch]:
        self._current.steps = steps
        return iter(self._loader)

    def close(self) -> None:
        processes: Any = self._loader._iterator
        if processes is not None:
            processes._shutdown_workers()
            self._loader._iterator = None


class _Current:
    """Sampler over the requests of the epoch that runs now. It knows nothing of its loader, which then dies in time."""

    def __init__(self) -> None:
        self.steps: Iterator[Request] = iter(())

    def __iter__(self) -> Iterator[Request]:
        return self.steps


class _Map(Dataset[RawBatch]):
    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def __getitem__(self, request: Any) -> RawBatch:
        return self.reader[request]


def _start_worker(number: int) -> None:
    """Threads inside the processes would fight over the cores; Ctrl-C is the main process's to answer."""
    import cv2

    gc.freeze()  # what is garbage here is the main process's, and other loaders in it would complain
    keep_freed_memory()
    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _unchanged(batch: Any) -> Any:
    return batch


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
