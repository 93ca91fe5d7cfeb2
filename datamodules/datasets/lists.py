"""Published lists of labelled images: text files of names, found again in a set of images."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from selfsight.datamodules.datasets.checks import composed, read_text, shown
from selfsight.datamodules.images.sets import ImageSet
from selfsight.errors import UserError

#: SHA-256 of the sorted file names joined by line feeds, of published lists (SimCLR's imagenet_subsets; SimMatchV2's
#: lists hold the same names)
PUBLISHED_LISTS = {
    "imagenet_1percent": "6581e723dbf23ae41ebd1d66d0b3c1c0eb8865d5abfa906987f6563513f4b9b8",
    "imagenet_10percent": "220f3e2f6dba9d26ec247224cbbf4f3581cbf7fe341e08b191ee0855ad19af56",
}


def listed(images: ImageSet, file: Path, sha256: str | None = None) -> Tensor:
    """Positions of the images a file names, see `named`: those that keep their labels."""
    return named([images.name(index) for index in range(len(images))], file, sha256=sha256)


def named(
    names: Sequence[str],
    file: Path,
    *,
    sha256: str | None = None,
    key: str = "labels.list",
    among: str = "in the data set",
) -> Tensor:
    """Positions of the names that a file lists, ascending: one name or path a line, a label after it is passed over.

    A path may have more or fewer folders above than ours (``train/n01440764/x.JPEG``); those that both have are equal,
    however their accents are stored.

    Args:
        key: that has named the file. among: where names have to be, for the sentence about one that is not.

    Raises:
        UserError: no such file, a hash that differs, names that are not in the set, stand there twice, or fit several
            images.
    """
    if not file.is_file():
        raise UserError(f"{key} is '{file}', which does not exist.")
    lines = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    if not lines:
        raise UserError(f"the list '{file}' names no image.")
    by_name: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        by_name.setdefault(re.split(r"[\\/]", composed(name))[-1], []).append(index)

    def find(line: str) -> list[int]:
        for entry in _without_label(line):
            path = _parts(entry)
            fitting = [i for i in by_name.get(path[-1], []) if _same_place(path, _parts(names[i]))]
            if fitting:
                return [i for i in fitting if _parts(names[i]) == path] or fitting
        return []

    found = [find(line) for line in lines]
    _verify(file, lines, sha256)
    missing = [line for line, each in zip(lines, found, strict=True) if not each]
    if missing:
        raise UserError(f"{len(missing)} of {len(lines)} names in '{file}' are not {among}: {_some(missing)}.")
    unclear = [line for line, each in zip(lines, found, strict=True) if len(each) > 1]
    if unclear:
        raise UserError(
            f"{len(unclear)} names in '{file}' fit several images: {_some(unclear)}; write class/name instead."
        )
    twice = [names[i] for i, n in Counter(each[0] for each in found).items() if n > 1]
    if twice:
        raise UserError(f"{len(twice)} images stand in '{file}' twice: {_some(twice)}.")
    return torch.tensor([each[0] for each in found], dtype=torch.int64).sort().values


def lines_of(names: Sequence[str]) -> str:
    """A list as `named` reads it, a name a line.

    Raises:
        UserError: a name that is no line of text.
    """
    for name in names:
        if name.splitlines() != [name.strip()] or not _is_text(name):
            raise UserError(f"'{shown(name)}' is a name that no line of a list can hold: give the file another one.")
    return "".join(f"{name}\n" for name in names)


def _is_text(name: str) -> bool:
    """Whether a name can be encoded: the bytes of some names are no text."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def list_digest(lines: Sequence[str]) -> str:
    """SHA-256 of the sorted file names, without folders, joined by line feeds."""
    names = sorted(re.split(r"[\s,]", line)[0].rsplit("/", 1)[-1] for line in lines)
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


def _without_label(line: str) -> list[str]:
    """What a line may name: all of it, or what stands before a last comma or space."""
    entries = (line, line.rpartition(",")[0], line.rsplit(maxsplit=1)[0].rstrip(","))
    return [entry for entry in entries if _parts(entry)]


def _parts(path: str) -> list[str]:
    return [part for part in composed(path).strip().replace("\\", "/").split("/") if part not in ("", ".")]


def _same_place(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether two paths agree in all the folders that both have."""
    return all(a == b for a, b in zip(reversed(one), reversed(other), strict=False))


def _verify(file: Path, lines: Sequence[str], sha256: str | None) -> None:
    if sha256 is None:
        return
    expected, got = PUBLISHED_LISTS.get(sha256, sha256.lower()), list_digest(lines)
    if expected != got:
        raise UserError(
            f"the list '{file}' ({len(lines)} names) has the SHA-256 {got[:12]}..., but labels.sha256={sha256} is "
            f"{expected[:12]}...: it is another list."
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names[:3]) + (", ..." if len(names) > 3 else "")
