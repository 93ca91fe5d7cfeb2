"""`selfsight detect`: what a backbone is worth for detection: fine-tuned inside a detector, measured by COCO's AP."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

import selfsight
from selfsight.checkpoints.export import state
from selfsight.checkpoints.load import described
from selfsight.engine import build, nodes
from selfsight.engine.devices import device
from selfsight.engine.progress import StepLines
from selfsight.errors import UserError
from selfsight.files import place_to_write, replace, with_folder
from selfsight.reporting.tables import show_figures
from selfsight.runs import records
from selfsight.runs.console import make_console
from selfsight.runs.environment import command
from selfsight.runs.folder import run_or_exported

NAME = "detect"


def run(cfg: DictConfig) -> None:
    """Fine-tune and measure; leaves ``detect.json`` with figures and protocol, and ``detector.safetensors``.

    With other settings than those of a record that lies there both names end in ``-2``, ``-3``, ...
    """
    from safetensors.torch import save

    console = make_console()
    folder = run_or_exported(cfg.run, cfg.weights)
    in_run = None if folder is None else folder.path / records.FOLDER
    out = place_to_write(cfg.out, in_run, "the results of an exported backbone go: out=DIR")
    source = Path(cfg.weights).expanduser() if folder is None else folder.path
    backbone = selfsight.load(source)
    mean, std = described(backbone, "mean"), described(backbone, "std")
    if cfg.optimizer.sam is not None:
        raise UserError("optimizer.sam is for methods, and a detector is none; leave it out.")
    data = nodes.build(cfg.dataset)
    detection = nodes.build(cfg.detection, data=data, optimizer=build.optimizer(cfg.optimizer))
    settings: dict[str, object] = {key: records.to_json(cfg[key]) for key in ("dataset", "detection", "optimizer")}
    settings["backbone"] = str(source.resolve())
    path = with_folder(records.free_path(out, NAME, settings))
    console.print(detection.protocol, style="dim")
    figures, net = detection(
        backbone.to(device(cfg.accelerator)),
        mean,
        std,
        num_workers=cfg.num_workers,
        watch=StepLines(console, detection.iterations),
    )
    show_figures(console, figures)
    record = {
        "protocol": detection.protocol,
        "command": command(),
        "data": f"{data.name} ({len(data.train):,} images, {len(data.classes)} classes)",
        "classes": data.classes,
        "settings": settings,
        "result": figures,
    }
    weights = path.with_name(f"detector{path.stem.removeprefix(NAME)}.safetensors")
    replace(weights, lambda beside: beside.write_bytes(save(state(net))))
    records.write(path, record)
    console.print(f"kept in {path}")
