"""What a data set was when a run began: kept in the folder of the run, which goes on with the same images."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selfsight.contracts import Targets
from selfsight.datamodules.datasets.checks import shown
from selfsight.datamodules.images.sets import ImageSet
from selfsight.errors import UserError

VERSION = 1
#: images of a part that are listed one by one; of more only number and digest are kept
LISTED = 100_000
#: copies that are named
NAMED = 1000


@dataclass(frozen=True)
class Part:
    """The images of a part of a data set.

    Attributes:
        count: their number.
        digest: of paths, prints and labels in their order.
        paths: seen from the folder of the data set; None where they are not kept.
        prints: by which each file is known again, see `formats.Look`; None where that was not looked for.
        labels: of each image by number, -1 for none; None where no image has one.
        above: what stands before the names of the images in ``paths``.
        targets: of each image, see `Columns`, None for what is not known; None where no image has any.
    """

    count: int
    digest: str
    paths: list[str] | None = None
    prints: list[str] | None = None
    labels: list[int] | None = None
    above: str = ""
    targets: list[list[float | None]] | None = None

    @classmethod
    def of_files(
        cls,
        paths: Sequence[str],
        labels: Tensor | None,
        prints: Sequence[str] | None = None,
        above: str = "",
        targets: Targets | None = None,
    ) -> Part:
        content = [*paths, *(prints or ())]
        known = labels if targets is None else targets.values
        digest = _hashed("\n".join(content).encode(errors="surrogateescape"), known)
        if len(paths) > LISTED:
            return cls(len(paths), digest)
        numbers = None if labels is None else labels.tolist()
        rows = None if targets is None else targets.values.tolist()
        values = None if rows is None else [[None if math.isnan(v) else v for v in row] for row in rows]
        return cls(len(paths), digest, list(paths), None if prints is None else list(prints), numbers, above, values)

    @classmethod
    def of_set(cls, images: ImageSet) -> Part:
        """Of images that are no files of the user's: how many there are, and their labels."""
        return cls(len(images), _hashed(b"", images.labels))


@dataclass(frozen=True)
class Columns:
    """What the targets of a data set are; see `Targets`."""

    names: tuple[str, ...]
    kind: str

    @classmethod
    def of(cls, targets: Targets | None) -> Columns | None:
        return None if targets is None else cls(targets.names, targets.kind)


def _hashed(content: bytes, labels: Tensor | None) -> str:
    made = hashlib.blake2b(content, digest_size=8)
    made.update(b"" if labels is None else labels.numpy().tobytes())
    return made.hexdigest()


@dataclass(frozen=True)
class Changes:
    """What has become of the images of a run. False where nothing has.

    Attributes:
        new: paths of images that were not there. gone: of those that are no more.
        altered: of those with other contents.
        relabelled: of those whose class is another one now.
        held_out: of those learned from then that would be test images now. learned: the other way round.
        parts: those whose images are not known one by one, and are others: name, number then, number now.
        classes: whether their names or their order differ. colours: whether mean or std do.
    """

    new: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    altered: list[str] = field(default_factory=list)
    relabelled: list[str] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)
    learned: list[str] = field(default_factory=list)
    parts: list[tuple[str, int, int]] = field(default_factory=list)
    classes: bool = False
    colours: bool = False

    def __bool__(self) -> bool:
        return any(vars(self).values())

    def counts(self) -> dict[str, int]:
        """How many images are ``new``, ``gone``, ``altered``, ``relabelled``, ``held_out`` and ``learned``."""
        return {key: len(value) for key, value in vars(self).items() if isinstance(value, list) and key != "parts"}

    def __str__(self) -> str:
        """``1 new, 2 gone, 0 altered, such as 'a/9.png'``."""
        told = [f"{then:,} {part} images then, {now:,} now" for part, then, now in self.parts]
        if any(self.counts().values()):
            told += [f"{len(self.new):,} new", f"{len(self.gone):,} gone", f"{len(self.altered):,} altered"]
        told += [f"{len(self.relabelled):,} with another label"] if self.relabelled else []
        moved = len(self.held_out) + len(self.learned)
        told += [f"{moved:,} on the other side of the split"] if moved else []
        told += ["other classes"] if self.classes else []
        told += ["another mean or std"] if self.colours else []
        some = next(iter([*self.new, *self.gone, *self.altered, *self.relabelled, *self.held_out, *self.learned]), None)
        return ", ".join(told) + ("" if some is None else f", such as '{shown(some)}'")


