"""Frozen features: what every evaluator works on. Extracted once, un-augmented, with the backbone in eval mode."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from selfsight.backbones.interface import SHRUNK, feature_map, stages_of, to_map
from selfsight.contracts import Targets
from selfsight.errors import UserError, nearest
from selfsight.evaluation.rows import Writing
from selfsight.nn.vit import is_vit, last_tokens

Device = torch.device | str | None
FINAL = "final"
PROJECTION = "projection"
TOKEN_AVG = "token-avg"


@dataclass(frozen=True)
class Features:
    """Features of ``N`` images.

    Attributes:
        x: ``[N, D]`` float32; of very many images float16 in a file, see `rows`.
        labels: ``[N]`` int64, or None where the images have none.
        indices: ``[N]`` int64, position of each image in its data set.
        names: of the images, where somebody has asked for them; else empty.
        targets: several labels or numbers of each image, in place of a class; None where there are none.
        file: that ``x`` lies in, where it has one.
    """

    x: Tensor
    labels: Tensor | None
    indices: Tensor
    names: tuple[str, ...] = ()
    targets: Targets | None = None
    file: Path | None = None

    def __len__(self) -> int:
        return len(self.x)

    @property
    def classes(self) -> int:
        """Number of classes, counted as the largest label plus one."""
        return int(self.known_labels.max()) + 1

    @property
    def known_labels(self) -> Tensor:
        """``[N]`` int64; UserError where there are none."""
        if self.labels is None:
            raise UserError(
                "These images have no labels, which this evaluator needs: use class folders, or label-free figures "
                "such as the effective rank and the kNN of views."
            )
        return self.labels

    @property
    def large(self) -> bool:
        """Whether they are to be looked at block by block."""
        return self.x.dtype == torch.float16

    def in_memory(self) -> Features:
        """The same in memory, in single precision."""
        return replace(self, x=self.x.float(), file=None) if self.large else self

    def take(self, rows: Tensor) -> Features:
        """The features of some rows (``[n]`` int64 or ``[N]`` bool)."""
        names = tuple(self.names[i] for i in torch.arange(len(self))[rows].tolist()) if self.names else ()
        labels = None if self.labels is None else self.labels[rows]
        targets = None if self.targets is None else self.targets[rows]
        return Features(self.x[rows], labels, self.indices[rows], names, targets)

    def to(self, device: Device) -> Features:
        """On ``device``; None is the GPU where there is one, else where the features are."""
        if device is None:
            device = "cuda" if torch.cuda.is_available() else self.x.device
        labels = None if self.labels is None else self.labels.to(device)
        targets = None if self.targets is None else self.targets.to(device)
        return Features(self.x.to(device), labels, self.indices.to(device), self.names, targets)


def checked(train: Features, test: Features, *, labels: bool = True, blocks: bool = False) -> tuple[Features, Features]:
    """Features an evaluator can use; where labels or targets matter, those of the images that have some.

    Args:
        blocks: leave those of very many images where they are, see `rows`.

    Features so large or small that their squares overflow or vanish come back in another unit.

    Raises:
        UserError: no images, not finite, two widths, no labels, a single class.
    """
    if not blocks:
        train, test = train.in_memory(), test.in_memory()
    if labels:
        train, test = (_labelled(features) for features in (train, test))
    for name, features in (("training", train), ("test", test)):
        if len(features) == 0:
            raise UserError(f"The {name} set has no{' labelled' * labels} images: check dataset.root.")
        if not all(bound.isfinite() for bound in features.x.aminmax()):  # one pass and no copy, where all is well
            bad = int((~torch.isfinite(features.x)).any(dim=1).sum())
            raise UserError(
                f"{bad} of {len(features)} {name} features are NaN or infinite, so the backbone has diverged: take an "
                "earlier checkpoint, or train again with a lower learning rate."
            )
    if train.x.shape[1] != test.x.shape[1]:
        raise UserError(
            f"Training features have {train.x.shape[1]} dimensions and test features {test.x.shape[1]}: extract both "
            "with the same backbone and stage."
        )
    if labels and train.targets is None and len(train.known_labels.unique()) < 2:
        raise UserError(
            f"All {len(train)} training images carry one label, and telling classes apart takes two: check the class "
            "folders."
        )
    return _squarable(train, test)


def _squarable(train: Features, test: Features) -> tuple[Features, Features]:
    """Both divided by the largest training entry, where squares of such entries are no numbers of float32 any more.

    No evaluator asks for the unit of the features.
    """
    largest = float(max(bound.abs() for bound in train.x.aminmax()))
    if train.large or test.large:  # such entries are not kept in half precision
        return train, test
    if largest == 0 or 1e-15 < largest < 1e15:
        return train, test
    return replace(train, x=train.x / largest), replace(test, x=test.x / largest)


def _labelled(features: Features) -> Features:
    labelled = features.known_labels >= 0 if features.targets is None else features.targets.known
    return features if bool(labelled.all()) else features.take(labelled)


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Eval mode and no gradient inside; every module's own training flag is put back afterwards, one by one."""
    flags = [(part, part.training) for module in modules for part in module.modules()]
    try:
        for module in modules:
            module.eval()
        for part, _ in flags:
            if part.training:  # a `train()` that refuses would let BatchNorm learn from the test set
                raise UserError(f"{type(part).__name__} stays in training mode after eval(): let its train() obey.")
        with torch.no_grad():
            yield
    finally:
        for part, flag in flags:
            part.training = flag


