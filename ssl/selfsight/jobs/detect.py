"""`selfsight detect`: what a backbone is worth for detection: fine-tuned inside a detector, measured by COCO's AP."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console

import selfsight
from selfsight.checkpoints.export import replace, state
from selfsight.errors import UserError
from selfsight.jobs import build
from selfsight.jobs.console import clock_text, make_console, quiet
from selfsight.jobs.evaluate import show
from selfsight.jobs.run_folder import RunFolder, command, write_atomically

NOTES = 20  # lines of progress


def run(cfg: DictConfig) -> None:
    """Fine-tune and measure; leaves ``detect.json`` with figures and protocol, and ``detector.safetensors``."""
    from safetensors.torch import save_file

    quiet()
    console = make_console()
    out = place(cfg)
    backbone = selfsight.load(cfg.backbone if cfg.run is None else RunFolder.open(cfg.run).path)
    spec: Any = backbone.spec
    data = build.build(cfg.dataset)
    detection = build.build(cfg.detection, data=data, optimizer=build.build(cfg.optimizer))
    console.print(detection.protocol, style="dim")
    figures, net = detection(
        backbone.to(build.device(cfg.accelerator)),
        spec["mean"],
        spec["std"],
        num_workers=cfg.num_workers,
        watch=Progress(console, detection.iterations),
    )
    show(console, figures)
    record = {
        "protocol": detection.protocol,
        "command": command(),
        "data": f"{data.name} ({len(data.train):,} images, {len(data.classes)} classes)",
        "classes": data.classes,
        "result": figures,
    }
    out.mkdir(parents=True, exist_ok=True)
    replace(out / "detector.safetensors", lambda path: save_file(state(net), path))
    write_atomically(out / "detect.json", json.dumps(record, indent=2) + "\n")
    console.print(f"kept in {out / 'detect.json'}")


def place(cfg: DictConfig) -> Path:
    """Where the results go.

    Raises:
        UserError: not exactly one of ``run`` and ``backbone`` is given, or a backbone without ``out``.
    """
    if (cfg.run is None) == (cfg.backbone is None):
        raise UserError("give either a run folder (run=runs/NAME) or an exported backbone (backbone=DIR).", status=2)
    if cfg.out is not None:
        return Path(cfg.out).expanduser()
    if cfg.run is None:
        raise UserError("say where the results of an exported backbone go: out=DIR.", status=2)
    return RunFolder.open(cfg.run).path / "eval"


class Progress:
    """A line now and then: step, mean loss since the last one, time left."""

    def __init__(self, console: Console, steps: int) -> None:
        self.console, self.steps, self.start = console, steps, time.monotonic()
        self.losses: list[float] = []

    def __call__(self, step: int, loss: float) -> None:
        self.losses.append(loss)
        if step % max(1, self.steps // NOTES) and step != self.steps:
            return
        left = (time.monotonic() - self.start) / step * (self.steps - step)
        mean = sum(self.losses) / len(self.losses)
        self.console.print(f"step {step:>6}/{self.steps}  loss {mean:.3f}  {clock_text(left)} left")
        self.losses.clear()
