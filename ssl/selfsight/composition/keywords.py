"""The keyword arguments of Python as words of the command line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping

import numpy as np
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import Tensor

from selfsight.composition.catalogue import GROUPS
from selfsight.composition.words import quoted
from selfsight.errors import USAGE, UserError

#: short words of Python for keys of the configuration
SHORT = {
    "root": "dataset.root",
    "image_size": "dataset.image_size",
    "epochs": "trainer.max_epochs",
    "lr": "optimizer.lr",
    "devices": "trainer.devices",
    "accelerator": "trainer.accelerator",
    "precision": "trainer.precision",
    "labels_per_class": "labels.per_class",
}


def words_of(settings: Mapping[str, object]) -> Iterator[str]:
    """Settings as they are typed on the command line; a mapping is a word for each of its values.

    Raises:
        UserError: an object that no words stand for.
    """
    for key, value in settings.items():
        if isinstance(value, (Mapping, DictConfig)) and value:
            yield from words_of({f"{SHORT.get(str(key), key)}.{inner}": one for inner, one in value.items()})
        else:
            yield word_of(str(key), value)


def word_of(key: str, value: object) -> str:
    """A setting as it is typed on the command line: ``optimizer.lr=0.3``.

    Raises:
        UserError: an object that no words stand for.
    """
    key = SHORT.get(key, key)
    if isinstance(value, (str, os.PathLike)):
        text = os.fspath(value)
        return f"{key}={text if key in GROUPS else quoted(text)}"
    try:
        return f"{key}={_text(_plain(value))}"
    except (TypeError, ValueError):
        raise UserError(
            f"{key} was given a {type(value).__name__}; text, numbers, lists and mappings were expected (a part "
            f"of your own is named: **{{'{key}._target_': 'module.Name'}}).",
            status=USAGE,
        ) from None


def _text(value: object) -> str:
    """A value in Hydra's grammar: JSON, but that names in mappings stand without quotes."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_text(one)}' for key, one in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    return json.dumps(value)


def _plain(value: object) -> object:
    if isinstance(value, (np.generic, np.ndarray, Tensor)):
        return value.tolist()
    if isinstance(value, (DictConfig, ListConfig)):
        return OmegaConf.to_container(value, resolve=True)
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple, range)):
        return [_plain(one) for one in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value
