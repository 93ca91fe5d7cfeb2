"""Folders and files that a configuration names: looked for before anything large is imported.

Whoever reads them refuses them in the same words, later.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from selfsight.errors import UserError

#: data sets that are a folder of the person's, by their target
OF_FOLDERS = ("selfsight.datamodules.folder",)


def check_places(cfg: DictConfig) -> None:
    """
    Raises:
        UserError: a folder of images or a file of labels is not there.
    """
    if _value(cfg, "dataset._target_") in OF_FOLDERS:
        if _value(cfg, "dataset.root") in (None, ""):
            raise UserError("dataset=folder has to know where the images are: add dataset.root=DIR.")
        _expect_folder("dataset.root", _value(cfg, "dataset.root"))
    if (path := _value(cfg, "labels.list")) is not None and not Path(str(path)).expanduser().exists():
        raise UserError(f"labels.list is '{Path(str(path)).expanduser()}', which does not exist.")
    if (path := _value(cfg, "labels.split")) is not None:
        try:
            os.stat(Path(str(path)).expanduser())
        except OSError as error:
            raise UserError(f"the label split '{path}' cannot be read: {error.strerror}.") from None


def _expect_folder(key: str, value: object) -> None:
    place = Path(str(value)).expanduser()
    if not place.is_dir():
        what = "is a file" if place.exists() else "does not exist"
        raise UserError(f"{key} is '{place}', which {what}; name a folder of images.")


def _value(cfg: DictConfig, key: str) -> Any:
    """A value that stands in the configuration itself; None for one that refers to another place."""
    parent, _, leaf = key.rpartition(".")
    node = OmegaConf.select(cfg, parent, throw_on_missing=False)
    if not isinstance(node, DictConfig) or leaf not in node or OmegaConf.is_interpolation(node, leaf):
        return None
    return None if OmegaConf.is_missing(node, leaf) else node[leaf]
