"""`selfsight explore`: the embedding in a browser. Pan, zoom, lasso, neighbours, filters, search by image, export.

Bokeh draws and serves it; everything is answered by this process, and by default only to this machine: to who knows the
address that it prints, see `reporting.explorer_server`.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from selfsight.engine import measure
from selfsight.engine.reload import feature_cache
from selfsight.engine.subject import subject_of
from selfsight.errors import UserError
from selfsight.evaluation.features import FINAL
from selfsight.reporting import embedding
from selfsight.reporting.explorer import Explorer
from selfsight.runs.console import make_console
from selfsight.runs.folder import RunFolder
from selfsight.validation import expect, one_of, whole

if TYPE_CHECKING:
    from bokeh.document import Document

SPLITS = ("train", "test")
PORTS = 2**16


def run(cfg: DictConfig) -> None:
    console = make_console()
    check(cfg)
    if find_spec("bokeh") is None:
        raise UserError("the explorer needs a package: pip install 'selfsight[web]'.")
    from selfsight.reporting.explorer_server import serve

    folder = RunFolder.open(cfg.run)
    backbone, data, _, _ = subject_of(folder, cfg.accelerator)
    if cfg.split not in measure.available_splits(data):
        raise UserError(f"data set '{data.data.name}' has no {cfg.split} images; leave out split={cfg.split}.")
    cache = feature_cache(folder)
    train, images = measure.learnt_from(backbone, data, cache=cache)
    shown = train
    if cfg.split == "test":
        shown = measure.part_features(backbone, data, "test", [FINAL], cache=cache)[FINAL]
        images = data.data.split("test")
    known = embedding.build_map(train, shown, images, cfg.projection)

    def page(document: Document) -> None:
        document.title = folder.name
        document.add_root(Explorer(folder, data, backbone, shown, known, cfg.split).layout)

    try:
        server, place = serve(page, cfg.address, cfg.port)
    except OSError as error:
        raise UserError(
            f"port {cfg.port} of '{cfg.address}' cannot be opened ({error.strerror}); take another, or port=0."
        ) from None
    server.start()
    console.print(f"explore {len(known.rows):,} images: {place}   (Ctrl-C ends it)")
    server.run_until_shutdown()


def check(cfg: DictConfig) -> None:
    """Refuse what cannot be shown before any image is looked at.

    Raises:
        UserError: an unknown part or projection, or a port that is none.
    """
    expect("split", cfg.split, one_of(*SPLITS))
    expect("port", cfg.port, whole(0, PORTS - 1))
    embedding.check_projection(cfg.projection)
