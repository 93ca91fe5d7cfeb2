"""`selfsight report`: write report.html of a run again."""

from __future__ import annotations

from omegaconf import DictConfig

from selfsight.engine import measure
from selfsight.engine.reload import loaded_run
from selfsight.reporting import embedding, report
from selfsight.runs.console import make_console
from selfsight.runs.folder import RunFolder


def run(cfg: DictConfig) -> None:
    """Write the report of an existing run again, from what its folder holds."""
    embedding.check_projection(cfg.projection)
    of_run = loaded_run(RunFolder.open(cfg.run), cfg.accelerator)
    features = measure.features(of_run.backbone, of_run.datamodule)
    make_console().print(f"report: {report.write(of_run, *features, cfg.projection)}")
