"""`selfsight export`: the backbone of a run as a file that another library reads."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from omegaconf import DictConfig

import selfsight
from selfsight.checkpoints import export, hub
from selfsight.checkpoints.export import SMALL_STEMS
from selfsight.checkpoints.load import described
from selfsight.contracts import Backbone
from selfsight.errors import USAGE, UserError, nearest
from selfsight.files import replace, with_folder
from selfsight.reporting.model_card import model_card
from selfsight.runs.console import make_console
from selfsight.runs.folder import RunFolder

#: format: name of its file, or folder, in the run folder
FILES = {
    "torchvision": "backbone.torchvision.pth",
    "timm": "backbone.timm.safetensors",
    "detectron2": "backbone.detectron2.pkl",
    "onnx": "backbone.onnx",
    "safetensors": "",
    "hub": "hub",
}


def run(cfg: DictConfig) -> None:
    """Write the file and say what its reader has to know."""
    if cfg.format not in FILES:
        raise UserError(
            f"there is no format '{cfg.format}'; choose from {', '.join(FILES)}.{nearest(str(cfg.format), FILES)}",
            status=USAGE,
        )
    if (cfg.run is None) == (cfg.weights is None):
        raise UserError("give either a run folder (run=runs/NAME) or an exported backbone (weights=DIR).", status=USAGE)
    if cfg.push is not None and cfg.format != "hub":
        raise UserError(f"push= is for format=hub, and format is '{cfg.format}'.", status=USAGE)
    folder = RunFolder.open(cfg.run) if cfg.run is not None else None
    if cfg.out is None and (folder is None or cfg.format == "safetensors"):
        raise UserError("say where the file goes: out=PATH.", status=USAGE)
    backbone = selfsight.load(cfg.weights if folder is None else folder.path)
    out = Path(cfg.out).expanduser() if folder is None or cfg.out is not None else folder.path / FILES[cfg.format]
    if not out.parent.is_dir():
        raise UserError(f"there is no folder '{out.parent}' to write '{out.name}' into; make it first.")
    told = to_hub(cfg, backbone, out, folder) if cfg.format == "hub" else write(backbone, cfg.format, out)
    make_console().print(f"{out}: {told}", markup=False, highlight=False, soft_wrap=True)


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


def to_hub(cfg: DictConfig, backbone: Backbone, out: Path, run: RunFolder | None) -> str:
    """A folder as the Hub has them, uploaded where ``push`` names a repository; returns what was done."""
    name = cfg.push or out.resolve().name
    card = model_card(
        backbone, name=str(name), run=run, licence=cfg.license, data=cfg.data, data_licence=cfg.data_license
    )
    hub.write_folder(backbone, out, card, cfg.license)
    told = f"{hub.WEIGHTS}, {hub.CONFIG} and the model card {hub.CARD}"
    if cfg.license is None:
        told += "; the card states no licence yet: license=NAME, data_license=NAME"
    if cfg.push is None:
        return f"{told}; push=PERSON/MODEL uploads it"
    return f"{told}; uploaded to {hub.push(out, str(cfg.push))}, selfsight.load('{hub.PREFIX}{cfg.push}') loads it"


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