def stage_names(backbone: nn.Module) -> list[str]:
    """Names accepted as stages: every module of ``feature_info`` from the stem upwards, then ``final``."""
    return [*stages_of(backbone), FINAL]


def missing_labels(data: Any, *, targets: bool = False) -> str:
    """What keeps a data set from being measured by its labels, in a few words; nothing where nothing does.

    Args:
        data: an `ImageData`: accuracies take labelled images to learn from and labelled ones held out.
        targets: whether several labels or numbers are as good as a class.
    """
    for name, images in (("training", data.train), ("test", data.test)):
        if images is None or not len(images):
            return f"data set '{data.name}' has no {name} images"
        if images.targets is not None and not targets:
            return f"the {name} images of data set '{data.name}' have {images.targets}, in place of one class each"
        if images.known is None or not bool(images.known.any()):
            return f"the {name} images of data set '{data.name}' have no labels"
    return ""


def extract(
    backbone: nn.Module,
    loader: Iterable[Any],
    device: Device = None,
    stages: Sequence[str] = (FINAL,),
    *,
    head: nn.Module | None = None,
    images: int | None = None,
    files: Mapping[str, Path] | None = None,
) -> dict[str, Features]:
    """Features of every image a loader yields, once, for each stage asked for.

    Args:
        backbone: timm interface. Its training flags are as before when this returns.
        loader: yields `Batch` with one un-augmented view.
        device: where to compute; default: where the backbone's parameters are. The features come back on the CPU.
        stages: see `staged`.
        head: the projector, for ``"projection"``.
        images: how many there are at most; of very many the features are kept in files, see `rows`.
        files: which these are, by stage; None: files that end with the process.

    Returns:
        `Features` by stage.
    """
    device, dtype = home(backbone, device), next(backbone.parameters()).dtype
    kept = {stage: Writing(images, (files or {}).get(stage)) for stage in stages}
    labels: list[Tensor] = []
    indices: list[Tensor] = []
    targets: list[Targets] = []
    with staged(backbone, stages, head=head) as outputs:
        for batch in loader:
            if not len(batch):  # every file of it was unreadable
                continue
            for stage, x in outputs(batch.views[0].to(device, dtype, non_blocking=True)).items():
                kept[stage].add(x)
            indices.append(batch.indices.cpu())
            if batch.labels is not None:
                labels.append(batch.labels.cpu())
            if batch.targets is not None:
                targets.append(batch.targets.to("cpu"))
    if not indices:
        raise UserError("There are no images to extract features from: check dataset.root.")
    index = torch.cat(indices)
    label = torch.cat(labels).long() if labels else None
    if label is not None and bool((label < 0).all()):
        label = None
    of = Targets.joined(targets) if targets else None
    return {stage: Features(rows.result(), label, index, (), of, rows.kept) for stage, rows in kept.items()}


@contextmanager
def staged(
    backbone: nn.Module, stages: Sequence[str], *, head: nn.Module | None = None, maps: bool = False
) -> Iterator[Callable[[Tensor], dict[str, Tensor]]]:
    """From images ``[B, 3, H, W]`` to what each stage makes of them, everything frozen.

    Args:
        stages: ``"final"`` (the network's output), module names out of ``feature_info`` (averaged over the image, the
            tokens of a transformer that stand for no place left out), ``"last2"``, ``"last3"``, ... (those last stages
            side by side), ``"token1"``, ``"token4"``, ... (class tokens of a vision transformer's last blocks side by
            side, normalised), ``"token-avg"`` (class token and mean patch of its last block), ``"projection"`` (after
            ``head``).
        maps: give maps ``[B, D, h, w]`` instead of ``[B, D]``; of ``"final"`` and of modules alone.

    Raises:
        UserError: no such stage, or one without a map.
    """
    tokens = {stage: asked for stage in stages if (asked := _tokens(backbone, stage, maps)) is not None}
    made_of = {stage: [stage] if stage in tokens else _parts(backbone, stage, head, maps) for stage in stages}
    names = {name for parts in made_of.values() for name in parts} - {FINAL, PROJECTION, *tokens}
    size: Sequence[int] = ()

    def keep(name: str, x: Tensor) -> Tensor:
        found = to_map(backbone, x, size, name)
        return found if maps else pooled(found)

    with frozen(backbone, *([] if head is None else [head])), tapped(backbone, names, keep) as caught:

        def outputs(images: Tensor) -> dict[str, Tensor]:
            nonlocal size
            size = images.shape[-2:]
            with large_enough(images):
                if len(tokens) < len(made_of):  # these look into the blocks in a pass of their own
                    caught[FINAL] = feature_map(backbone, images) if maps else pooled(backbone(images))
                for stage, (blocks, average) in tokens.items():
                    caught[stage] = last_tokens(backbone, images, blocks, average=average)  # type: ignore[arg-type]
            if PROJECTION in made_of and head is not None:
                caught[PROJECTION] = head(caught[FINAL])
            parts = {stage: [caught[part] for part in of] for stage, of in made_of.items()}
            return {stage: of[0] if len(of) == 1 else torch.cat(of, dim=1) for stage, of in parts.items()}

        yield outputs


