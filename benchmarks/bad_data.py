"""Trains on a folder of which a share is bad, in every way that files are, and holds what is told against the truth.

python benchmarks/bad_data.py --files 10000

The command line trains on small images in class folders, 3 % of them bad or odd. When the first epoch is over further
images are cut, emptied, removed and replaced by pipes under its hands. Every file that is no image has to be named by
its reason, no other one may be, all epochs have to be there, and nothing may wait: a pipe has no writer.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import socket
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from selfsight.runs.folder import RunFolder

SIDE = 24
CLASSES = ("blue", "green", "red")
PATIENCE = 1800.0  # seconds until a training is given up
EPOCHS = 3
SETTINGS = (
    "method=simsiam", "dataset=folder", "dataset.channels=rgb", f"dataset.image_size={SIDE}", "dataset.resident=false",
    "dataset.max_unreadable=0.05", "backbone=resnet_digits", "batch_size=64", "trainer.accelerator=cpu",
    "trainer.devices=1", f"trainer.max_epochs={EPOCHS}", "report=false", "evaluator.final={}",
)  # fmt: skip
#: a file of the kernel's that nobody may read, whoever asks; and one that answers with an error of the disk
CLOSED, BROKEN = Path("/proc/sys/vm/drop_caches"), Path("/proc/self/mem")


def image(draw: np.random.Generator, of: int = 0, side: int = SIDE) -> Image.Image:
    """Noise in which the channel of its class is the largest."""
    pixels = draw.integers(0, 80, (side, side, 3))
    pixels[..., 2 - of] += 120
    return Image.fromarray(pixels.astype(np.uint8))


def encoded(picture: Image.Image, form: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def bomb(side: int) -> bytes:
    """A black PNG of one bit a pixel: kilobytes that claim a gigabyte of colours."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    pixels = zlib.compress(bytes((1 + side // 8) * side))
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


class Kind(NamedTuple):
    """A way to be bad or odd.

    Attributes:
        name: of the file, with ``{}`` for its number.
        make: writes it there.
        reason: how it is told (its beginning); empty where it is an image.
    """

    name: str
    make: Callable[[Path], object]
    reason: str = ""


