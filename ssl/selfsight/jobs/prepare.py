"""`selfsight prepare`: a folder of images, made ready to be read fast."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from selfsight.errors import UserError, nearest
from selfsight.jobs.build import library
from selfsight.jobs.console import make_console
from selfsight.jobs.run_folder import write_atomically

ENCODINGS = ("jpeg", "raw")
SETTINGS = ("encode", "shortest", "quality", "per_shard")
#: JPEG files made between two looks at the clock
CHUNK = 64


def run(cfg: DictConfig) -> None:
    """Make ``out`` from ``source``. Every part is whole or absent, so that a stopped command can be repeated."""
    source, out = Path(cfg.source).expanduser(), Path(cfg.out).expanduser()
    settings = checked(cfg, source, out)
    paths = library("datamodules.folders").find_images(source)
    if not paths:
        raise UserError(f"'{source}' holds no images.")
    record: dict[str, Any] = {**settings, "source": str(source.resolve()), "images": len(paths), "finished": False}
    begin(out, record)
    workers = (os.cpu_count() or 1) if cfg.workers == "auto" else int(cfg.workers)
    size = settings["per_shard"] if cfg.encode == "raw" else CHUNK
    parts = [paths[start : start + size] for start in range(0, len(paths), size)]
    console = make_console()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # images are the parallelism
    columns = [TextColumn("preparing"), BarColumn(bar_width=None), MofNCompleteColumn(), TimeRemainingColumn()]
    unreadable: dict[str, str] = {}
    try:
        with (
            Progress(*columns, console=console, disable=not console.is_terminal) as bar,
            ThreadPoolExecutor(workers) as pool,
        ):
            task = bar.add_task("preparing", total=len(paths))
            made = shard if cfg.encode == "raw" else files
            jobs = [pool.submit(made, source, out, number, part, settings) for number, part in enumerate(parts)]
            try:
                for job, part in zip(jobs, parts, strict=True):
                    unreadable |= job.result()
                    bar.advance(task, len(part))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    except OSError as error:
        raise UserError(f"'{out}' cannot be written ({error.strerror}); repeat the command with more space.") from None
    finally:
        torch.set_num_threads(threads)
    if len(unreadable) > cfg.max_unreadable * len(paths) or len(unreadable) == len(paths):
        name, reason = next(iter(unreadable.items()))
        raise UserError(
            f"{len(unreadable)} of {len(paths)} files cannot be read as images, such as '{name}' ({reason}): "
            f"remove them, or tolerate a larger share with max_unreadable (now {cfg.max_unreadable:g})."
        )
    if cfg.encode == "raw":
        join_tables(out, len(parts))
    copy_labels(source, out, cfg.encode)
    before = sum((source / path).stat().st_size for path in paths)
    after = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    finished = {**record, "finished": True, "unreadable": unreadable, "bytes_before": before, "bytes_after": after}
    write_atomically(out / "prepared.json", json.dumps(finished, indent=2) + "\n")
    console.print(
        f"{len(paths) - len(unreadable):,} images, {before / 2**20:,.1f} → {after / 2**20:,.1f} MiB: "
        f"selfsight pretrain dataset=folder dataset.root={out}"
    )


def checked(cfg: DictConfig, source: Path, out: Path) -> dict[str, Any]:
    """The settings, each a value that can be worked with."""
    if cfg.encode not in ENCODINGS:
        choices = ", ".join(ENCODINGS)
        raise UserError(f"encode is '{cfg.encode}'; one of {choices}.{nearest(str(cfg.encode), ENCODINGS)}")
    if not source.is_dir():
        raise UserError(f"source is '{source}', which is no folder; name a folder of images.")
    if out.resolve().is_relative_to(source.resolve()):
        raise UserError(f"out is '{out}', inside the source, where it would be taken for images; name another folder.")
    for key, low, high in (("shortest", 1, 65_500), ("quality", 1, 100), ("per_shard", 1, 10**9)):
        value = cfg[key]
        if not (value is None and key == "shortest") and not (isinstance(value, int) and low <= value <= high):
            raise UserError(f"{key} is {value}; a whole number from {low} to {high} was expected.")
    return {key: cfg[key] for key in SETTINGS}


def begin(out: Path, record: dict[str, Any]) -> None:
    """Make the folder, or go on in one that the same command began.

    Raises:
        UserError: the folder holds something else, or was begun otherwise.
    """
    place = out / "prepared.json"
    if not place.is_file():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"out is '{out}', which exists and is not empty; name a new folder.")
        try:
            out.mkdir(parents=True, exist_ok=True)
            write_atomically(place, json.dumps(record, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"'{out}' cannot be made ({error.strerror}); name a folder you may write.") from None
        return
    begun = json.loads(place.read_text())
    for key in (*SETTINGS, "source", "images"):
        if begun.get(key) != record[key]:
            raise UserError(
                f"'{out}' was begun with {key}={begun.get(key)}, and now it is {record[key]}; name a new folder."
            )


def target_name(path: str) -> str:
    """A JPEG keeps its name, another file gets one more ending, so that no two become one."""
    return path if path.lower().endswith((".jpg", ".jpeg")) else path + ".jpg"


def files(source: Path, out: Path, number: int, paths: Sequence[str], settings: dict[str, Any]) -> dict[str, str]:
    """Write each image as a JPEG, unless it is there; the unreadable ones with the reason."""
    decode, prepared = library("datamodules.decode"), library("datamodules.prepared")
    unreadable = {}
    for path in paths:
        target = out / target_name(path)
        if target.is_file():
            continue
        try:
            image = decode.read_image(source / path)
        except decode.Unreadable as reason:
            unreadable[path] = str(reason)
            continue
        data = prepared.encode_jpeg(prepared.resized(image, settings["shortest"]), settings["quality"])
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(f".{target.name}.{os.getpid()}")
        beside.write_bytes(data)
        os.replace(beside, target)
    return unreadable


def shard(source: Path, out: Path, number: int, paths: Sequence[str], settings: dict[str, Any]) -> dict[str, str]:
    """Write the pixels of some images into one file, unless it is there; the unreadable ones with the reason."""
    decode, prepared = library("datamodules.decode"), library("datamodules.prepared")
    target = out / prepared.shard_name(number)
    table, reasons = target.with_suffix(".csv"), target.with_suffix(".json")
    if table.is_file():  # written last
        return dict(json.loads(reasons.read_text()))
    rows, unreadable, offset = [], {}, 0
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    with beside.open("wb") as shard_file:
        for path in paths:
            try:
                image = prepared.resized(decode.read_image(source / path), settings["shortest"])
            except decode.Unreadable as reason:
                unreadable[path] = str(reason)
                continue
            shard_file.write(image.tobytes())
            rows.append([Path(path).as_posix(), number, offset, *image.shape[:2]])
            offset += image.size
            (out / path).parent.mkdir(parents=True, exist_ok=True)  # folders keep their meaning: train, test, classes
    os.replace(beside, target)
    write_atomically(reasons, json.dumps(unreadable))
    with (lines := target.with_name(f".{table.name}.{os.getpid()}")).open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    os.replace(lines, table)
    return unreadable


def join_tables(out: Path, shards: int) -> None:
    """One table out of the shards' own, which then go."""
    prepared = library("datamodules.prepared")
    names = [out / prepared.shard_name(number) for number in range(shards)]
    if (out / prepared.TABLE).is_file():
        return
    write_atomically(out / prepared.TABLE, "".join(name.with_suffix(".csv").read_text() for name in names))


def copy_labels(source: Path, out: Path, encode: str) -> None:
    """``labels.csv`` of the source, with the new names."""
    table = source / "labels.csv"
    if not table.is_file():
        return
    if encode == "raw":
        shutil.copyfile(table, out / table.name)
        return
    with table.open(newline="", encoding="utf-8-sig") as file:
        rows = [
            [target_name(row[0].strip()) if (source / row[0].strip()).is_file() else row[0], *row[1:]]
            for row in csv.reader(file)
            if row
        ]
    with (out / table.name).open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
