"""Any folder of images as a data set: class folders, a list of labels, or no label at all."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from selfsight.datamodules.datasets import checks, manifest
from selfsight.datamodules.datasets.containers import finder, remote_images, shards_in
from selfsight.datamodules.datasets.dataset import ImageData, check_classes, keep_in_memory
from selfsight.datamodules.datasets.inspection import (
    CHECKED,
    damage,
    kinds_in_archives,
    kinds_of,
    looks_at,
    without_damaged,
)
from selfsight.datamodules.datasets.labels import Labeller, Labels
from selfsight.datamodules.datasets.lists import named
from selfsight.datamodules.datasets.manifest import LIST, Manifest
from selfsight.datamodules.datasets.parts import (
    Part,
    existing_folder,
    find_parts,
    path_above,
)
from selfsight.datamodules.datasets.search import (
    find_images,
    told,
)
from selfsight.datamodules.datasets.splits import hold_out, hold_out_by_name
from selfsight.datamodules.datasets.unreadable import UnreadableFiles
from selfsight.datamodules.images import bands, dicom
from selfsight.datamodules.images.archives import ArchiveImages, Archives
from selfsight.datamodules.images.bands import Kind
from selfsight.datamodules.images.decode import MAX_PIXELS
from selfsight.datamodules.images.formats import OF_MANY, Look
from selfsight.datamodules.images.prepared import ShardImages, Shards, record
from selfsight.datamodules.images.remote import Remote, cache_folder, is_url
from selfsight.datamodules.images.sets import FileImages, ImageSet, join, taken
from selfsight.errors import UserError
from selfsight.validation import AUTO_SWITCH, SWITCH, expect, one_of, whole
from selfsight.validation import above as positive

__all__ = ["find_images", "folder"]

log = logging.getLogger("selfsight")

#: mean and std of ImageNet, images in [0, 1]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
#: what decides which images are held out
SPLITS = ("hash", "draw")


def folder(
    root: str | Path | None = None,
    *,
    image_size: int = 96,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    labels: str = "auto",
    task: str = "auto",
    test: str | Path | None = None,
    test_fraction: float = 0.1,
    split: str = "hash",
    unlabelled: str | Path | None = None,
    only: str | Path | None = None,
    drop_copies: bool = False,
    resident: bool | str = "auto",
    max_unreadable: float = 0.01,
    max_pixels: int = MAX_PIXELS,
    channels: str | int | Sequence[int] = "auto",
    window: dicom.Window = None,
    tars: bool | str = "auto",
    cache: str | Path | None = None,
    cache_gb: float = 20,
    seed: int = 0,
    eval_resize: int | None = None,
    name: str = "folder",
) -> ImageData:
    """The images below a folder, in any depth.

    Args:
        root: the folder. With a folder ``train`` in it (or one of `parts.TRAIN_FOLDERS`) beside a ``test`` or ``val``
            (or one of `parts.TEST_FOLDERS`), these two are what is learned from and what is held out. A ``train`` that
            holds all images is taken as the root. Also an URL, ``http(s)://``, ``s3://`` or ``gs://``: of a folder of
            images (`remote_files`), of one of tar files that its server lists, of a tar file, or of several
            (``…/train-{000..099}.tar``), see `remote`.
        labels: ``folders``: the first folder below the root is the class. ``none``: no labels. A path, relative to the
            root: a CSV file of ``path,label``, with paths relative to the root, too; images it does not name, or gives
            an empty label or -1, have none. It may name the test images as well. ``auto``: ``labels.csv`` if there is
            one in the root, or, with paths relative to it, in the folder of the part; folders, if there are at least
            two and no image lies outside them; else none.
        task: what such a file holds: ``classes``, one an image; ``multilabel``, any number of labels (``dog|sea``, or
            columns of 0 and 1); ``regression``, numbers; ``auto``: what it looks like, see `tables.Table`.
        test: a folder of held-out images (relative to the root, or absolute), labelled by the same rule.
        test_fraction: without a test folder, the share of the images held out, by ``seed``; 0: none.
        split: which images these are. ``hash``: each by its name alone (`splits.hold_out_by_name`), so that a folder
            that grows keeps its test images. ``draw``: drawn from the list of all (`splits.hold_out`), as many of every
            class in proportion, as version 0.1 did; one image more, and others are held out.
        unlabelled: a folder of further images without labels; by default one of `parts.UNLABELLED_FOLDERS`, where it
            lies in the folder, or in that of the images to learn from, and there is no ``labels.csv``.
        only: a text file of the images to learn from, one path a line, seen from the root or with fewer folders above;
            all others but those held out are left aside. What is held out does not depend on it.
        drop_copies: leave out of training what is a copy of a test image; otherwise they are counted and named alone.
        resident: keep the decoded images in memory: True, False, or ``auto`` (when they are small).
        max_unreadable: share of the files that may be no readable images, one in any folder unless it is 0; they are
            skipped, and a run names them in ``unreadable.txt``.
        max_pixels: of the largest image that is read: a file of a few bytes may claim any number.
        channels: ``auto``: RGB of eight bits where all files are colour or grey images of eight bits, else all channels
            that they have, in their own type (see `images.bands`). ``rgb``: RGB of eight bits whatever they are. A
            number: the first so many channels. A list such as ``[3, 2, 1]``: these, counted from 1, in this order.
        window: of the grey values of DICOM files, which come out from 0 to 1: ``[centre, width]`` in the units of the
            files, ``auto`` for the one that each states, None for values as they are; see `images.dicom`.
        tars: read the images in the tar files below the folder, in WebDataset's form: True, False, or ``auto`` (where
            nothing else lies there). Their classes are those of the ``.cls`` members beside them, if there are any.
        cache: folder where what was fetched of an URL is kept; None: the user's folder for caches.
        cache_gb: gigabytes that it may take there.
        seed: of what is held out.
        image_size, eval_resize, mean, std, name: see `ImageData`. 224 suits large photographs and a large backbone;
            mean and std are ImageNet's; of images that are not RGB of eight bits they are computed instead, unless
            others are given.

    Raises:
        UserError: no such folder, no images in it, one image, too many unreadable files, a wrong list of labels or of
            images to learn from, images of several kinds.
    """
    if root is None or root == "":
        raise UserError("dataset=folder has to know where the images are: add dataset.root=DIR.")
    expect("dataset.split", split, one_of(*SPLITS))
    expect("dataset.drop_copies", drop_copies, SWITCH)
    expect("dataset.max_pixels", max_pixels, whole(1))
    expect("dataset.channels", channels, checks.CHANNELS)
    expect("dataset.window", window, dicom.WINDOW)
    expect("dataset.tars", tars, AUTO_SWITCH)
    expect("dataset.cache_gb", cache_gb, positive(0))
    shards: Shards | Archives | None
    if is_url(root):
        shards = remote_images(str(root), tars, cache_folder(cache), int(cache_gb * 10**9))
        top = shards.root
    else:
        top = checks.path("dataset.root", root)
        alone = top.is_file() and tars is True and top.suffix.lower() in OF_MANY
        top, archive = (top.parent, top.name) if alone else (existing_folder("dataset.root", top), None)
        shards = shards_in(top, tars, cache_folder(cache), archive)
    bad = UnreadableFiles(max_unreadable)
    labeller = Labeller(
        top,
        labels,
        Path.is_file if shards is None else shards.holds,
        shards.names_of_classes if isinstance(shards, Archives) else None,
        task,
        shards.origin if isinstance(shards, Archives) else "",
    )
    virtual = shards.folders if isinstance(shards, Archives) else None
    train, test_part, extra = find_parts(top, test, unlabelled, finder(shards), virtual)
    parts = [part for part in (train, test_part, extra) if part is not None]
    bad.files = sum(len(part.paths) + len(part.found.broken) for part in parts)
    looks: dict[str, Look] = {}  # at every file, by its path seen from the top
    bad.add(item for part in parts for item in part.found.broken.items())
    seen = [looks_at(part) if shards is None and bad.files <= CHECKED else None for part in parts]
    kinds: dict[Kind | None, list[str]] = {None: []}
    if channels != "rgb" and not isinstance(shards, Shards):
        kinds = kinds_of(parts, seen, window) if shards is None else kinds_in_archives(parts, shards, window)
    decoder = bands.decoder(channels, kinds, window)
    for part, each in zip(parts, seen, strict=True):
        if each is not None:
            part.paths = without_damaged(part, bad, each, lambda place: damage(place, max_pixels, decoder))
            looks.update((path_above(part, top) + path, one) for path, one in each.items())
    if len(train.paths) < 2:
        raise UserError(f"'{train.place}' holds {len(train.paths)} image; there has to be more than one to learn from.")

    known = labeller(train.place, train.paths)
    if is_url(root):  # a person knows it by its address
        known = replace(known, origin=known.origin.replace(str(top), str(root).rstrip("/")))
    if known.suspicious:
        log.warning(f"no image has a label: {known.origin}.")
    test_known = None if test_part is None or known.known is None else _label_test(test_part, labeller, known)
    labeller.check_tables()
    check_classes(name, known.classes)

    def read(part: Part, known: Labels | None = None) -> ImageSet:
        labels = None if known is None else known.labels
        images: FileImages | ArchiveImages | ShardImages
        if isinstance(shards, Archives):
            images = shards.images(part.place, part.paths, labels, max_pixels, decoder)
        elif shards is not None:
            images = shards.images(part.place, part.paths, labels)
        else:
            images = FileImages(part.place, part.paths, labels, max_pixels, decoder)
        images.targets = None if known is None else known.targets
        return keep_in_memory(images, resident, bad)

    images, further = read(train, known), list[ImageSet]()
    if (of := images.known) is not None and not bool(of.all()):
        further.append(images.select((~of).nonzero().flatten()))
        images = images.select(of.nonzero().flatten())
    if extra is not None:
        further.append(read(extra))

    held: ImageSet | None = None
    if test_part is not None:
        held = read(test_part, test_known)
    elif test_fraction and split == "draw":
        kept, chosen = hold_out(images.labels, len(images), test_fraction, seed)
        images, held = images.select(kept), images.select(chosen)
    elif test_fraction:
        names = [images.name(i) for i in range(len(images))]
        kept, chosen = hold_out_by_name(names, images.labels, test_fraction, seed)
        images, held = images.select(kept), images.select(chosen)

    total = sum(map(len, (images, *further)))
    rule = {"split": split, "test_fraction": test_fraction, "seed": seed, "drop_copies": drop_copies}
    if only is not None:
        (images, *further), rule[LIST] = _those_listed(checks.path("dataset.only", only), top, [images, *further])
    more = join(*further) if any(map(len, further)) else None
    if more is not None:
        more.labels = more.targets = None
    facts = None if decoder is None else bands.measure(images, decoder.made)
    if facts is not None and tuple(mean) == IMAGENET_MEAN and tuple(std) == IMAGENET_STD:  # those of other images
        mean, std = facts.mean, facts.std
    data = ImageData(
        name,
        images,
        held,
        known.classes,
        image_size,
        mean,
        std,
        more,
        eval_resize,
        unreadable=bad,
        prepared=record(top),
        about_labels=f"labels from {known.origin}" if known.known is not None else f"no labels: {known.origin}",
        about=tuple(filter(None, (told([part.found for part in parts]), str(bad)))),
        root=top,
        bands=facts,
        decoder=decoder,
    )
    if extra is not None and unlabelled is None:
        line = f"{len(extra.paths):,} images without labels in '{extra.place}', which is no class"
        data = replace(data, about=(*data.about, line))
    remote = isinstance(shards, Archives) and isinstance(shards.store, Remote)
    if remote:
        data = replace(data, about=(*data.about, "copies of test images are not looked for in what lies elsewhere"))
    if only is not None:
        line = f"{data.num_images:,} of {total:,} images to learn from, those in '{only}'"
        data = replace(data, about=(*data.about, line))
    copied = {} if remote else _copies(data, looks)
    if drop_copies and not remote:
        data = data.without_copies()
    elif not remote:
        data.warn_of_leaks("train", "unlabelled")
    fixed = test_part is not None or held is None or split == "hash"
    above = {"train": path_above(train, top), "test": path_above(test_part or train, top), "unlabelled": ""}
    return replace(data, found=_found(data, looks, above, rule, fixed, copied))


def _those_listed(file: Path, top: Path, sets: Sequence[ImageSet]) -> tuple[list[ImageSet], str]:
    """Of the images to learn from, and of those without labels, the ones that a file names; and a digest of the list.

    The digest is of the paths that there are: the same list written in another way is the same.

    Raises:
        UserError: see `lists.named`; fewer than two of the first set are left.
    """
    every = [path for images in sets for path in images.addresses(top)]
    among = "among the images to learn from (those held out are none)"
    chosen = named(every, file, key="dataset.only", among=among)
    ends = torch.tensor([0, *(len(images) for images in sets)]).cumsum(0).tolist()
    kept = [chosen[(chosen >= low) & (chosen < high)] - low for low, high in itertools.pairwise(ends)]
    if len(kept[0]) < 2:
        what = "images with a label" if len(sets) > 1 else "images"
        raise UserError(f"'{file}' (dataset.only) names {len(kept[0])} of the {what} to learn from; name two or more.")
    digest = manifest.Part.of_files([every[i] for i in chosen.tolist()], None).digest
    return [images.select(rows) for images, rows in zip(sets, kept, strict=True)], digest


# --- the record ------------------------------------------------------------------------------------------------------


def _copies(data: ImageData, looks: Mapping[str, Look]) -> dict[str, list[tuple[str, str]]]:
    """By part, the paths of the images that are test images too, each with that of the test image."""
    top = data.root
    assert top is not None

    def looks_of(images: ImageSet) -> list[Look]:
        return [looks.get(path, Look(False)) for path in images.addresses(top)]

    found = {part: data.copies_of_test(part, looks_of if looks else None) for part in ("train", "unlabelled")}
    copied = {part: pairs for part, pairs in found.items() if pairs}
    paths = {part: data.split(part).addresses(top) for part in (*copied, "test") if copied}
    return {part: [(paths[part][a], paths["test"][b]) for a, b in pairs.items()] for part, pairs in copied.items()}


def _found(
    data: ImageData,
    looks: Mapping[str, Look],
    above: Mapping[str, str],
    rule: dict[str, Any],
    fixed: bool,
    copied: dict[str, list[tuple[str, str]]],
) -> Manifest:
    """What is kept of the folder in a run; see `Manifest`."""
    parts = {}
    for part, images in data.parts().items():
        paths = images.addresses(data.root or Path())
        prints = [looks[path].print if path in looks else "" for path in paths] if looks else None
        parts[part] = manifest.Part.of_files(paths, images.labels, prints, above[part], images.targets)
    bands = None if data.bands is None else data.bands.to_json()
    return Manifest(
        data.name,
        data.classes,
        tuple(data.mean),
        tuple(data.std),
        parts,
        rule,
        fixed,
        copied,
        bands,
        manifest.Columns.of(data.targets),
    )


def _label_test(part: Part, labeller: Labeller, like: Labels) -> Labels | None:
    """Labels of held-out images; those without a label among others are taken out of ``part``."""
    found = labeller(part.place, part.paths, like)
    known = [] if found.known is None else found.known.nonzero().flatten().tolist()
    if not known or (found.targets is None) != (like.targets is None):
        log.warning(
            f"the test images in '{part.place}' have no labels, so that nothing can be measured which needs them: sort "
            "them into class folders as those to learn from, or list them in labels.csv."
        )
        return None
    if len(known) < len(part.paths):
        log.warning(f"{len(part.paths) - len(known)} test images in '{part.place}' have no label and are left out.")
        part.paths = [part.paths[i] for i in known]
    rows = torch.tensor(known)
    return replace(found, labels=taken(found.labels, rows), targets=taken(found.targets, rows))