@dataclass(frozen=True)
class Manifest:
    """A data set as it was found.

    Attributes:
        name, classes, mean, std: see `ImageData`.
        parts: ``train``, ``test`` and ``unlabelled``, as far as there are such images.
        rule: how it was made: what decided which images are held out.
        fixed: whether that rule keeps a test image on its side whatever is added to the others.
        copies: how many images of a part are test images, too, and which: path, path of the test image.
        bands: facts of images that are not RGB of eight bits (`Bands.to_json`); None for those that are.
        columns: of the targets of its images; None where they have none.
    """

    name: str
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    parts: dict[str, Part]
    rule: dict[str, Any] = field(default_factory=dict)
    fixed: bool = True
    copies: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    bands: dict[str, Any] | None = None
    columns: Columns | None = None

    def targets(self, part: str) -> Targets | None:
        """Those of the images of a part, where they are known one by one; None where there are none."""
        values = self.parts[part].targets
        if values is None or self.columns is None:
            return None
        numbers = [[math.nan if v is None else v for v in row] for row in values]
        return Targets(torch.tensor(numbers, dtype=torch.float32), self.columns.names, self.columns.kind)

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that differ where classes, statistics, or the images of a part do."""
        about: list[Any] = [self.classes, self.mean, self.std, {name: part.digest for name, part in self.parts.items()}]
        if self.columns is not None:
            about.append(asdict(self.columns))
        return hashlib.blake2b(json.dumps(about).encode(), digest_size=8).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """As plain containers: what `read` reads."""
        content = asdict(self)
        content["copies"] = {part: {"count": len(each), "named": each[:NAMED]} for part, each in self.copies.items()}
        return {"version": VERSION, "digest": self.digest, **content}

    @classmethod
    def of(cls, content: Manifest | Mapping[str, Any]) -> Manifest:
        """What `to_json` gave.

        Raises:
            UserError: it is something else.
        """
        if isinstance(content, Manifest):
            return content
        try:
            columns = content.get("columns")
            made = cls(
                str(content["name"]),
                tuple(map(str, content["classes"])),
                tuple(map(float, content["mean"])),
                tuple(map(float, content["std"])),
                {str(name): Part(**part) for name, part in content["parts"].items()},
                dict(content["rule"]),
                bool(content["fixed"]),
                {part: [(one, other) for one, other in each["named"]] for part, each in content["copies"].items()},
                content.get("bands"),
                Columns(tuple(map(str, columns["names"])), str(columns["kind"])) if columns else None,
            )
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UserError(
                "the record of the images of a run (data.json) is damaged: delete it to do without."
            ) from None
        if content.get("version", 0) > VERSION or made.digest != content.get("digest"):
            raise UserError(
                "the record of the images of a run (data.json) was altered, or is of a newer version: delete it to do "
                "without."
            )
        return made

    @classmethod
    def read(cls, path: Path) -> Manifest | None:
        """The one in a file; None where there is no such file.

        Raises:
            UserError: see `of`.
        """
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            content = {}
        return cls.of(content if isinstance(content, dict) else {})

    def compare(self, now: Manifest) -> Changes:
        """What has changed from this one to another of the same data set."""
        classes, colours = self.classes != now.classes, (self.mean, self.std) != (now.mean, now.std)
        if any(part.paths is None for part in (*self.parts.values(), *now.parts.values())):
            nothing = Part(0, "")
            pairs = {name: (self.parts.get(name, nothing), now.parts.get(name, nothing)) for name in PARTS}
            parts = [(name, a.count, b.count) for name, (a, b) in pairs.items() if a.digest != b.digest]
            return Changes(parts=parts, classes=classes, colours=colours)
        then, here = self.images(), now.images()
        both = [(path, then[path], here[path]) for path in then if path in here]
        return Changes(
            new=[path for path in here if path not in then],
            gone=[path for path in then if path not in here],
            altered=[path for path, a, b in both if a.print and b.print and a.print != b.print],
            relabelled=[path for path, a, b in both if a.label != b.label],
            held_out=[path for path, a, b in both if a.part != "test" and b.part == "test"],
            learned=[path for path, a, b in both if a.part == "test" and b.part != "test"],
            classes=classes,
            colours=colours,
        )

    def images(self) -> dict[str, Image]:
        """All images by their paths."""
        found = {}
        for name, part in self.parts.items():
            paths = part.paths or []
            labels, prints = part.labels or [-1] * len(paths), part.prints or [""] * len(paths)
            for place, path in enumerate(paths):
                label = self.classes[labels[place]] if 0 <= labels[place] < len(self.classes) else None
                if part.targets is not None:
                    label = str(part.targets[place])
                found[path] = Image(name, place, prints[place], label)
        return found


@dataclass(frozen=True)
class Image:
    """An image in a manifest: its part and place in it, its print, and the name of its class, or its targets."""

    part: str
    place: int
    print: str
    label: str | None


PARTS = ("train", "test", "unlabelled")
#: in the rule of a folder whose images to learn from are listed: the digest of their paths
LIST = "only"
