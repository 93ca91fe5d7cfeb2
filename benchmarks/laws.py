"""How the cost of a part grows with its size: each a function that is measured at several sizes, with its exponent.

Times are of one thread's CPU, the least of some turns; memory is how far the process peaks above what it held before.
Bytes between processes are those that the kernel counts: what each process has written.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from turns import exact_heap, memory_mib, trim

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "growth.json"
PICTURES = HERE.parent / "docs" / "images" / "growth"
WIDTH = 128  #: of embeddings
TURNS = 3

Figures = dict[str, float]


@dataclass(frozen=True)
class Law:
    """
    Attributes:
        what: grows with ``size``; both in words. sizes: at which ``measured(size)`` gives its figures.
        fitted: the sizes from which on the exponent is fitted; below, what does not grow is the larger part.
    """

    what: str
    size: str
    sizes: tuple[int, ...]
    fitted: int
    measured: Callable[[int], Figures]


def costs(work: Callable[[], object]) -> Figures:
    """Seconds of CPU and MiB of memory of ``work``."""
    work()
    seconds = []
    for _ in range(TURNS):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    exact_heap()
    work()
    trim()
    before = memory_mib("VmRSS")
    work()
    return {"seconds": min(seconds), "mib": max(0.0, memory_mib("VmHWM") - before)}


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The slope of a line through ``values`` over ``sizes`` where both are logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


# --- what is measured -------------------------------------------------------------------------------------------------


def sinkhorn(prototypes: int) -> Figures:
    import torch

    from selfsight.losses.swav import sinkhorn

    scores = torch.rand(256, prototypes)
    return costs(lambda: sinkhorn(scores, epsilon=0.05, iterations=3))


def contrast(images: int, chunk: int | None) -> Figures:
    import torch

    from selfsight.losses.ntxent import ntxent

    z1, z2 = (torch.randn(images, WIDTH, requires_grad=True) for _ in range(2))
    return costs(lambda: ntxent(z1, z2, temperature=0.5, chunk_size=chunk).backward())


def dense(images: int) -> Figures:
    return contrast(images, None)


def chunked(images: int) -> Figures:
    return contrast(images, 256)


def simmatch(labelled: int) -> Figures:
    """Targets and instance loss of 64 unlabelled images beside a bank of labelled ones, as `SimMatch` has them."""
    import torch
    from torch import nn
    from torch.nn.functional import normalize

    from selfsight.losses.semi import aggregate, instance_consistency, log_similarity, unfold_log

    classes = 10
    bank, labels = normalize(torch.randn(labelled, WIDTH)), torch.arange(labelled) % classes
    p = torch.randn(64, classes).softmax(1)
    weak, strong = normalize(torch.randn(64, WIDTH)), nn.Parameter(normalize(torch.randn(64, WIDTH)))

    def work() -> None:
        with torch.no_grad():
            edges = log_similarity(weak, bank, 0.1)
            q = unfold_log(edges, p, labels)
            aggregate(edges.exp(), p, labels, 0.9)
        instance_consistency(strong, bank, q, 0.1).mean().backward()

    return costs(work)


#: of what processes exchange: images of each, values of the gradient, prototypes
LOCAL, PARAMETERS, PROTOTYPES = 64, 1_000_000, 3000


def exchanged(others: int) -> Figures:
    """Bytes that a process sends in `gather` with its backward, in SimCLR's loss, in Sinkhorn, and for a gradient."""
    import multiprocessing
    import tempfile

    processes = others + 1
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, context.Pool(processes) as pool:
        found = pool.starmap(_exchange, [(rank, processes, folder) for rank in range(processes)], chunksize=1)
    return {name: float(np.mean([of[name] for of in found])) for name in found[0]}


def _exchange(rank: int, processes: int, folder: str) -> Figures:
    import torch
    import torch.distributed as dist

    from selfsight.losses.ntxent import cross_view_logits, ntxent
    from selfsight.losses.swav import sinkhorn
    from selfsight.nn.distributed import gather

    def simclr() -> None:
        """The loss of both views, and what `SimCLRv2` tells of it."""
        ntxent(z, z2, temperature=0.5).backward()
        cross_view_logits(z, z2, temperature=0.5)

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=processes)
    z, z2 = (torch.randn(LOCAL, WIDTH, requires_grad=True) for _ in range(2))
    scores = torch.rand(LOCAL, PROTOTYPES)
    gradient = torch.randn(PARAMETERS)
    parts: dict[str, Callable[[], Any]] = {
        "gather_bytes": lambda: gather(z).sum().backward(),
        "simclr_bytes": simclr,
        "sinkhorn_bytes": lambda: sinkhorn(scores, epsilon=0.05, iterations=3),
        "gradient_bytes": lambda: dist.all_reduce(gradient),
    }
    found = {}
    for name, work in parts.items():
        work()  # connections are made
        dist.barrier()
        before = written()
        for _ in range(TURNS):
            work()
        found[name] = (written() - before) / TURNS
        dist.barrier()
    dist.destroy_process_group()
    return found


