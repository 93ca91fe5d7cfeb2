"""Backbones by name: everything in timm, and ours registered beside it.

A backbone has timm's interface without a classifier (`selfsight.contracts.Backbone`): ``forward(x)`` gives
``[B, num_features]`` (the mean of the last map, or the class token; normalised where the network does so),
``forward_features(x)`` that map or the tokens, which `interface.feature_map` makes ``[B, num_features, h, w]`` of any
layout, and ``feature_info`` says of every stage its module, its channels and by how much it is smaller than the image.
Sizes are read, never found by trying an image.

A file in this folder adds a network with timm's ``@register_model``. If its function has an argument ``stem``, the
network builds its own small-image stem; otherwise `create` knows the one of timm's ResNets.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from typing import Any, cast

import timm
from timm.models.resnet import ResNet
from torch import Tensor, nn

import selfsight.backbones
from selfsight.backbones.interface import one_line
from selfsight.backbones.published import without_hub
from selfsight.contracts import Backbone
from selfsight.errors import UserError, nearest

STEMS = ("imagenet", "cifar", "cifar_pad2")
POOLS = ("token", "avg")
REFUSALS = (OSError, RuntimeError, TypeError, ValueError, AssertionError, ZeroDivisionError)  # of constructors
RESIZES_ITSELF = ("crossvit",)  # images of any size to the one it was published with


def create(
    name: str,
    *,
    image_size: int | None = None,
    patch_size: int | None = None,
    pool: str | None = None,
    stem: str = "imagenet",
    in_chans: int = 3,
    drop_path: float = 0.0,
    freeze_patch_embed: bool = False,
    learn_positions: bool = False,
    pretrained: bool = False,
    **kwargs: Any,
) -> Backbone:
    """The network ``name`` without classifier, in training mode.

    Args:
        name: any name timm knows, a pretrained tag included, or one of ours.
        image_size: side of the images. Networks with a position embedding, a bias table or windows are built for it;
            the others take any. Null: the size they were published with. Vision transformers take images of further
            sizes beside it (``dynamic_img_size``), and resize their position embedding.
        patch_size: side of the patches a transformer cuts images into, in place of the one in its name.
        pool: what a feature is: ``token`` (the class token), ``avg`` (the mean of the places in the image); null for
            what the network was published with.
        stem: ``imagenet`` is the network as it is; ``cifar`` starts a ResNet with a 3x3 convolution of stride 1 and
            padding 1 and no pooling, for images of about 32 pixels (Chen et al. 2020, appendix B.9); ``cifar_pad2``
            pads by 2, as solo-learn's networks do.
        in_chans: channels of the images.
        drop_path: stochastic depth rate of the last block, growing linearly from 0 at the first.
        freeze_patch_embed: leave the patch projection as it begins, which steadies contrastive training of
            transformers (Chen, Xie, He: An Empirical Study of Training Self-Supervised Vision Transformers, ICCV 2021).
        learn_positions: a position embedding that would stay as it begins (MAE's, MoCo v3's) learns with the rest, as
            in MAE's fine-tuning.
        pretrained: start from timm's published weights (downloaded by timm).
        **kwargs: for the network's own constructor.

    Raises:
        UserError: unknown name or stem, a network without such a stem, one that refuses an argument, or weights that
            are not to be had.
    """
    if not is_known(name):
        known = [*choices(), *timm.list_models()]
        raise UserError(f"There is no backbone '{name}', neither here nor in timm.{nearest(name, known)}")
    if stem not in STEMS:
        raise UserError(f"stem is '{stem}', and a stem is one of {', '.join(STEMS)}.{nearest(stem, STEMS)}")
    if pool not in (None, *POOLS):
        raise UserError(f"pool is '{pool}', and one of {', '.join(POOLS)} was expected.{nearest(str(pool), POOLS)}")
    own_stem = "stem" in inspect.signature(timm.model_entrypoint(name)).parameters and stem != "cifar_pad2"
    asked = {"patch_size": patch_size, "global_pool": pool, "drop_path_rate": drop_path, "stem": own_stem and stem}
    kwargs |= {option: value for option, value in asked.items() if value}
    net = _build(name, image_size, {"pretrained": pretrained, "num_classes": 0, "in_chans": in_chans, **kwargs})
    if stem != "imagenet" and not own_stem:
        if not isinstance(net, ResNet):
            raise UserError(
                f"The backbone '{name}' has no stem for small images; backbone.stem={stem} is for ResNets, leave it "
                "out here."
            )
        _give_cifar_stem(net, in_chans, padding=2 if stem == "cifar_pad2" else 1)
    if getattr(net, "head_hidden_size", net.num_features) != net.num_features:
        _end_at_the_map(net)
    if freeze_patch_embed:
        _freeze_patch_embed(net, name)
    if learn_positions:
        if getattr(net, "pos_embed", None) is None:
            raise UserError(f"'{name}' has no position embedding to learn: leave backbone.learn_positions=false.")
        net.pos_embed.requires_grad_(True)
    names = dict(net.named_modules())
    net.feature_info = [entry for entry in net.feature_info if entry.get("module") and entry["module"] in names]
    net.image_size, net.in_chans = image_size, in_chans
    return cast(Backbone, net)


def _build(name: str, image_size: int | None, arguments: dict[str, Any]) -> Any:
    """The network as timm builds it, for images of ``image_size`` as far as its constructor asks for that."""
    for_size: dict[str, Any] = {"dynamic_img_size": True} | ({} if image_size is None else {"img_size": image_size})
    for_size = {option: value for option, value in for_size.items() if option not in arguments}
    if name.startswith(RESIZES_ITSELF):
        for_size = {}
    weights = without_hub(name) if arguments["pretrained"] else {}
    while True:
        try:
            net: Any = timm.create_model(name, **arguments, **for_size, **weights)
        except (UserError, *REFUSALS) as error:
            unknown = next((option for option in for_size if f"'{option}'" in str(error)), None)
            if isinstance(error, (UserError, TypeError)) and unknown is not None:
                del for_size[unknown]
            elif isinstance(error, UserError):
                raise
            elif arguments["pretrained"] and isinstance(error, (OSError, RuntimeError)):
                raise UserError(
                    f"The weights of '{name}' are not to be had ({one_line(error)}); use backbone.pretrained=false."
                ) from error
            else:
                at = f" for images of {image_size} x {image_size} pixels" if "img_size" in for_size else ""
                raise UserError(
                    f"The backbone '{name}' cannot be built{at} with these arguments ({one_line(error)})."
                ) from error
        else:
            options = {**arguments, **for_size} | ({"in_chans": None} if arguments["in_chans"] == 3 else {})
            of_training = ("pretrained", "num_classes", "drop_path_rate")
            net.timm_options = {k: v for k, v in options.items() if k not in of_training and v is not None}
            return net


def weights_line(net: nn.Module) -> str:
    """Which weights timm published for a network it has made with ``pretrained=True``, and under which licence."""
    published: Any = net.pretrained_cfg
    name = ".".join(filter(None, (str(published.get("architecture")), published.get("tag"))))
    return f"{name} of timm (licence: {published.get('license') or 'not stated'})"


def is_known(name: str) -> bool:
    """Whether `create` can build ``name``."""
    _register_ours()
    return bool(timm.is_model(name))


def choices() -> list[str]:
    """Names of the networks that are ours, sorted."""
    files = {f"selfsight.backbones.{name}": name for name in _register_ours()}
    # timm goes by the last part of a module's name, which a file of its own may have as well
    return sorted(
        name
        for place, module in files.items()
        for name in timm.list_models(module=module)
        if timm.model_entrypoint(name).__module__ == place
    )


@functools.cache
def _register_ours() -> tuple[str, ...]:
    """Import every file of this folder, which registers what it defines; the names of the files."""
    names = tuple(
        found.name for found in pkgutil.iter_modules(selfsight.backbones.__path__) if found.name != "registry"
    )
    for name in names:
        importlib.import_module(f"selfsight.backbones.{name}")
    return names


def _freeze_patch_embed(net: Any, name: str) -> None:
    patches = getattr(net, "patch_embed", None)
    if patches is None:
        raise UserError(
            f"'{name}' has no patch projection that could stay as it is: leave backbone.freeze_patch_embed=false."
        )
    getattr(patches, "proj", patches).requires_grad_(False)


def _give_cifar_stem(net: Any, in_chans: int, padding: int) -> None:
    net.conv1 = nn.Conv2d(in_chans, net.feature_info[0]["num_chs"], 3, padding=padding, bias=False)
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    net.maxpool = nn.Identity()
    for info in net.feature_info:
        info["reduction"] //= 2 if info["module"] == "act1" else 4


class _AveragePool(nn.Module):
    def __init__(self, over: tuple[int, int]) -> None:
        super().__init__()
        self.over = over

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return x.mean(self.over)


def _end_at_the_map(net: nn.Module) -> None:
    """Drop the layers that some networks have between their last map and the classifier.

    They belong to the classifier they were designed with, and would go untrained wherever a method reads the map.
    """
    for layer in ("in_conv", "conv_head", "norm_head", "act2", "pre_classifier", "pre_logits"):
        if hasattr(net, layer):
            setattr(net, layer, nn.Identity())
    if hasattr(net, "head"):
        net.head = _AveragePool((1, 2) if getattr(net, "output_fmt", "") == "NHWC" else (2, 3))
    net.head_hidden_size = net.num_features
