"""Folders and files that a configuration names: looked for before anything large is imported.

Whoever reads them refuses them in the same words, later.
"""

from __future__ import annotations

import glob
import itertools
import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from selfsight.composition.catalogue import ADVISED
from selfsight.datamodules.datasets.checks import RULES, missing_table
from selfsight.datamodules.images.formats import OF_MANY
from selfsight.errors import UserError, nearest
from selfsight.validation import SHARE, expect

#: data sets that are a folder of the person's, by their target
OF_FOLDERS = ("selfsight.datamodules.folder",)
#: how the targets of our data sets begin
OURS = "selfsight.datamodules."

#: what lies in a folder made by `selfsight prepare`
PREPARED = "prepared.json"


def check_places(job: str, cfg: DictConfig) -> None:
    """
    Raises:
        UserError: a folder of images or a file of labels is not there.
    """
    if _value(cfg, "dataset._target_") in OF_FOLDERS:
        if _value(cfg, "dataset.root") in (None, ""):
            raise UserError("dataset=folder has to know where the images are: add dataset.root=DIR.")
        root = str(_value(cfg, "dataset.root"))
        if "://" not in root and not Path(root).expanduser().is_file():  # servers and archives are opened by who reads
            _check_images(job, cfg, _expect_folder("dataset.root", _value(cfg, "dataset.root")))
    elif str(_value(cfg, "dataset._target_")).startswith(OURS) and _value(cfg, "dataset.download") is not True:
        _check_published(cfg.dataset)
    if job == "prepare" and not (source := Path(str(cfg.source)).expanduser()).is_dir():
        raise UserError(f"source is '{source}', which is no folder; name a folder of images.")
    if job == "import":
        _check_source(Path(str(cfg.source)).expanduser())
    for key in ("weights", "init_from"):
        if (path := _value(cfg, key)) is not None:
            _check_weights(str(path))
    for key in ("labels.list", "dataset.only"):
        if (path := _value(cfg, key)) is not None and not Path(str(path)).expanduser().exists():
            raise UserError(f"{key} is '{Path(str(path)).expanduser()}', which does not exist.")
    if (path := _value(cfg, "labels.split")) is not None:
        try:
            os.stat(Path(str(path)).expanduser())
        except OSError as error:
            raise UserError(f"the label split '{path}' cannot be read: {error.strerror}.") from None


def _check_images(job: str, cfg: DictConfig, root: Path) -> None:
    """Folders and tables inside the folder of images, and a batch that all its files would not fill."""
    for key in ("dataset.test", "dataset.unlabelled"):
        if (value := _value(cfg, key)) is not None:
            _expect_folder(key, root / Path(str(value)).expanduser())
    labels = _value(cfg, "dataset.labels")
    if isinstance(labels, str) and labels not in RULES and not any(root.glob(f"*/{labels}")):
        table = root / Path(labels).expanduser()
        if not table.is_file():
            raise missing_table(root, labels)
    if (held_out := _value(cfg, "dataset.test_fraction")) is not None:
        expect("dataset.test_fraction", held_out, SHARE)
    if not any(path.is_file() for path in root.rglob("*")):
        raise UserError(f"'{root}' holds no image.")
    batch = _value(cfg, "batch_size")
    if not isinstance(batch, int) or "datamodule" not in cfg or _value(cfg, "dataset.unlabelled") is not None:
        return
    files = list(itertools.islice((path for path in root.rglob("*") if path.is_file()), batch))  # no more matter
    of_many = any(path.name == PREPARED or path.suffix.lower() in OF_MANY for path in files)
    if 0 < len(files) < batch and not of_many and not {"mu", "steps_per_epoch"} & {*cfg}:
        there = f"{len(files)} file{'s' * (len(files) > 1)}"
        fits = f"choose batch_size={1 << (len(files) // 2).bit_length() - 1}" if len(files) > 3 else "add images"
        small = ", or add recipe=small, which takes sizes that fit" if job in ADVISED and len(files) > 3 else ""
        raise UserError(
            f"batch_size is {batch} and '{root}' has {there}, of which some may be held out to test; {fits}{small}."
        )


def _check_published(dataset: DictConfig) -> None:
    """The folder of a published data set, where it is not to be fetched."""
    root = dataset.get("root")
    if root is None or "://" in str(root) or (place := Path(str(root)).expanduser()).is_dir():
        return
    fetch = "dataset.download=true fetches it, or " if "download" in dataset else ""
    raise UserError(
        f"data set '{dataset.get('name')}' was looked for in '{place}', which does not exist: {fetch}dataset.root=DIR "
        "says where it is."
    )


def _check_source(file: Path) -> None:
    """A file of weights, or what the names of a TensorFlow checkpoint's files begin with."""
    if not file.parent.is_dir() or not any(file.parent.glob(f"{glob.escape(file.name)}*")):
        beside = [str(path) for path in file.parent.glob("*") if path.is_file()] if file.parent.is_dir() else []
        raise UserError(
            f"source is '{file}', which does not exist; name a file of weights.{nearest(str(file), beside)}"
        )


def _check_weights(path: str) -> None:
    if path.startswith("hf-hub:"):  # on the Hub, which is asked when it is read
        return
    plain = Path(path.removeprefix("authors:")).expanduser()
    beside = [*plain.parent.glob(f"{plain.name}*")] if plain.parent.is_dir() else []  # of TensorFlow's it is a prefix
    if plain.suffix not in (".safetensors", ".json") and not beside:
        found = [str(file.parent) for file in plain.parent.glob("*/backbone.json")]
        raise UserError(f"There is no folder '{plain}' with a backbone in it.{nearest(str(plain), found)}")


def _expect_folder(key: str, value: object) -> Path:
    place = Path(str(value)).expanduser()
    if not place.is_dir():
        what = "is a file" if place.exists() else "does not exist"
        raise UserError(f"{key} is '{place}', which {what}; name a folder of images.")
    return place


def _value(cfg: DictConfig, key: str) -> Any:
    """A value that stands in the configuration itself; None for one that refers to another place."""
    parent, _, leaf = key.rpartition(".")
    node = OmegaConf.select(cfg, parent, throw_on_missing=False)
    if not isinstance(node, DictConfig) or leaf not in node or OmegaConf.is_interpolation(node, leaf):
        return None
    return None if OmegaConf.is_missing(node, leaf) else node[leaf]