def written() -> int:
    """Bytes that this process has handed to the kernel, sockets included (Linux)."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["wchar"])


LAWS = {
    "sinkhorn": Law(
        "three iterations of Sinkhorn on 256 images", "prototypes", (100, 300, 1000, 3000, 10_000, 30_000), 1000,
        sinkhorn,
    ),
    "simclr_dense": Law(
        "SimCLR's loss and its gradient, dense", "images", (64, 128, 256, 512, 1024, 2048, 4096), 512, dense
    ),
    "simclr_chunked": Law(
        "SimCLR's loss and its gradient, 256 anchors at a time", "images", (64, 128, 256, 512, 1024, 2048, 4096), 512,
        chunked,
    ),
    "simmatch": Law(
        "SimMatch's targets and instance loss of 64 images", "labelled images", (1000, 3000, 10_000, 30_000, 100_000),
        10_000, simmatch,
    ),
    "exchanged": Law("what a process sends", "other processes", (1, 3, 7), 1, exchanged),
}  # fmt: skip


# --- what is kept and drawn -------------------------------------------------------------------------------------------

#: what one figure is of, where a law has figures of several things
OF_FIGURES = {"list_cpu_seconds": "listing a folder"}


def keep(name: str, what: str, size: str, points: list[tuple[int, Figures]], fitted: int = 0) -> None:
    """Put the figures of some sizes, and their exponents from the size ``fitted`` on, into ``results/growth.json``."""
    found = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    values = {key: [figures[key] for _, figures in points] for key in points[0][1]}
    late = [i for i, (at, _) in enumerate(points) if at >= fitted]
    sizes = [at for at, _ in points]
    exponents = {
        key: round(exponent([sizes[i] for i in late], [series[i] for i in late]), 3)
        for key, series in values.items()
        if len(late) > 1 and min(series[i] for i in late) > 0
    }
    found[name] = {"what": what, "size": size, "sizes": sizes, **values, "fitted_from": fitted, "exponents": exponents}
    RESULTS.write_text(json.dumps(found, indent=2) + "\n")


def measure(name: str) -> None:
    """Measure a law at its sizes, print each as it comes, and keep them."""
    law = LAWS[name]
    points = []
    for size in law.sizes:
        figures = law.measured(size)
        points.append((size, figures))
        print(f"{name} {size:>9,}  " + "  ".join(f"{key} {value:,.4g}" for key, value in figures.items()), flush=True)
    keep(name, law.what, law.size, points, law.fitted)


#: figure: its unit on an axis
UNITS = {
    "seconds": "s of a core",
    "mib": "MiB",
    "epoch_cpu_seconds": "s of a core",
    "list_cpu_seconds": "s of a core",
    "gather_bytes": "bytes",
    "simclr_bytes": "bytes",
    "sinkhorn_bytes": "bytes",
    "gradient_bytes": "bytes",
}
SIDE, TALL, LEFT, RIGHT, TOP, BOTTOM = 300, 196, 46, 16, 48, 30


def draw() -> None:
    """A picture of each curve that is kept."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    for name, kept in json.loads(RESULTS.read_text()).items():
        for key in (key for key in UNITS if key in kept):
            if min(kept[key]) > 0:
                named = OF_FIGURES.get(key, kept["what"])
                what = named + (f", {key.removesuffix('_bytes')}" if key.endswith("_bytes") else "")
                picture = panel(what, kept["size"], key, kept)
                (PICTURES / f"{name}-{key}.svg").write_text(picture, encoding="utf-8")


def panel(what: str, size: str, key: str, kept: dict[str, Any]) -> str:
    """Points with logarithmic axes, and the line of the exponent through those that it was fitted to."""
    sys.path.insert(0, str(HERE.parent / "docs" / "site"))
    import svg

    sizes, values, slope = kept["sizes"], kept[key], kept["exponents"].get(key)
    spans = [(np.floor(np.log10(min(of))), np.ceil(np.log10(max(of)))) for of in (sizes, values)]
    (low_x, high_x), (low_y, high_y) = ((low, max(high, low + 1)) for low, high in spans)

    def x(value: float) -> float:
        return LEFT + (SIDE - LEFT - RIGHT) * (np.log10(value) - low_x) / (high_x - low_x)

    def y(value: float) -> float:
        return TOP + (TALL - TOP - BOTTOM) * (high_y - np.log10(value)) / (high_y - low_y)

    title = what if what[1].isupper() else f"{what[0].upper()}{what[1:]}"  # kNN stays kNN
    body = [svg.text(8, 14, title, anchor="start", size=11)]
    body.append(svg.text(8, 30, f"{UNITS[key]}" + (f", exponent {slope:.2f}" if slope else ""), "soft", "start", 11))
    for power in range(int(low_y), int(high_y) + 1):
        at = y(10.0**power)
        body.append(f'<path d="M{LEFT} {at:.1f}H{SIDE - RIGHT}" stroke="var(--line)" stroke-width="1"/>')
        body.append(svg.text(LEFT - 5, at, short(10.0**power), "soft", "end", 10))
    for power in range(int(low_x), int(high_x) + 1):
        body.append(svg.text(x(10.0**power), TALL - 18, short(10.0**power), "soft", size=10))
    body.append(svg.text((LEFT + SIDE - RIGHT) / 2, TALL - 6, size, "soft", size=10))
    if slope is not None:
        late = [(a, b) for a, b in zip(sizes, values, strict=True) if a >= kept["fitted_from"]]
        middle = np.exp(np.mean([np.log(b) - slope * np.log(a) for a, b in late]))
        ends = [f"{x(a):.1f},{y(middle * a**slope):.1f}" for a in (late[0][0], late[-1][0])]
        body.append(f'<polyline points="{" ".join(ends)}" fill="none" stroke="var(--bad)" stroke-width="1.6"/>')
    body += [
        f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="3" fill="var(--good)"/>'
        for a, b in zip(sizes, values, strict=True)
    ]
    said = f"{what} by {size}: {values[0]:.3g} {UNITS[key]} at {sizes[0]:,}, {values[-1]:.3g} at {sizes[-1]:,}"
    return svg.document(SIDE, TALL, said, "\n".join(body), 12)


def short(value: float) -> str:
    """``1k`` for a thousand, ``1M`` for a million."""
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:g}{letter}"
    return f"{value:g}"
