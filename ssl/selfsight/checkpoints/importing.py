"""Anyone's checkpoint as a backbone of ours, in two lines:

import selfsight
backbone = selfsight.import_weights("swav_800ep_pretrain.pth.tar", "swav")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from selfsight.checkpoints import formats
from selfsight.checkpoints.export import export_backbone
from selfsight.errors import UserError

#: as most people normalise images of 32 pixels: those of CIFAR-10
SMALL = {"image_size": 32, "mean": [0.4914, 0.4822, 0.4465], "std": [0.2470, 0.2435, 0.2616]}


def import_weights(
    source: str | Path,
    out: str | Path | None = None,
    *,
    backbone: str | Mapping[str, Any] | None = None,
    trust: bool = False,
    image_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Module:
    """The backbone in a checkpoint of others, frozen and in eval mode, as `selfsight.load` gives one of ours.

    Whose the file is follows from the names and shapes of what is in it; docs/weights.md lists who is known.

    Args:
        source: a file of PyTorch, safetensors or NumPy, or the name of a TensorFlow checkpoint.
        out: folder to write ``backbone.safetensors`` and ``backbone.json`` into; None writes nothing.
        backbone: the network, where its tensors do not tell: a name, or arguments of
            `selfsight.backbones.registry.create`.
        trust: let the file run the code it brings, if it brings any (pickle).
        image_size, mean, std: of the images the network is for; None: as its authors trained it.

    Raises:
        UserError: the file cannot be read, is of no known project, is not whole, or ``out`` cannot be written.
    """
    imported = formats.read(source, backbone=backbone, trust=trust)
    spec = description(imported, Path(source).name, image_size=image_size, mean=mean, std=std)
    net = built(imported)
    if out is not None:
        export_backbone(net, spec, made(Path(out).expanduser()))
    net.spec = {**spec, "num_features": net.num_features}  # type: ignore[assignment]
    return net.eval().requires_grad_(False)


def built(imported: formats.Imported) -> nn.Module:
    """The network of a checkpoint, with its weights in their type."""
    from selfsight.backbones.registry import create

    net = create(**imported.spec)
    dtype = next((value.dtype for value in imported.backbone.values() if value.is_floating_point()), None)
    net.to(dtype).load_state_dict(imported.backbone)
    return net


def description(imported: formats.Imported, file: str, **given: Any) -> dict[str, Any]:
    """What ``backbone.json`` says of an imported network."""
    images = dict(imported.format.described)
    if str(imported.spec.get("stem", "")).startswith("cifar") or imported.spec["name"].startswith(("wrn", "nin")):
        images = {**SMALL, **({"mean": None, "std": None} if images["mean"] is None else {})}
        if imported.format.described["image_size"] == SMALL["image_size"]:
            images = dict(imported.format.described)
    if "image_size" in imported.spec:
        images["image_size"] = imported.spec["image_size"]
    if imported.spec.get("in_chans", 3) != 3:  # the usual three numbers are of other channels
        images |= {"mean": None, "std": None}
    spec = {
        "backbone": imported.spec,
        **images,
        **{key: list(v) if isinstance(v, Sequence) else v for key, v in given.items() if v is not None},
        "imported": {"format": imported.format.title, "file": file},
    }
    return spec if imported.format.method is None else {**spec, "method": imported.format.method}


def made(folder: Path) -> Path:
    """``folder``, once it is there.

    Raises:
        UserError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder '{folder}' cannot be made ({error.strerror}); name another: out=DIR.") from None
    return folder