@contextmanager
def tapped(
    backbone: nn.Module, names: Iterable[str], keep: Callable[[str, Tensor], Tensor] = lambda _, x: x
) -> Iterator[dict[str, Tensor]]:
    """The outputs of modules named in ``feature_info``, by name, as left by the latest forward pass.

    ``keep`` is applied at once, before a later in-place operation can change the output. A compiled network runs
    uncompiled meanwhile: what it was compiled to before knows nothing of these modules.
    """
    caught: dict[str, Tensor] = {}
    handles = [_hook(backbone, name, caught, keep) for name in names]
    try:
        with torch.compiler.set_stance("force_eager") if handles else nullcontext():
            yield caught
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def large_enough(images: Tensor) -> Iterator[None]:
    """Turns the many ways in which networks fail on images ``[B, 3, H, W]`` too small for them into one sentence."""
    try:
        yield
    except RuntimeError as error:
        if not any(sign in str(error) for sign in SHRUNK):
            raise
        raise UserError(
            f"Images of {images.shape[3]} x {images.shape[2]} pixels are too small for this network, whose maps shrink "
            "to nothing: raise dataset.image_size, or take a network with backbone.stem=cifar."
        ) from None


def pooled(x: Tensor) -> Tensor:
    """Average over space: ``[B, C, h, w]`` -> ``[B, C]``; ``[B, C]`` as it is."""
    return x.flatten(2).mean(dim=2) if x.ndim > 2 else x


def home(module: nn.Module, device: Device) -> torch.device:
    """``device``, or where the module's parameters are."""
    return torch.device(device) if device is not None else next(module.parameters()).device


def _parts(backbone: nn.Module, stage: str, head: nn.Module | None, maps: bool) -> list[str]:
    """The outputs one stage is made of."""
    modules = list(stages_of(backbone))
    if stage == FINAL or stage in modules:
        return [stage]
    several = stage.startswith("last") and stage[4:].isdigit()
    if maps and (several or stage == PROJECTION):
        raise UserError(f"The stage '{stage}' is no map; take one of {', '.join(stage_names(backbone))}.")
    if stage == PROJECTION:
        if head is None:
            raise UserError("The stage 'projection' comes after a projector, and there is none.")
        return [PROJECTION]
    if several:
        n = int(stage[4:])
        if not 1 <= n <= len(modules):
            raise UserError(
                f"'{stage}' asks for {n} stages, and this backbone has {len(modules)}: {', '.join(modules)}."
            )
        return modules[-n:]
    of_tokens = ["token4", TOKEN_AVG] if is_vit(backbone) else []
    choices = stage_names(backbone) if maps else [*modules, FINAL, PROJECTION, "last2", *of_tokens]
    raise UserError(f"'{stage}' is no stage of this backbone ({', '.join(choices)}).{nearest(stage, choices)}")


def _tokens(backbone: nn.Module, stage: str, maps: bool) -> tuple[int, bool] | None:
    """How many last blocks' class tokens a stage is, and whether the mean patch is in it; None for other stages."""
    if stage in stages_of(backbone) or not (stage == TOKEN_AVG or (stage[:5] == "token" and stage[5:].isdigit())):
        return None
    if maps:
        raise UserError(f"The stage '{stage}' is no map; take one of {', '.join(stage_names(backbone))}.")
    if not is_vit(backbone) or getattr(backbone, "cls_token", None) is None:
        raise UserError(
            f"'{stage}' asks for class tokens, which vision transformers (vit_*, deit_*) have and this "
            f"{type(backbone).__name__} has not: take final or last2."
        )
    blocks, depth = 1 if stage == TOKEN_AVG else int(stage[5:]), len(cast(Sized, backbone.blocks))
    if not 1 <= blocks <= depth:
        raise UserError(
            f"'{stage}' asks for {blocks} class tokens, and this backbone has {depth} blocks: take token{depth}."
        )
    return blocks, stage == TOKEN_AVG


def _hook(
    backbone: nn.Module, name: str, caught: dict[str, Tensor], keep: Callable[[str, Tensor], Tensor]
) -> torch.utils.hooks.RemovableHandle:
    module = backbone.get_submodule(name)
    if stages_of(backbone)[name].get("hook_type") == "forward_pre":
        return module.register_forward_pre_hook(lambda _, args: caught.__setitem__(name, keep(name, args[0])))
    return module.register_forward_hook(lambda _, __, output: caught.__setitem__(name, keep(name, output)))
