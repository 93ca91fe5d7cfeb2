"""Files of a data set that turn out to be no images."""

from __future__ import annotations

import itertools
import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from selfsight.datamodules.datasets.checks import shown
from selfsight.errors import UserError
from selfsight.validation import SHARE, expect

log = logging.getLogger("selfsight")

#: files that go bad while a run reads them and are told one by one
WARNED = 3
#: files that a refusal names, at most
NAMED = 5


class UnreadableFiles:
    """Files that turned out to be no images: counted by kind, named in a file, tolerated up to a share of all files.

    One is tolerated in any folder, however small, unless the share is 0.
    """

    def __init__(self, share: float, files: int = 0) -> None:
        self.share, self.files = expect("dataset.max_unreadable", share, SHARE), files
        self.reasons: dict[str, str] = {}
        self.report: Path | None = None
        self._warned = 0

    def __len__(self) -> int:
        return len(self.reasons)

    def write_to(self, report: Path) -> None:
        """Name the files in ``report``: those met so far and those to come. Nothing is written while there are none."""
        self.report = report
        self._write(self.reasons.items())

    def kinds(self) -> Counter[str]:
        """How many there are of each reason; what a reason says of a single file after a colon is left aside."""
        return Counter(reason.partition(":")[0] for reason in self.reasons.values())

    def __str__(self) -> str:
        """``12 unreadable files: 8 incomplete image, 4 empty file``; one by its name; nothing where there are none."""
        if len(self) == 1:
            return "1 unreadable file, '{}': {}".format(*map(shown, next(iter(self.reasons.items()))))
        told = ", ".join(f"{number:,} {kind}" for kind, number in self.kinds().most_common())
        return f"{len(self):,} unreadable files: {told}" if told else ""

    def expect(self, found: Iterable[tuple[str, str]]) -> None:
        """Note files that a run has known of from its start: they are named, and count for nothing."""
        new = {name: reason for name, reason in found if name not in self.reasons}
        self.reasons |= new
        self._write(new.items())

    def add(self, found: Iterable[tuple[str, str]]) -> None:
        """Note files by name and reason; raises `UserError` when there are now more than the tolerated share."""
        new = {name: reason for name, reason in found if name not in self.reasons}
        if not new:
            return
        self.reasons |= new
        self._write(new.items())
        if self.report is not None and self._warned < WARNED:  # a run has begun, and had seen them whole
            self._warned += 1
            name, reason = next(iter(new.items()))
            log.warning(
                f"'{shown(name)}' cannot be read ({reason}) and is passed over; {self.report} names all such files."
            )
        if too_many(len(self), self.share, self.files):
            raise self._refusal(f"{len(self)} of {self.files}", new)

    def add_sample(self, found: Mapping[str, str], looked_at: int) -> None:
        """Refuse, by a sample of ``looked_at`` files, images most of which cannot be read; else note them."""
        if len(found) > max(0.5, self.share) * looked_at:
            raise self._refusal(f"{len(found)} of a sample of {looked_at}", found)
        self.add(found.items())

    def _refusal(self, count: str, found: Mapping[str, str]) -> UserError:
        such = ", ".join(f"'{shown(name)}' ({reason})" for name, reason in itertools.islice(found.items(), NAMED))
        where = f" (all are named in {self.report})" if self.report is not None else ""
        kinds = self.kinds().most_common()
        by_kind = f"; by kind: {', '.join(f'{n:,} {kind}' for kind, n in kinds)}" if len(kinds) > 1 else ""
        return UserError(
            f"{count} files cannot be read as images, such as {such}{where}: "
            f"remove them, or tolerate a larger share with dataset.max_unreadable (now {self.share:g}){by_kind}."
        )

    def _write(self, found: Iterable[tuple[str, str]]) -> None:
        if self.report is None:
            return
        # Earlier processes of a resumed run, and the other processes of this one, may have named them already. Names
        # are written as the bytes that they are: not all are text. One line each, whatever is in them.
        known = set(self.report.read_bytes().split(b"\n")) if self.report.exists() else set()
        named = (_one_line(os.fsencode(name)) + f"\t{reason}".encode() for name, reason in found)
        lines = [line for line in named if line not in known]
        if lines:
            with self.report.open("ab") as file:
                file.writelines(line + b"\n" for line in lines)


def too_many(unreadable: int, share: float, files: int) -> bool:
    """Whether more of the files cannot be read than this share of them, or all. A single one is no reason to stop."""
    tolerated = max(1, share * files) if share else 0
    return unreadable > tolerated or unreadable == files


def _one_line(name: bytes) -> bytes:
    for character, mark in ((b"\n", b"\\n"), (b"\r", b"\\r"), (b"\t", b"\\t")):
        name = name.replace(character, mark)
    return name
