"""`selfsight export`: the backbone of a run as a file that another library reads."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from omegaconf import DictConfig

import selfsight
from selfsight.checkpoints import export
from selfsight.checkpoints.load import described
from selfsight.contracts import Backbone
from selfsight.errors import UserError, nearest
from selfsight.runs.console import make_console, quiet
from selfsight.runs.folder import RunFolder
from selfsight.runs.records import with_folder

#: format: name of its file in the run folder
FILES = {
    "torchvision": "backbone.torchvision.pth",
    "timm": "backbone.timm.safetensors",
    "detectron2": "backbone.detectron2.pkl",
    "onnx": "backbone.onnx",
    "safetensors": "",
}


def run(cfg: DictConfig) -> None:
    """Write the file and say what its reader has to know."""
    quiet()
    if cfg.format not in FILES:
        raise UserError(
            f"there is no format '{cfg.format}'; choose from {', '.join(FILES)}.{nearest(str(cfg.format), FILES)}",
            status=2,
        )
    if (cfg.run is None) == (cfg.weights is None):
        raise UserError("give either a run folder (run=runs/NAME) or an exported backbone (weights=DIR).", status=2)
    folder = RunFolder.open(cfg.run).path if cfg.run is not None else None
    if cfg.out is None and (folder is None or cfg.format == "safetensors"):
        raise UserError("say where the file goes: out=PATH.", status=2)
    backbone = selfsight.load(cfg.weights if folder is None else folder)
    out = Path(cfg.out).expanduser() if folder is None or cfg.out is not None else folder / FILES[cfg.format]
    if not out.parent.is_dir():
        raise UserError(f"there is no folder '{out.parent}' to write '{out.name}' into; make it first.")
    write(backbone, cfg.format, out)
    make_console().print(f"{out}: {how_to_read(backbone, cfg.format)}")


def write(backbone: Backbone, form: str, out: Path) -> None:
    """The weights of a loaded backbone in one of the `FILES`."""
    spec = backbone.spec
    if form == "torchvision":
        content = io.BytesIO()
        torch.save(export.to_torchvision(backbone), content)
        export.replace(out, lambda path: path.write_bytes(content.getbuffer()))
    elif form == "timm":
        export.export_timm(backbone, spec["backbone"], out)
    elif form == "detectron2":
        export.export_detectron2(backbone, out)
    elif form == "onnx":
        export.export_onnx(backbone, out, described(backbone, "image_size"), spec["backbone"].get("in_chans", 3))
    else:
        export.export_backbone(backbone, spec, with_folder(out / export.WEIGHTS).parent)


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
    if form == "timm":
        options = "".join(f", {key}={value!r}" for key, value in export.timm_options(backbone).items())
        name = f"net = timm.create_model('{name}', num_classes=0{options})"
    if form in ("timm", "torchvision") and arguments.get("stem") == "cifar":
        channels = ", ".join(map(str, backbone.get_parameter("conv1.weight").shape[1::-1]))
        name += (
            f"; before loading, net.conv1 = torch.nn.Conv2d({channels}, 3, padding=1, bias=False) and "
            "net.maxpool = torch.nn.Identity()"
        )
    return f"{name}; {images}"
