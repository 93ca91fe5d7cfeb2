"""A backbone as a file of another library, and what the reader of it has to know."""

from __future__ import annotations

import io
from pathlib import Path

import torch

from selfsight.checkpoints import export
from selfsight.checkpoints.export import SMALL_STEMS
from selfsight.checkpoints.load import described
from selfsight.contracts import Backbone
from selfsight.errors import UserError
from selfsight.files import replace, with_folder

#: format: name of its file, or folder, in the run folder
FILES = {
    "torchvision": "backbone.torchvision.pth",
    "timm": "backbone.timm.safetensors",
    "detectron2": "backbone.detectron2.pkl",
    "onnx": "backbone.onnx",
    "safetensors": "",
    "hub": "hub",
}


def with_ending(out: Path, form: str) -> Path:
    """The place of a file in one of the `FILES`, with that one's ending where it has none.

    Raises:
        UserError: another ending, where the reader goes by it.
    """
    ending = Path(FILES[form]).suffix
    if form == "timm" and out.suffix not in ("", ending):
        raise UserError(f"timm knows safetensors by their ending, and '{out.name}' has another: out=NAME{ending}.")
    return out if out.suffix or not ending else out.with_name(out.name + ending)


def write(backbone: Backbone, form: str, out: Path) -> str:
    """The weights of a loaded backbone in one of the `FILES`; returns what their reader has to know."""
    spec, sizes = backbone.spec, ""
    if form == "torchvision":
        content = io.BytesIO()
        torch.save(export.to_torchvision(backbone), content)
        replace(out, lambda path: path.write_bytes(content.getbuffer()))
    elif form == "timm":
        export.export_timm(backbone, spec["backbone"], out)
    elif form == "detectron2":
        export.export_detectron2(backbone, out)
    elif form == "onnx":
        size = described(backbone, "image_size")
        free = export.export_onnx(backbone, out, size, spec["backbone"].get("in_chans", 3))
        sizes = "; any number of images, " + ("of any size" if free else f"of {size} x {size} pixels")
    else:
        export.export_backbone(backbone, spec, with_folder(out / export.WEIGHTS).parent)
    return how_to_read(backbone, form) + sizes


def how_to_read(backbone: Backbone, form: str) -> str:
    """What the reader has to do with the images, and before the weights fit."""
    spec = backbone.spec
    mean, std = described(backbone, "mean") or (0.0,) * 3, described(backbone, "std") or (1.0,) * 3
    if form == "detectron2":
        mean, std = ([round(255 * value, 3) for value in values] for values in (mean, std))
        return f"INPUT.FORMAT RGB, MODEL.PIXEL_MEAN {mean}, MODEL.PIXEL_STD {std}, MODEL.RESNETS.STRIDE_IN_1X1 False"
    images = f"RGB images from 0 to 1, less mean {list(mean)}, divided by std {list(std)}"
    arguments = spec["backbone"]
    name = export.name_of(arguments)
    if form == "timm" and (call := export.timm_call(backbone, arguments)) is not None:
        options = "".join(f", {key}={value!r}" for key, value in call[1].items())
        name = f"net = timm.create_model('{call[0]}', num_classes=0{options})"
    padding = SMALL_STEMS.get(str(arguments.get("stem")))
    if form in ("timm", "torchvision") and padding is not None:
        channels = ", ".join(map(str, backbone.get_parameter("conv1.weight").shape[1::-1]))
        name += (
            f"; before loading, net.conv1 = torch.nn.Conv2d({channels}, 3, padding={padding}, bias=False) and "
            "net.maxpool = torch.nn.Identity()"
        )
    return f"{name}; {images}"