def kinds(draw: np.random.Generator) -> dict[str, Kind]:
    """Every kind, by what it is called."""
    huge = bomb(20_000)
    exif = Image.Exif()
    exif[0x112] = 6
    frames = {"save_all": True, "append_images": [image(draw, 1), image(draw, 2)]}
    deep = Image.fromarray(draw.integers(0, 65535, (SIDE, SIDE), dtype=np.uint16))

    def content(data: bytes) -> Callable[[Path], object]:
        return lambda path: path.write_bytes(data)

    def listening(path: Path) -> None:
        here = os.getcwd()
        os.chdir(path.parent)  # a socket's whole path has to be short
        try:
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(path.name)
        finally:
            os.chdir(here)

    def closed(path: Path) -> None:
        path.write_bytes(encoded(image(draw)))
        path.chmod(0)
        if os.access(path, os.R_OK):  # of the administrator
            path.unlink()
            path.symlink_to(CLOSED)

    whole = encoded(image(draw))
    return {
        "cut JPEG": Kind("cut{}.jpg", content(whole[: len(whole) // 2]), "incomplete image"),
        "cut PNG": Kind("cut{}.png", content(encoded(image(draw), "PNG")[:-400]), "incomplete image"),
        "empty": Kind("empty{}.jpg", Path.touch, "empty file"),
        "text": Kind("text{}.jpg", content(b"this is no image\n"), "no image"),
        "bomb": Kind("bomb{}.png", content(huge), "too many pixels"),
        "link to itself": Kind("circle{}.jpg", lambda path: path.symlink_to(path.name), "a link in a circle"),
        "link to nothing": Kind("gone{}.jpg", lambda path: path.symlink_to("nowhere.jpg"), "No such file"),
        "link to a device": Kind("zero{}.jpg", lambda path: path.symlink_to("/dev/zero"), "a device, no file"),
        "unreadable": Kind("closed{}.jpg", closed, "Permission denied"),
        "error of the disk": Kind("disk{}.jpg", lambda path: path.symlink_to(BROKEN), "Input/output error"),
        "pipe": Kind("pipe{}.jpg", os.mkfifo, "a pipe, no file"),
        "socket": Kind("socket{}.jpg", listening, "a socket, no file"),
        "bad name, text": Kind("text\udce9\udcff{}.jpg", content(b"no"), "no image"),
        "newline name, text": Kind("new\nline\t{}.jpg", content(b"no"), "no image"),
        "1x1": Kind("one{}.png", content(encoded(image(draw, side=1), "PNG"))),
        "animated": Kind("moving{}.gif", content(encoded(image(draw), "GIF", **frames))),
        "CMYK": Kind("cmyk{}.jpg", content(encoded(image(draw).convert("CMYK")))),
        "16 bits": Kind("deep{}.png", content(encoded(deep, "PNG"))),
        "palette": Kind("palette{}.png", content(encoded(image(draw).convert("P"), "PNG"))),
        "rotated by EXIF": Kind("turned{}.jpg", content(encoded(image(draw).resize((20, 40)), exif=exif))),
        "bad name": Kind("caf\udce9\udcff{}.png", content(encoded(image(draw), "PNG"))),
        "newline name": Kind("new\nline{}.png", content(encoded(image(draw), "PNG"))),
        "folder": Kind("folder{}.jpg", Path.mkdir),
        "link to its folder": Kind("loop{}", lambda path: path.symlink_to(".")),
    }


class Made(NamedTuple):
    """The files of a folder, by their paths in it: those that are images like others, and the kinds of the others."""

    good: list[str]
    odd: dict[str, str]


def make(root: Path, files: int, share: float, draw: np.random.Generator) -> Made:
    """A folder of so many files, of which a share is bad or odd, as many of each kind as of any other."""
    for name in CLASSES:
        (root / name).mkdir(parents=True)
    made, every = Made([], {}), kinds(draw)
    for number in range(round(share * files)):
        kind, place = list(every)[number % len(every)], CLASSES[number % len(CLASSES)]
        path = root / place / every[kind].name.format(number)
        every[kind].make(path)
        made.odd[str(path.relative_to(root))] = kind
    for number in range(files - len(made.odd)):
        of = number % len(CLASSES)
        path = root / CLASSES[of] / f"{number:06d}.jpg"
        path.write_bytes(encoded(image(draw, of)))
        made.good.append(str(path.relative_to(root)))
    return made


def spoil(root: Path, paths: Sequence[str]) -> dict[str, str]:
    """Cut, empty, remove and replace these images by pipes, in turn; by path what they are then."""

    def replace(path: Path) -> None:
        path.unlink()
        os.mkfifo(path)

    ways: dict[str, Callable[[Path], object]] = {
        "incomplete image": lambda path: path.write_bytes(path.read_bytes()[:200]),
        "empty file": lambda path: path.write_bytes(b""),
        "No such file": Path.unlink,
        "a pipe, no file": replace,
    }
    told = {path: list(ways)[i % len(ways)] for i, path in enumerate(paths)}
    for path, reason in told.items():
        ways[reason](root / path)
    return told


class Outcome(NamedTuple):
    """What became of a training.

    Attributes:
        status: of the process. said: its output. epochs: rows of metrics.csv. peak: memory of the largest process, MiB.
        told: the reasons of unreadable.txt by path.
    """

    status: int
    said: str
    epochs: int
    peak: float
    told: dict[str, str]


def train(root: Path, runs: Path, words: Sequence[str], spoiled: Callable[[], object] = lambda: None) -> Outcome:
    """Train on the folder, and call ``spoiled`` when the first epoch is over.

    Raises:
        TimeoutError: it does not come to its end; with what it said.
    """
    typed = ["pretrain", *SETTINGS, f"dataset.root={root}", f"runs={runs}", "name=run", *words]
    folder, said, deadline = RunFolder(runs / "run"), runs / "said.txt", time.monotonic() + PATIENCE
    runs.mkdir(parents=True, exist_ok=True)
    with said.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "selfsight.cli", *typed], stdout=output, stderr=subprocess.STDOUT
        )
        begun, ended, status = False, 0, 0
        while not ended:
            if time.monotonic() > deadline:
                process.kill()
                raise TimeoutError(said.read_text(errors="replace"))
            if not begun and folder.metrics.exists():
                begun = True
                spoiled()
            time.sleep(0.02)
            ended, status, used = os.wait4(process.pid, os.WNOHANG)
        process.returncode = os.waitstatus_to_exitcode(status)
    report = folder.path / "unreadable.txt"
    lines = os.fsdecode(report.read_bytes()).splitlines() if report.exists() else []
    told = dict(line.split("\t", 1) for line in lines)
    epochs = len(folder.read_metrics()) if folder.metrics.exists() else 0
    return Outcome(process.returncode, said.read_text(errors="replace"), epochs, used.ru_maxrss / 1024, told)


def in_one_line(path: str) -> str:
    """A path as unreadable.txt has it."""
    return path.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")


def wrong(outcome: Outcome, expected: dict[str, str]) -> list[str]:
    """In what a training differs from one that told of these files by these reasons and of no other, and went on."""
    found = [f"exit status {outcome.status}: {outcome.said[-2000:]}"] if outcome.status else []
    if outcome.epochs != EPOCHS:
        found.append(f"{outcome.epochs} of {EPOCHS} epochs")
    expected = {in_one_line(path): reason for path, reason in expected.items()}
    for path in sorted(expected.keys() | outcome.told.keys()):
        reason, told = expected.get(path, "nothing"), outcome.told.get(path, "nothing")
        if not told.startswith(reason):
            found.append(f"{path!r}: {reason} expected, {told} told")
    return found


def check(place: Path, files: int, share: float, seed: int, words: Sequence[str]) -> tuple[Outcome, list[str], str]:
    """Make a folder, train on it, spoil it meanwhile.

    Returns:
        What became of it, what is wrong, and the kinds in words.
    """
    root, draw = place / "images", np.random.default_rng(seed)
    made = make(root, files, share, draw)
    every = kinds(draw)
    expected = {path: every[kind].reason for path, kind in made.odd.items() if every[kind].reason}
    victims = random.Random(seed).sample(made.good, max(4, files // 500))
    outcome = train(root, place / "runs", words, lambda: expected.update(spoil(root, victims)))
    counts = ", ".join(f"{n} {kind}" for kind, n in Counter(made.odd.values()).items())
    return outcome, wrong(outcome, expected), f"{counts}; {len(victims)} spoiled after the first epoch"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--share", type=float, default=0.03, help="of the files that are bad or odd")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--words", nargs="*", default=[], help="further words of the command, such as num_workers=2")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        clean, amiss, _ = check(Path(place) / "clean", options.files, 0, options.seed, options.words)
        outcome, found, told = check(Path(place) / "bad", options.files, options.share, options.seed, options.words)
    print(told)
    print(f"told: {', '.join(f'{n} {reason}' for reason, n in counted(outcome).most_common())}")
    print(f"peak memory {outcome.peak:.0f} MiB, without bad files from the start {clean.peak:.0f} MiB")
    print("\n".join([*amiss, *found]) or f"{outcome.epochs} epochs, {len(outcome.told)} files named, none wrongly")
    sys.exit(bool(amiss or found))


def counted(outcome: Outcome) -> Counter[str]:
    """How many files were told by each reason."""
    return Counter(reason.partition(":")[0] for reason in outcome.told.values())


if __name__ == "__main__":
    main()
