"""`ImageData`: what a data set is, and which of it is kept in memory."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from selfsight.contracts import Targets
from selfsight.datamodules.datasets.checks import channels, shown
from selfsight.datamodules.datasets.copies import Looks, copies
from selfsight.datamodules.datasets.manifest import LIST, PARTS, Changes, Manifest, Part
from selfsight.datamodules.datasets.unreadable import UnreadableFiles
from selfsight.datamodules.images.archives import ArchiveImages
from selfsight.datamodules.images.bands import Bands
from selfsight.datamodules.images.decode import MAX_PIXELS, Unreadable, decode
from selfsight.datamodules.images.memory import fits_in_memory
from selfsight.datamodules.images.prepared import ShardImages
from selfsight.datamodules.images.sets import (
    GONE,
    ArrayImages,
    DecodedImages,
    Decoder,
    FileImages,
    GoneImages,
    ImageSet,
    JoinedImages,
    join,
    taken,
)
from selfsight.errors import UserError, nearest
from selfsight.validation import AUTO_SWITCH, expect, whole

log = logging.getLogger("selfsight")


@dataclass
class ImageData:
    """A data set: what is learned from, what is held out, and how its images are presented to a network.

    Attributes:
        name: short name for logs and tables.
        train: images to learn from; their labels may be None.
        test: held-out images, or None.
        classes: names of the classes by label; empty without labels.
        image_size: side of the square images evaluation sees (and default side of views), pixels.
        mean, std: of the RGB channels, images in [0, 1]; of other channels as `bands.scaled` gives them.
        unlabelled: further images to learn from, without labels, or None.
        eval_resize: shorter side before the central square of ``image_size`` is cut out for evaluation; None:
            ``image_size`` itself.
        unreadable: files that cannot be read, which are skipped.
        prepared: how the folder was re-encoded, where it was (see `prepared.record`).
        about_labels: where the labels of a folder are from, or why there are none.
        about: further lines that a run begins with: what was left out, which files cannot be read.
        root: folder of the data set; None for one that lies in no folder of the user's.
        found: the data set as it was found, before labels were hidden or a part of it was taken.
        bands: facts of images that are not RGB of eight bits; None for those that are.
        decoder: how the bytes of such an image are read.

    Raises:
        UserError: a value that cannot be worked with, or a single class.
    """

    name: str
    train: ImageSet
    test: ImageSet | None
    classes: tuple[str, ...]
    image_size: int
    mean: Sequence[float]
    std: Sequence[float]
    unlabelled: ImageSet | None = None
    eval_resize: int | None = None
    unreadable: UnreadableFiles = field(default_factory=lambda: UnreadableFiles(0.0))
    prepared: dict[str, Any] | None = None
    about_labels: str = ""
    about: tuple[str, ...] = ()
    root: Path | None = None
    found: Manifest | None = None
    bands: Bands | None = None
    decoder: Decoder | None = None

    def __post_init__(self) -> None:
        self._copies: dict[str, dict[int, int]] = {}
        self._joined: tuple[ImageSet, ImageSet | None, weakref.ref[ImageSet]] | None = None
        self.classes = tuple(self.classes)
        self.image_size = expect("dataset.image_size", self.image_size, whole(1))
        self.mean = channels("dataset.mean", self.mean, count=self.channels)
        self.std = channels("dataset.std", self.std, positive=True, count=self.channels)
        if self.eval_resize is not None and expect("dataset.eval_resize", self.eval_resize, whole(1)) < self.image_size:
            raise UserError(
                f"dataset.eval_resize is {self.eval_resize}, smaller than dataset.image_size={self.image_size}; "
                "choose at least that."
            )
        check_classes(self.name, self.classes)
        if self.found is None:
            parts = {name: Part.of_set(images) for name, images in self.parts().items()}
            self.found = Manifest(self.name, self.classes, tuple(self.mean), tuple(self.std), parts)

    def parts(self) -> dict[str, ImageSet]:
        """``train``, ``test`` and ``unlabelled``, as far as there are such images."""
        every = dict(zip(PARTS, (self.train, self.test, self.unlabelled), strict=True))
        return {name: images for name, images in every.items() if images is not None}

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def targets(self) -> Targets | None:
        """Those of the training images, where they have several labels or numbers in place of a class."""
        return self.train.targets

    @property
    def channels(self) -> int:
        """Channels of the images."""
        return 3 if self.bands is None else self.bands.kind.channels

    @property
    def num_images(self) -> int:
        """Images one may learn from."""
        return len(self.train) + (0 if self.unlabelled is None else len(self.unlabelled))

    def class_counts(self, part: str) -> list[int]:
        """Images of each class in ``train`` or ``test`` that have their label; zeros where there is no such part."""
        images = self.parts().get(part)
        labels = None if images is None else images.labels
        known = torch.zeros(0, dtype=torch.int64) if labels is None else labels[labels >= 0]
        return torch.bincount(known, minlength=self.num_classes).tolist()

    @property
    def held_out(self) -> bool:
        """Whether there are test images."""
        return self.test is not None and len(self.test) > 0

    @property
    def labelled(self) -> bool:
        """Whether anything can be measured by labels: training and test images have labels."""
        return all(
            part is not None and part.known is not None and bool(part.known.any()) for part in (self.train, self.test)
        )

    @property
    def facts(self) -> dict[str, Any]:
        """What does not depend on how the images are batched, see `ImageDataModule.facts`."""
        return {
            "num_classes": self.num_classes if self.targets is None else len(self.targets.names),
            "targets": self.targets,
            "classes": self.classes,
            "num_images": self.num_images,
            "image_size": self.image_size,
            "mean": list(self.mean),
            "std": list(self.std),
        }

    def decode(self, content: bytes) -> np.ndarray:
        """Any image as those of the data set are read, from the bytes of its file.

        Raises:
            Unreadable: it cannot be.
        """
        return decode(content) if self.decoder is None else self.decoder(content, MAX_PIXELS)

    def split(self, name: str) -> ImageSet:
        """The images called ``train``, ``test`` or ``unlabelled``.

        Raises:
            UserError: another name, or a part this data set does not have.
        """
        parts = {"train": self.train, "test": self.test, "unlabelled": self.unlabelled}
        if name not in parts:
            raise UserError(f"'{name}' is no part of a data set; one of {', '.join(parts)}.{nearest(name, parts)}")
        images = parts[name]
        if images is None:
            raise UserError(f"data set '{self.name}' has no {name} images.")
        return images

    def limited(self, n: int) -> ImageData:
        """The same with at most ``n`` images a part, evenly spaced over it: for tries, not for figures."""
        n = expect("limit_images", n, whole(1))

        def some(images: ImageSet | None) -> ImageSet | None:
            if images is None or len(images) <= n:
                return images
            return images.select(torch.linspace(0, len(images) - 1, n).long())

        train = some(self.train)
        assert train is not None
        return replace(self, train=train, test=some(self.test), unlabelled=some(self.unlabelled))

    def everything(self) -> ImageSet:
        """All images one may learn from: `train` and `unlabelled`. The same set as long as somebody has it."""
        train, unlabelled, joined = self._joined or (None, None, lambda: None)
        images = joined() if train is self.train and unlabelled is self.unlabelled else None
        if images is None:
            images = join(self.train, self.unlabelled)
            self._joined = self.train, self.unlabelled, weakref.ref(images)
        return images

    # --- copies of test images -----------------------------------------------------------------------------------

    def copies_of_test(self, part: str, looks: Looks | None = None) -> dict[int, int]:
        """The images of ``train`` or ``unlabelled`` that are test images too, with the position of the test image.

        Args:
            looks: see `copies`.
        """
        if part not in self._copies:
            images = self.parts().get(part)
            self._copies[part] = {} if images is None or self.test is None else copies(images, self.test, looks)
        return self._copies[part]

    def without_copies(self) -> ImageData:
        """The same without the images to learn from that are test images too.

        Raises:
            UserError: fewer than two images are left.
        """
        found = {part: self.copies_of_test(part) for part in ("train", "unlabelled")}
        total = sum(map(len, found.values()))
        if not total:
            return self

        def others(images: ImageSet | None, copied: Mapping[int, int]) -> ImageSet | None:
            if images is None or not copied:
                return images
            return images.select([i for i in range(len(images)) if i not in copied])

        train, unlabelled = others(self.train, found["train"]), others(self.unlabelled, found["unlabelled"])
        if train is None or len(train) < 2:
            raise UserError(
                f"{len(found['train']):,} of the {len(self.train):,} training images of '{self.name}' are copies of "
                "test images, and without them fewer than two are left: name a folder of others, dataset.root=DIR."
            )
        line = f"{total:,} cop{'ies' if total > 1 else 'y'} of test images left out of training"
        return replace(self, train=train, unlabelled=unlabelled or None, about=(*self.about, line))

    def warn_of_leaks(self, *parts: str) -> int:
        """Number of images of these parts (``unlabelled``) that are test images too; a warning names some of each."""
        count = 0
        for part in parts or ("unlabelled",):
            pairs = self.copies_of_test(part)
            count += len(pairs)
            if not pairs:
                continue
            images, (one, other) = self.split(part), next(iter(pairs.items()))
            kind = {"train": "training"}.get(part, part)
            log.warning(
                f"{len(pairs):,} of the {len(images):,} {kind} images of '{self.name}' are test images too, such as "
                f"'{self._address(part, one)}', which is '{self._address('test', other)}': they flatter the figures"
                + ("." if self.root is None else "; dataset.drop_copies=true leaves them out.")
            )
        return count

    def _address(self, part: str, index: int) -> str:
        """Where an image lies, for a sentence."""
        chosen = self.split(part).select([index])
        return shown(chosen.name(0) if self.root is None else chosen.addresses(self.root)[0])

    # --- a run's own images --------------------------------------------------------------------------------------

    def manifest(self) -> dict[str, Any]:
        """A record of the data set as it was found, of plain containers: what `compare` and `as_recorded` take."""
        assert self.found is not None
        return self.found.to_json()

    def fingerprint(self) -> str:
        """16 hexadecimal digits that differ where images, split, classes or statistics do."""
        assert self.found is not None
        return self.found.digest

    def compare(self, manifest: Manifest | Mapping[str, Any]) -> Changes:
        """What has changed since ``manifest`` was made."""
        assert self.found is not None
        return Manifest.of(manifest).compare(self.found)

    def warn_of_trained(self, manifest: Manifest | Mapping[str, Any]) -> int:
        """Number of test images that a run with ``manifest`` has learned from, by their files; a warning names one."""
        assert self.found is not None
        then = [image for image in Manifest.of(manifest).images().values() if image.part != "test" and image.print]
        learned = {image.print for image in then}
        both = [p for p, image in self.found.images().items() if image.part == "test" and image.print in learned]
        if both:
            log.warning(
                f"{len(both):,} test images of '{self.name}', such as '{shown(both[0])}', were trained on: figures on "
                "them will flatter."
            )
        return len(both)

    def as_recorded(self, manifest: Manifest | Mapping[str, Any]) -> ImageData:
        """The data set as it was when ``manifest`` was made, of the images that are there now.

        Parts, order, labels and classes are those of then; mean and std are those of now, unless they were computed
        from the images. New images are left out; those that are gone keep their places and cannot be read. A warning
        tells what has changed.

        Raises:
            UserError: images that are not known one by one have changed: test images may have been learned from. Or
                the list of images to learn from is another one.
        """
        then = Manifest.of(manifest)
        assert self.found is not None
        if then.rule.get(LIST) != self.found.rule.get(LIST):
            raise UserError(
                f"the list of images to learn from '{self.name}' (dataset.only) is another one than when the run "
                "began: put back the one of then, or begin a new run with this one."
            )
        changes = replace(self.compare(then), colours=False)
        return self._of_then(then, changes) if changes else self._with_facts(then)

    def _with_facts(self, then: Manifest) -> ImageData:
        """The same with the statistics of then, where they were computed from the images.

        Raises:
            UserError: the images had other channels or another type.
        """
        if self.bands is None or then.bands is None or tuple(self.mean) != self.bands.mean:
            return self
        facts = Bands.of(then.bands)
        if facts.kind != self.bands.kind:
            raise UserError(
                f"the images of '{self.name}' have {self.bands.kind} and had {facts.kind} when the run began: name the "
                "channels of then with dataset.channels."
            )
        return replace(self, bands=facts, mean=facts.mean, std=facts.std)

    def _of_then(self, then: Manifest, changes: Changes) -> ImageData:
        beginning = f"the images of '{self.name}' have changed since the run began: {changes}"
        if any(part.paths is None for part in then.parts.values()) or changes.parts:
            if changes.classes or not then.fixed or self.root is None:
                raise UserError(
                    f"{beginning}. Put back those the run was made with, or name a data set to work with what is there."
                )
            log.warning(f"{beginning}. Test images are those that were held out then.")
            return self._with_facts(then)
        log.warning(f"{beginning}. The run's own images, their split and their labels are used; new ones are left out.")
        assert self.root is not None
        sets = list(self.parts().values())
        there = {path: i for i, path in enumerate(path for images in sets for path in images.addresses(self.root))}
        gone = [(path, part.above) for part in then.parts.values() for path in part.paths or [] if path not in there]
        self.unreadable.expect((path, GONE) for path, _ in gone)
        sets.append(GoneImages([path.removeprefix(above) for path, above in gone]))
        places = there | {path: len(there) + i for i, (path, _) in enumerate(gone)}
        made = {
            name: _picked(sets, [places[path] for path in part.paths or []], part.labels, then.targets(name))
            for name, part in then.parts.items()
        }
        return replace(
            self._with_facts(then),
            train=made["train"],
            test=made.get("test"),
            unlabelled=made.get("unlabelled"),
            classes=then.classes,
            found=then,
        )


def _picked(
    sets: Sequence[ImageSet], places: Sequence[int], labels: Sequence[int] | None, targets: Targets | None
) -> ImageSet:
    """The images at ``places`` in the sets one after the other, with these labels and targets."""
    ends = np.cumsum([len(images) for images in sets])
    of = np.searchsorted(ends, places, side="right")
    if len(set(of.tolist())) == 1:
        which = int(of[0])
        picked = sets[which].select((np.asarray(places) - (ends[which] - len(sets[which]))).tolist())
    else:
        picked = JoinedImages(sets).select(list(places))
    picked.labels = None if labels is None else torch.tensor(labels, dtype=torch.int64)
    picked.targets = targets
    return picked


def check_classes(name: str, classes: Sequence[str]) -> None:
    """Refuse labels that are all the same."""
    if len(classes) == 1:
        raise UserError(
            f"all images of '{name}' that have a label are of one class, '{classes[0]}', and telling classes apart "
            "takes two: label images of another one, or set dataset.labels=none."
        )


def keep_in_memory(
    images: FileImages | ShardImages | ArchiveImages, resident: bool | str, bad: UnreadableFiles
) -> ImageSet:
    """The same images decoded once and for all, where asked for and where they fit.

    ``resident`` is True, False, or ``auto``: when they take less than `SMALL` bytes. Files that cannot be read are left
    out and noted in ``bad``. Images of one size become `ArrayImages`.

    Raises:
        UserError: another word for ``resident``, or too many unreadable files.
    """
    expect("dataset.resident", resident, AUTO_SWITCH)
    if resident is False or not len(images):
        return images
    probe = [_try_to_read(images, i) for i in range(0, len(images), max(1, len(images) // 16))]
    sizes = [image.nbytes for image in probe if isinstance(image, np.ndarray)]
    expected = int(np.mean(sizes) * len(images)) if sizes else 0
    if resident == "auto" and (expected > SMALL or isinstance(images, ShardImages)):
        return images
    if not fits_in_memory(2 * expected, f"the decoded images of {images.root}"):
        return images
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        read = list(pool.map(lambda i: _try_to_read(images, i), range(len(images))))
    bad.add((images.name(i), reason) for i, reason in enumerate(read) if isinstance(reason, str))
    kept = [i for i, image in enumerate(read) if isinstance(image, np.ndarray)]
    arrays = [image for image in read if isinstance(image, np.ndarray)]
    rows = torch.tensor(kept, dtype=torch.int64)
    names, labels = [images.name(i) for i in kept], taken(images.labels, rows)
    root = images.root if isinstance(images, FileImages) else None
    decoded: ImageSet
    if not arrays:
        return images.select([])
    if len({array.shape for array in arrays}) == 1:
        decoded = ArrayImages(torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous(), labels, names, root)
    else:
        decoded = DecodedImages(arrays, labels, names, root)
    decoded.targets = taken(images.targets, rows)
    return decoded


#: bytes of decoded images that are kept in memory without being asked
SMALL = 2**28


def _try_to_read(images: ImageSet, index: int) -> np.ndarray | str:
    try:
        return images.read(index)
    except Unreadable as reason:
        return str(reason)
