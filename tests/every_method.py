"""Every method of the package, found, made and fed by itself: a new one is tested without being named."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn

import selfsight.methods
from selfsight.contracts import Batch, SemiBatch
from selfsight.errors import UserError
from selfsight.methods.base import Method
from selfsight.optim.recipe import OptimizationRecipe
from selfsight.optim.schedule import Clock, Constant

from .small import SmallNet, boxes_of

CLASSES, LABELLED, B = 3, 12, 12
IMAGES = B  # an epoch is a step and sees them all


def class_of(index: Tensor) -> Tensor:
    """Of the images ``index``: five, five and two of each, as a loss whose classes are even may have no gradient."""
    return index // 5 % CLASSES


#: what a data module tells of its images, and a part that comes from another run
FACTS: dict[str, Any] = {
    "num_classes": CLASSES,
    "num_images": IMAGES,
    "num_unlabelled": IMAGES,
    "labels": class_of(torch.arange(LABELLED)),
    "batch_size": B,
    "mean": [0.5] * 3,
    "std": [0.25] * 3,
    "targets": None,
}
#: of an argument that has one of these names, what makes a method small, or lets its state move in the first steps
SMALL: dict[str, Any] = {
    "bottleneck_dim": 6, "da_length": 3, "da_m": 0.9, "debias": 0.5, "debias_m": 0.9,
    "decoder_depth": 1, "decoder_dim": 16, "decoder_heads": 2,
    "decoder_width": 32, "dim": 5, "embedding_dim": 6, "expander": (7, 5), "freeze_last_layer_epochs": 1,
    "freeze_prototypes_steps": 1, "hidden_dim": 7, "K": 20, "kmeans_iterations": 3, "lambda_in": 1.0,
    "lambda_u": 1.0, "m": 0.9, "memory": 15, "num_prototypes": 7, "out_dim": 9, "predictor_dim": 6,
    "projection_dim": 4, "projector": (7, 5), "projector_dim": 7, "queue_batches": 0, "queue_length": 2 * B,
    "queue_start_epoch": 0, "slices": 8, "tau": 0.36, "topn": 4, "w_f": 0.1,
}  # fmt: skip


def every_method() -> list[type[Method]]:
    """All classes of `selfsight.methods` that learn."""
    found: list[type[Method]] = []
    for module in pkgutil.walk_packages(selfsight.methods.__path__, "selfsight.methods."):
        for thing in vars(importlib.import_module(module.name)).values():
            if inspect.isclass(thing) and issubclass(thing, Method) and thing.__module__ == module.name:
                found += [thing] if thing.training_step is not Method.training_step else []
    return sorted(found, key=lambda kind: kind.__name__)


def arguments(kind: type[Method]) -> dict[str, inspect.Parameter]:
    """Of its constructor, but the backbone."""
    taken = dict(inspect.signature(kind).parameters)
    del taken["backbone"]
    return taken


def told(kind: type[Method], **facts: Any) -> dict[str, Any]:
    """What a run tells the method: its `needs`, and a teacher where one comes from another run."""
    known = {**FACTS, **facts}
    teacher = {"teacher": SmallNet(CLASSES, norm=nn.Identity)}
    unsaid = (inspect.Parameter.empty, None)
    required = {name: teacher[name] for name, p in arguments(kind).items() if p.default in unsaid and name in teacher}
    return {**required, **{name: known[name] for name in kind.needs}}


def backbones() -> Iterator[nn.Module]:
    """From the smallest on; one of them suits every method."""
    yield SmallNet(norm=nn.Identity)
    yield timm.create_model("test_resnet", num_classes=0)
    yield timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=SIZES["vit"], depth=2, embed_dim=48)


SIZES = {"small": 16, "resnet": 96, "vit": 32}


def make(kind: type[Method], **changes: Any) -> tuple[Method, int]:
    """A small method with SGD and three steps of one epoch each behind it, and the side of the images it takes."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {}
    for name, parameter in arguments(kind).items():
        several = isinstance(parameter.default, tuple)
        if name in SMALL and not (isinstance(SMALL[name], tuple) and not several):  # `projector` may be a module
            settings[name] = [3, 4] if name == "num_prototypes" and several else SMALL[name]
    settings = {**settings, **told(kind), **changes}
    refusals = []
    for backbone, size in zip(backbones(), SIZES.values(), strict=True):
        try:
            method = kind(backbone, **settings)
        except (UserError, AttributeError) as error:
            refusals.append(str(error))
            continue
        sgd = partial(torch.optim.SGD, momentum=0.9, weight_decay=1e-4)
        schedules = {name: Constant(0.9) for name in kind.schedules}
        recipe = OptimizationRecipe(sgd, 0.05, schedules)
        return method.configure(recipe, Clock(examples=B, batch_size=B, epochs=4, steps_per_epoch=1)), size
    raise AssertionError(f"no backbone suits {kind.__name__}: {refusals}")


