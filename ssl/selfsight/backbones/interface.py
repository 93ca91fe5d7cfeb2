"""What all backbones share: timm's interface, maps out of any layout, sizes of images; and any module made one."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selfsight.contracts import Backbone
from selfsight.errors import UserError, nearest

#: how convolutions and pools say that nothing is left of an image
SHRUNK = ("Output size is too small", "Kernel size can't be greater")
EXTRA_TOKENS = 32  # more than any network puts before its patches


class PooledNet(nn.Module):
    """A network whose feature is the mean of its last map, with a linear ``classifier`` where there are classes.

    A subclass sets ``num_features``, ``feature_info`` and the classifier (`reset_classifier`), and gives the map.
    """

    num_features: int
    feature_info: list[dict[str, Any]]
    drop_rate = 0.0  # of the pooled feature

    def forward_features(self, x: Tensor) -> Tensor:
        """``[B, in_chans, H, W]`` to ``[B, num_features, h, w]``."""
        raise TypeError(f"{type(self).__name__} has to define forward_features")

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Global mean, ``[B, num_features]``; the classifier's logits where there is one and ``pre_logits`` is off."""
        pooled = F.dropout(x.mean((2, 3)), self.drop_rate, self.training)
        return pooled if pre_logits else self.classifier(pooled)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        return self.classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Another classifier; 0 classes: none."""
        self.num_classes = num_classes
        self.classifier = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()


def feature_map(backbone: nn.Module, images: Tensor) -> Tensor:
    """The last map of ``images [B, C, H, W]``: ``[B, num_features, h, w]``, whatever layout the network keeps it in.

    Raises:
        UserError: the network gives no map.
    """
    return to_map(backbone, cast(Backbone, backbone).forward_features(images), images.shape[-2:])


def to_map(backbone: nn.Module, x: Tensor, size: Sequence[int], stage: str | None = None) -> Tensor:
    """What a network, or one of its stages, made of images of ``size`` (H, W), as a map ``[B, D, h, w]``.

    Maps ``[B, h, w, D]`` are turned, tokens ``[B, n + h w, D]`` are laid out as they lie in the image, without the n
    that stand for no place in it (class, distillation and register tokens come first).

    Args:
        stage: a module of ``feature_info``; None: x is what ``forward_features`` returned.

    Raises:
        UserError: x is no map, or its tokens do not fill the image.
    """
    stages = stages_of(backbone)
    entry = stages[stage] if stage is not None else next(reversed(stages.values()), None)
    kind = type(backbone).__name__
    if isinstance(x, Tensor) and x.ndim == 4:
        D = getattr(backbone, "num_features", None) if stage is None or entry is None else entry["num_chs"]
        last_is_channels = x.shape[3] == D and (x.shape[1] != D or getattr(backbone, "output_fmt", "") == "NHWC")
        return x.permute(0, 3, 1, 2) if last_is_channels else x
    if not isinstance(x, Tensor) or x.ndim != 3:
        got = list(x.shape) if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise UserError(
            f"{kind} gives no feature map, which is needed here: its {stage or 'last'} output is {got} and not "
            "[B, D, h, w]."
        )
    h, w = grid(backbone, x.shape[1], size, None if entry is None else entry["reduction"])
    return x[:, x.shape[1] - h * w :].transpose(1, 2).unflatten(2, (h, w))


def stages_of(backbone: nn.Module) -> dict[str, dict[str, Any]]:
    """The entries of ``feature_info`` by module, from the stem upwards; empty where a network lists none."""
    return {entry["module"]: entry for entry in getattr(backbone, "feature_info", [])}


def grid(backbone: nn.Module, tokens: int, size: Sequence[int], reduction: int | None) -> tuple[int, int]:
    """Rows and columns of the patches among ``tokens``; the rest of them come first and are no patches.

    Raises:
        UserError: no grid of the image's shape fits.
    """
    H, W = size
    prefix = getattr(backbone, "num_prefix_tokens", None)
    if reduction:
        h, w = (math.ceil(side / reduction) for side in size)
        if 0 <= tokens - h * w < EXTRA_TOKENS:
            return h, w
    else:
        for extra in range(EXTRA_TOKENS) if prefix is None else (int(prefix), 0):
            h = round(math.sqrt(max(tokens - extra, 0) * H / W))
            if h and h * round(h * W / H) == tokens - extra:
                return h, round(h * W / H)
    raise UserError(
        f"{type(backbone).__name__} gives {tokens} tokens for images of {H} x {W}, which are no map of them; dense "
        "features need a network whose tokens are patches of the image."
    )


def works_on_tokens(backbone: nn.Module) -> bool:
    """Whether what a network makes of an image is a row of tokens ``[B, N, D]``, and no map."""
    twin, side = cast(Backbone, copy.deepcopy(backbone).to("meta").eval()), usual_size(backbone)
    try:
        x = twin.forward_features(torch.empty(2, channels(backbone), side, side, device="meta"))
    except Exception:  # of images, or on a device, that it does not know: others will say so
        return False
    return isinstance(x, Tensor) and x.ndim == 3


def usual_size(backbone: nn.Module) -> int:
    """Side of the square images a network was built for; 224 where it does not say."""
    return int(getattr(backbone, "image_size", None) or config_of(backbone).get("input_size", (3, 224, 224))[-1])


def config_of(backbone: nn.Module) -> Mapping[str, Any]:
    """What timm knows of how a network was published; empty for others."""
    return getattr(backbone, "pretrained_cfg", None) or {}


def channels(backbone: nn.Module) -> int:
    """Channels of the images a network takes; 3 where it does not say."""
    return int(getattr(backbone, "in_chans", 3))


def wrap(
    module: nn.Module,
    num_features: int | None = None,
    feature_info: Sequence[Mapping[str, Any]] | None = None,
    *,
    image_size: int = 64,
    in_chans: int = 3,
) -> Backbone:
    """Any network as a backbone: ``module`` itself, with what it lacks of `selfsight.contracts.Backbone` put on it.

    Its names in a state dict stay as they are. ``module(images)`` may give features ``[B, D]``, or a map
    ``[B, D, h, w]``, which is then averaged. What is not said is read from one forward of a copy: D, and as stages
    those of its direct children that give maps, the last one of each size.

    Args:
        num_features: D. feature_info: the stages, as timm lists them.
        image_size, in_chans: of the images, for that forward.

    Raises:
        UserError: the module gives neither of both, other features than it says, or refuses such images.

    Example:
        ``wrap(nn.Sequential(*list(torchvision.models.resnet18().children())[:-2]))``
    """
    if not isinstance(module, nn.Module):
        raise UserError(f"A backbone is a torch.nn.Module, and a {type(module).__name__} was given.")
    if isinstance(module, Backbone) and num_features is None and feature_info is None:
        if not hasattr(module, "in_chans"):
            module.in_chans = in_chans  # type: ignore[assignment]
        return module
    kind = type(module).__name__
    output, stages = _tried(module, in_chans, image_size)
    if not isinstance(output, Tensor) or output.ndim not in (2, 4):
        got = list(output.shape) if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise UserError(f"A backbone gives features [B, D] or a map [B, D, h, w]; {kind} gives {got}.")
    said = num_features or getattr(module, "num_features", None)
    if said is not None and said != output.shape[1]:
        raise UserError(f"{kind} gives {output.shape[1]} features, and num_features says {said}.")
    if output.ndim == 4:
        module.register_forward_hook(_average)
    if not hasattr(module, "forward_features"):
        # the map, where it gives one: without the hook
        module.forward_features = module.forward  # type: ignore[assignment]
    module.num_features = output.shape[1]  # type: ignore[assignment]
    if feature_info is not None:
        stages = [dict(entry) for entry in feature_info]
    if feature_info is not None or not hasattr(module, "feature_info"):
        module.feature_info = stages  # type: ignore[assignment]
    module.image_size, module.in_chans = image_size, in_chans  # type: ignore[assignment]
    return cast(Backbone, module)


def _average(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output.mean((2, 3))


def _tried(module: nn.Module, in_chans: int, image_size: int) -> tuple[Any, list[dict[str, Any]]]:
    """What a copy of the module makes of images, and its stages.

    Tried without memory on large images, whose maps can be told apart, and on those of ``image_size``, and at last on
    real ones: a module may be fixed to a size, or compute what the meta device cannot.
    """
    for device, side in (("meta", 224), ("meta", image_size), ("cpu", image_size)):
        twin = copy.deepcopy(module).to(device).eval()
        maps: dict[str, Any] = {}
        for name, child in twin.named_children():
            child.register_forward_hook(partial(_keep, maps, name))
        try:
            with torch.no_grad(), torch.device(device):
                output = twin(torch.zeros(2, in_chans, side, side))
        except Exception as error:  # it is somebody's own code
            complaint = error
            continue
        found = {
            round(side / x.shape[-1]): {"module": name, "num_chs": x.shape[1]}
            for name, x in maps.items()
            if isinstance(x, Tensor) and x.ndim == 4 and len(x) == 2 and 1 < x.shape[-1] <= side
        }
        return output, [{**entry, "reduction": reduction} for reduction, entry in found.items()]
    raise UserError(
        f"{type(module).__name__} cannot be used as a backbone: images of {image_size} x {image_size} pixels make it "
        f"fail ({one_line(complaint)})."
    ) from complaint


def _keep(maps: dict[str, Any], name: str, module: nn.Module, args: Any, output: Any) -> None:
    maps[name] = output


def freeze_beyond_the_map(backbone: nn.Module) -> None:
    """Freeze what the last map does not depend on, such as a norm after pooling.

    A method that reads maps alone gives it no gradient, and data-parallel training would wait for one. Found on a copy
    without memory.
    """
    twin = copy.deepcopy(backbone).to("meta").requires_grad_(True)
    side = usual_size(backbone)
    last = feature_map(twin, torch.empty(2, channels(backbone), side, side, device="meta"))
    if last.requires_grad:
        last.sum().backward()
    for name, parameter in twin.named_parameters():
        if parameter.grad is None:
            backbone.get_parameter(name).requires_grad_(False)


def check_sizes(backbone: nn.Module, sizes: Iterable[int]) -> None:
    """Refuse images of some ``sizes`` (sides of squares) before training does: tried on a copy without memory.

    Raises:
        UserError: one of them is too small, does not divide into patches, or the network takes images of one size.
    """
    twin = copy.deepcopy(backbone).to("meta").eval()
    sizes = sorted(set(sizes))
    found = {size: _complaint(twin, size) for size in sizes}
    if failed := {size: complaint for size, complaint in found.items() if complaint is not None}:
        raise UserError(_refused(twin, sizes, failed))


def _complaint(twin: nn.Module, size: int) -> str | None:
    """How a network on the meta device refuses images of ``size``; None where it takes them.

    Raises:
        UserError: its own.
    """
    try:
        twin(torch.empty(2, channels(twin), size, size, device="meta"))
    except (UserError, NotImplementedError) as error:
        if isinstance(error, UserError):
            raise
    except Exception as error:  # networks fail on sizes in many ways, asserts and shapes among them
        return one_line(error).rstrip(".")
    return None  # it ran, or something in it does not know the meta device


def _refused(twin: nn.Module, sizes: Sequence[int], failed: Mapping[int, str]) -> str:
    kind, size = type(twin).__name__, min(failed)
    patch, published = patch_side(twin), int(config_of(twin).get("input_size", (3, 0, 0))[-1])
    if patch and size % patch:
        return (
            f"Views of {size} x {size} pixels do not divide into the patches of {patch} x {patch} that {kind} cuts "
            f"images into: set the size of these views to a multiple of {patch}, or backbone.patch_size to a divisor "
            f"of {size}."
        )
    if len(failed) < len(sizes):
        works = [size for size in sizes if size not in failed]
        return (
            f"{kind} takes images of {works[0]} x {works[0]} pixels and the views have sides of "
            f"{' and '.join(map(str, sizes))} ({failed[size]}): take views of one size, or a network that takes "
            "several, such as a ResNet, ConvNeXt, ViT, Swin or XCiT."
        )
    shrunk = any(sign in failed[size] for sign in SHRUNK)
    if published and not shrunk and published not in failed and _complaint(twin, published) is None:
        return (
            f"{kind} takes images of {published} x {published} pixels and not of {size} x {size} ({failed[size]}): "
            f"set dataset.image_size={published}, or take a network for small images."
        )
    return (
        f"Views of {size} x {size} pixels shrink to nothing inside this backbone, or do not fit it "
        f"({failed[size]}); take larger views (dataset.image_size=) or a backbone that shrinks less "
        "(backbone.stem=cifar for ResNets, backbone.patch_size= for transformers)."
    )


def patch_side(backbone: nn.Module) -> int | None:
    """Side of the patches a transformer cuts images into; None where it does not say."""
    size = getattr(getattr(backbone, "patch_embed", None), "patch_size", None)
    return max(size) if isinstance(size, (tuple, list)) else size


def one_line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


def taken(kind: str, known: Collection[str], pretrained: bool, options: dict[str, Any]) -> dict[str, Any]:
    """The options among ``known``. timm hands every model the same ones; those at zero or None ask for nothing.

    Args:
        kind: of the network, with its article, for the sentence.

    Raises:
        UserError: an option the network does not have, or pretrained weights, which do not exist.
    """
    if pretrained:
        raise UserError(f"No pretrained weights exist for {kind}; leave backbone.pretrained at false.")
    for name, value in options.items():
        if value and name not in known:
            raise UserError(f"{kind} has no option '{name}'; it knows {', '.join(known)}.{nearest(name, known)}")
    return {name: value for name, value in options.items() if name in known}
