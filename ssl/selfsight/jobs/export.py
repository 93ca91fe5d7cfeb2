"""`selfsight export`: the backbone of a run as a file that another library reads."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

import selfsight
from selfsight.checkpoints import hub
from selfsight.checkpoints.outgoing import FILES, with_ending, write
from selfsight.contracts import Backbone
from selfsight.errors import USAGE, UserError, nearest
from selfsight.files import in_folder, place_to_write
from selfsight.reporting.model_card import model_card
from selfsight.runs.console import make_console
from selfsight.runs.folder import RunFolder, run_or_exported


def run(cfg: DictConfig) -> None:
    """Write the file and say what its reader has to know."""
    if cfg.format not in FILES:
        raise UserError(
            f"there is no format '{cfg.format}'; choose from {', '.join(FILES)}.{nearest(str(cfg.format), FILES)}",
            status=USAGE,
        )
    if cfg.push is not None and cfg.format != "hub":
        raise UserError(f"push= is for format=hub, and format is '{cfg.format}'.", status=USAGE)
    folder = run_or_exported(cfg.run, cfg.weights)
    in_run = None if folder is None or cfg.format == "safetensors" else folder.path / FILES[cfg.format]
    out = with_ending(in_folder(place_to_write(cfg.out, in_run, "the file goes: out=PATH")), cfg.format)
    backbone = selfsight.load(cfg.weights if folder is None else folder.path)
    told = to_hub(cfg, backbone, out, folder) if cfg.format == "hub" else write(backbone, cfg.format, out)
    make_console().print(f"{out}: {told}", markup=False, highlight=False, soft_wrap=True)


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
