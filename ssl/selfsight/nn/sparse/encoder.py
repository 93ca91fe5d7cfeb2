"""A backbone as masked modelling needs it: blind to the hidden cells, and giving its maps as a pyramid."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfsight.errors import UserError, nearest
from selfsight.nn.sparse.layers import Mask, MaskScope, convert
from selfsight.nn.sparse.packed import PackedMask, convert_packed

Engine = Literal["auto", "dense", "packed"]
ENGINES = ("auto", "dense", "packed")


@dataclass(frozen=True)
class Level:
    """One map of a backbone: the module that yields it (None: `forward_features`), its channels and its stride."""

    module: str | None
    channels: int
    stride: int


def levels_of(backbone: nn.Module, most: int) -> list[Level | None]:
    """The maps to reconstruct from, smallest first, each twice the size of the one before; None where one is missing.

    The smallest is what ``forward_features`` returns, so that the whole trunk learns. A stride of ``R`` leaves room
    for ``log2 R`` levels: a map as large as the image is not used.

    Raises:
        UserError: the backbone has no list of maps, or its stride is no power of two.
    """
    info = [entry for entry in getattr(backbone, "feature_info", None) or [] if entry.get("module")]
    kind = type(backbone).__name__
    if not info or not hasattr(backbone, "forward_features"):
        raise UserError(f"SparK needs a CNN that lists its feature maps (timm's `feature_info`); {kind} does not.")
    stride = int(info[-1]["reduction"])
    if stride < 2 or stride & (stride - 1):
        raise UserError(
            f"SparK needs a backbone whose total stride is a power of two, 2 or more; that of {kind} is {stride}."
        )
    deepest = {int(entry["reduction"]): entry for entry in info}
    levels: list[Level | None] = [Level(None, int(cast(Any, backbone).num_features), stride)]
    for i in range(1, min(most, int(math.log2(stride)))):
        entry = deepest.get(stride >> i)
        levels.append(None if entry is None else Level(entry["module"], int(entry["num_chs"]), stride >> i))
    return levels


class SparseEncoder:
    """A backbone that does not see the hidden cells; calling it gives its maps.

    Not a module: the backbone stays where it is in the model, converted in place. Parameters that no map depends on
    (a classifier's norm) are frozen, so that data-parallel training does not wait for their gradients.

    Args:
        backbone: any CNN with timm's interface.
        engine: ``dense`` computes every position and erases the hidden ones, ``packed`` computes the visible ones
            alone; ``auto`` packs wherever this gives the same maps.
        most_levels: how many maps at most.
        sync: BatchNorm statistics over all processes.
    Raises:
        UserError: the backbone cannot be made sparse; the sentence says which of its modules mixes cells.
    Attributes:
        stride: total stride R; one cell covers ``R x R`` pixels.
        levels: see `levels_of`.
        in_channels: of the images.
    """

    def __init__(
        self, backbone: nn.Module, *, engine: Engine = "auto", most_levels: int = 4, sync: bool = False
    ) -> None:
        if engine not in ENGINES:
            raise UserError(f"SparK's engine is '{engine}'; one of {', '.join(ENGINES)}.{nearest(engine, ENGINES)}")
        self.backbone, self.scope = backbone, MaskScope()
        self.forms = {"dense"}
        self.levels = levels_of(backbone, most_levels)
        self.stride = cast(Level, self.levels[0]).stride
        first = next((m for m in backbone.modules() if isinstance(m, nn.Conv2d)), None)
        if first is None:
            raise UserError(f"SparK needs a CNN; {type(backbone).__name__} has no convolution.")
        # a stem may fold blocks of pixels into the channels before its first convolution
        self.in_channels = first.in_channels if first.in_channels < 16 else 3
        convert(backbone, self.scope, sync=sync)
        modules = dict(backbone.named_modules())
        for name in [level.module for level in self.levels if level is not None and level.module is not None]:
            if name not in modules:
                raise UserError(
                    f"SparK cannot use {type(backbone).__name__}: it has no module '{name}' that gives a map."
                )
            module = modules[name]
            while isinstance(module, nn.Sequential):  # which checkpointing takes apart
                module = module[-1]
            module.register_forward_hook(partial(_tap, self.scope, name))
        if engine != "dense":
            convert_packed(backbone, self.scope)
        if not any(p.is_meta for p in backbone.parameters()):
            self._examine(engine)

    def mask(self, active: Tensor, keep: int | None = None) -> Mask:
        """The mask to call the encoder with.

        Args:
            active: bool ``[B, 1, f_h, f_w]``, True where visible.
            keep: visible cells of every image, where that is known and the same for all.
        """
        if not self.packs:
            return Mask(active, None if keep is None else len(active) * keep)
        if keep is None:
            counts = active.sum((1, 2, 3))
            keep = int(counts[0])
            if keep == 0 or bool((counts != keep).any()):
                if "dense" not in self.forms:
                    raise UserError(
                        f"SparK got a mask with unequal numbers of visible cells, and {type(self.backbone).__name__} "
                        "needs the same number in every image."
                    )
                return Mask(active)
        return PackedMask(active, keep)

    @property
    def packs(self) -> bool:
        """Whether masks with the same number of visible cells in every image travel packed."""
        return "packed" in self.forms

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Cells per column and row.

        Raises:
            UserError: the image does not divide into cells.
        """
        h, w = images.shape[-2:]
        if h % self.stride or w % self.stride:
            fitting = " x ".join(str(max(1, round(side / self.stride)) * self.stride) for side in (h, w))
            raise UserError(
                f"SparK got images of {h} x {w}, which do not divide into the {self.stride} x {self.stride} cells of "
                f"{type(self.backbone).__name__} (its total stride); {fitting} would."
            )
        return h // self.stride, w // self.stride

    def __call__(self, images: Tensor, mask: Mask) -> list[Tensor | None]:
        """Maps of the masked ``images [B, 3, H, W]``, smallest first, in the form of ``mask`` (see `Mask.dense`)."""
        h, w = images.shape[-2:]
        with self.scope.hiding(mask):
            deepest = cast(Any, self.backbone).forward_features(mask.hide(images))
            taps = self.scope.taps
        maps: list[Tensor | None] = []
        for level in self.levels:
            x = None if level is None else deepest if level.module is None else taps.get(level.module)
            if level is not None:
                expected = mask.shape(len(images), level.channels, h // level.stride, w // level.stride)
                if not isinstance(x, Tensor) or tuple(x.shape) != expected:
                    got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
                    name = level.module or "forward_features"
                    raise UserError(
                        f"SparK cannot use the maps of {type(self.backbone).__name__}: '{name}' gives {got} where a "
                        f"map of {list(expected)} belongs."
                    )
            maps.append(x)
        self.scope.recall_in_backward(mask, [x for x in maps if x is not None])
        return maps

    def _examine(self, engine: Engine) -> None:
        """Find out in which forms the backbone is blind to hidden cells, and freeze what no map depends on.

        The same visible cells are shown among few hidden ones and among more of them; a layer that looks at hidden
        cells, or counts them, answers differently. Packed maps have to equal the erased ones. Where those are no
        standard (attention over pooled maps), they have to equal the plain network's when nothing is hidden.
        """
        twin = copy.deepcopy(self)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in twin.backbone.parameters():
                if parameter.ndim <= 1 or not parameter.any():  # zero-initialised branches would hide what they do
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter))
        twin.backbone.eval()  # batch statistics of a handful of positions would amplify rounding
        like = next(twin.backbone.parameters())
        image = torch.randn(1, self.in_channels, 3 * self.stride, 4 * self.stride, generator=generator).to(like)
        canvas = F.pad(image, (0, self.stride))
        few = F.pad(torch.ones(1, 1, 1, 2, dtype=torch.bool, device=like.device), (1, 1, 1, 1))
        more = F.pad(few, (0, 1))
        everything = torch.ones_like(few)

        maps, problem = twin._blind([(image, Mask(few)), (canvas, Mask(more))])
        problems = {"dense": problem}
        if engine != "dense":
            packed = [(image, PackedMask(few, 2)), (canvas, PackedMask(more, 2))]
            fast, problem = twin._blind(packed[:1] if not problems["dense"] else packed)
            if not problem and not problems["dense"] and _any_differ(maps, fast, Mask(few)):
                problem = "packed and erased maps differ"
            if not problem and problems["dense"]:
                plain, problem = twin._blind([(image, Mask(everything))])
                whole, failed = twin._blind([(image, PackedMask(everything, everything.numel()))])
                problem = problem or failed
                if not problem and _any_differ(plain, whole, Mask(everything)):
                    problem = "packed maps differ from plain ones"
                maps = fast
            problems["packed"] = problem
        self.forms = {form for form, problem in problems.items() if not problem}
        if not self.forms or engine not in ("auto", *self.forms):
            raise UserError(
                f"SparK cannot use {type(self.backbone).__name__}: {problems.get(engine) or problems['dense']}. "
                "It takes CNNs of convolutions, normalisations, pooling and squeeze-and-excitation; MAE does for "
                "transformers what it does for them."
            )
        names, parameters = zip(*((n, p) for n, p in twin.backbone.named_parameters() if p.requires_grad), strict=True)
        gradients = torch.autograd.grad([x.square().sum() for x in maps], parameters, allow_unused=True)
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is None:
                self.backbone.get_parameter(name).requires_grad_(False)

    def _blind(self, trials: Sequence[tuple[Tensor, Mask]]) -> tuple[list[Tensor], str]:
        """The maps (dense) of the first trial, and what is wrong if the others give visible cells other values."""
        results = []
        for images, mask in trials:
            try:
                maps, seen = self._watched(images, mask)
            except UserError as error:
                return [], str(error).split(": ", 1)[-1].rstrip(".")
            except (RuntimeError, AssertionError, AttributeError, ValueError, TypeError, IndexError) as error:
                size = " x ".join(str(side) for side in images.shape[-2:])
                return [], f"its masked forward fails on images of {size} ({_first_line(error)})"
            results.append((maps, seen, mask))
        maps, seen, mask = results[0]
        for other_maps, other_seen, other in results[1:]:
            if any(_differ(a, mask, b, other) for a, b in zip(maps, other_maps, strict=True)):
                names = (name for name in seen if name in other_seen)
                culprit = next((n for n in names if _differ(seen[n], mask, other_seen[n], other)), "")
                kind = type(self.backbone.get_submodule(culprit)).__name__
                return maps, f"its module '{culprit}' ({kind}) mixes hidden cells with visible ones"
        return maps, ""

    def _watched(self, images: Tensor, mask: Mask) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The dense maps of ``images``, and what every module gave on the way, in the order of their end."""
        seen: dict[str, Tensor] = {}

        def record(name: str, module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim == 4 and mask.fits(*output.shape[-2:]):
                seen[name] = output.detach().clone()

        handles = [m.register_forward_hook(partial(record, n)) for n, m in self.backbone.named_modules()]
        try:
            maps = [mask.dense(x) for x in self(images, mask) if x is not None]
        finally:
            for handle in handles:
                handle.remove()
        return maps, seen


def _tap(scope: MaskScope, name: str, module: nn.Module, args: Any, output: Any) -> None:
    if scope.forward_pass:
        scope.taps[name] = output


def _differ(a: Tensor, mask_a: Mask, b: Tensor, mask_b: Mask) -> bool:
    """Whether two maps disagree in visible cells, or are not empty elsewhere."""
    if a.shape[:2] != b.shape[:2]:
        return True
    inside_a, inside_b = mask_a.at(*a.shape[-2:]), mask_b.at(*b.shape[-2:])
    rows_a, rows_b = (x.movedim(1, -1)[inside.squeeze(1)] for x, inside in ((a, inside_a), (b, inside_b)))
    leak = (a * ~inside_a).abs().max()
    return rows_a.shape != rows_b.shape or bool(
        torch.maximum((rows_a - rows_b).abs().max(), leak) > 2e-4 * rows_a.abs().max()
    )


def _any_differ(a: list[Tensor], b: list[Tensor], mask: Mask) -> bool:
    return any(_differ(x, mask, y, mask) for x, y in zip(a, b, strict=True))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
