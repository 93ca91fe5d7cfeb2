"""Tasks of which some start from others: several at a time, each in a process on its share of the cores."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.synchronize import Event
from typing import TypeVar

import torch

from selfsight.datamodules.loading.loader import cores
from selfsight.errors import UserError

T = TypeVar("T", bound=Hashable)
V = TypeVar("V")


def in_order(before: Mapping[T, T | None], work: Callable[[T], V], workers: int | None = None) -> Iterator[tuple[T, V]]:
    """Each task with what came of it, as it comes to its end; the first of the mapping are begun first.

    Args:
        before: of each task the one that has to be done first, a task of the mapping itself; None for none.
        work: a function that another process can import.
        workers: tasks at a time, one a core unless said; 1: in this process.

    Raises:
        UserError: a worker was killed, or a library in it has crashed; names the tasks that were being done.
    """
    workers = workers or cores()
    todo = list(before)
    if workers == 1:
        while todo:
            task = next(task for task in todo if before[task] not in todo)
            yield task, work(task)
            todo.remove(task)
        return
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    begin = (os.getpid(), max(1, cores() // workers), stop)
    with ProcessPoolExecutor(workers, context, _begin_worker, begin) as pool:
        running: dict[Future[V], T] = {}
        try:
            while todo:
                busy = running.values()
                ready = [task for task in todo if task not in busy and before[task] not in todo]
                for task in ready[: workers - len(running)]:
                    running[pool.submit(work, task)] = task
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    task, result = running[future], future.result()
                    del running[future]
                    yield task, result
                    todo.remove(task)
        except BrokenProcessPool as error:
            names = " or ".join(_title(task) for task in running.values())
            raise UserError(
                f"A process that was doing {names} has ended without a word, as one does that finds no memory left, "
                "is killed, or whose library crashes; what the others have written stays."
            ) from error
        except Exception:  # a task was refused: the others end now, and write no more
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
        except BaseException:  # Ctrl-C has reached them, too, and they save what they have
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _title(task: object) -> str:
    return " ".join(str(part) for part in task) if isinstance(task, tuple) else str(task)


def _begin_worker(parent: int, threads: int, stop: Event) -> None:
    """A worker outlives its parent, or the word to stop, by a second at most: the next command writes then."""
    torch.set_num_threads(threads)

    def watch() -> None:
        while os.getppid() == parent and not stop.is_set():
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