def without_batch_statistics(method: Method, *, but_synchronised: bool = False) -> Method:
    """Train mode, but for BatchNorm, which goes by its running statistics: no image sees the others of its batch.

    Norms that look over all processes by themselves may stay in train mode.
    """
    method.train()
    for module in method.modules():
        synchronised = but_synchronised and getattr(module, "sync", False)
        if "BatchNorm" in type(module).__name__ and not synchronised:
            module.eval()
    return method


def batch_of(method: Method, size: int, step: int) -> Batch | SemiBatch:
    """The whole batch of a step, drawn from the step alone; of both kinds where there are two."""
    g = torch.Generator().manual_seed(100 + step)
    fewest, most = method.n_views
    sides = [size] * fewest + ([size] if most is None else [])

    def part(images: int, n: int, count: int) -> Batch:
        index = torch.randperm(images, generator=g)[:n]
        patterns = torch.randn(CLASSES, 3, size, size, generator=torch.Generator().manual_seed(7))
        x = patterns[class_of(index)]
        views = [(x + 0.7 * torch.randn(x.shape, generator=g)).to(torch.get_default_dtype()) for _ in range(count)]
        return Batch(views, index, class_of(index), [boxes_of(n, g) for _ in range(count)])

    if method.few_labels:
        return SemiBatch(part(LABELLED, B, 1), part(IMAGES, B, len(sides)))
    return part(IMAGES, B, len(sides))


def share(batch: Batch | SemiBatch, k: int, parts: int) -> Batch | SemiBatch:
    """The ``k``-th of equal parts: of a process, or of the batches whose gradients add up."""
    if isinstance(batch, SemiBatch):
        return SemiBatch(_share(batch.labelled, k, parts), _share(batch.unlabelled, k, parts))
    return _share(batch, k, parts)


def _share(batch: Batch, k: int, parts: int) -> Batch:
    def cut(x: Tensor) -> Tensor:
        return x.chunk(parts)[k]

    assert batch.labels is not None
    assert batch.boxes is not None
    return Batch([cut(v) for v in batch.views], cut(batch.indices), cut(batch.labels), [cut(b) for b in batch.boxes])


@contextmanager
def draws_of_the_whole(step: int, k: int, parts: int) -> Iterator[None]:
    """`torch.rand` and `torch.randn` draw for the whole batch and give this part's rows: masks and the like stay those
    of their image, whoever has it."""
    g = torch.Generator().manual_seed(1000 + step)

    def drawing(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def drawn(*size: Any, **options: Any) -> Tensor:
            if options.get("generator") is not None:  # the same on all processes
                return draw(*size, **options)
            rows, *rest = size[0] if isinstance(size[0], (tuple, list, torch.Size)) else size
            options = {name: value for name, value in options.items() if name in ("dtype", "device")}
            return draw(parts * rows, *rest, generator=g, **options).chunk(parts)[k]

        return drawn

    before = torch.rand, torch.randn
    torch.rand, torch.randn = drawing(torch.rand), drawing(torch.randn)
    try:
        yield
    finally:
        torch.rand, torch.randn = before
