"""TensorFlow's checkpoints read without TensorFlow: ``NAME.index`` beside ``NAME.data-00000-of-00001``.

The index is a sorted table of LevelDB's making: blocks of entries whose keys share prefixes, an index of the blocks,
and a footer of 48 bytes that says where that lies. Its values are protocol buffers (tensor_bundle.proto): the first,
under the empty key, is the header, every other one says type, shape and place of a tensor in the data files.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from selfsight.errors import UserError

MAGIC = bytes.fromhex("57fb808b247547db")  # the last eight bytes of the index
FOOTER = 48

#: numbers of types.proto that tensors of networks have; bfloat16 is read as its 16 bits
TYPES = {
    1: "<f4", 2: "<f8", 3: "<i4", 4: "u1", 5: "<i2", 6: "i1", 9: "<i8", 10: "?", 14: "<u2", 17: "<u2", 19: "<f2",
    22: "<u4", 23: "<u8",
}  # fmt: skip
BFLOAT16, STRING = 14, 7


def prefix_of(path: str | Path) -> Path | None:
    """``NAME`` where ``NAME.index`` is a file, told from the path of the index, of the data, or from ``NAME`` itself.

    A folder with one index in it will do as well. None: there is no such file.
    """
    path = Path(path)
    if path.is_dir():
        found = sorted(path.glob("*.index"))
        return found[0].with_suffix("") if len(found) == 1 else None
    name = path.name.removesuffix(".index").split(".data-")[0]
    return path.with_name(name) if path.with_name(f"{name}.index").is_file() else None


def read_bundle(prefix: str | Path) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint by name; texts are left out.

    Args:
        prefix: ``NAME`` of ``NAME.index``.

    Raises:
        UserError: a file is missing, cut off, or of a kind that is not read here.
    """
    prefix = Path(prefix)
    index = prefix.with_name(f"{prefix.name}.index")
    table = _table(index.read_bytes(), index)
    header = _message(table.pop("", b""))
    shards = int(header.get(1, [1])[0])
    if header.get(2, [0])[0]:
        raise UserError(f"'{index}' was written on a big-endian machine, which is not read here; write it again.")
    data: dict[int, np.ndarray] = {}
    found = {}
    for name, value in table.items():
        entry = _message(value)
        kind, shard = entry.get(1, [0])[0], entry.get(3, [0])[0]
        if kind == STRING:
            continue
        if kind not in TYPES or 7 in entry:
            what = "in slices" if 7 in entry else f"of TensorFlow's type {kind}"
            raise UserError(f"'{name}' in '{index}' is stored {what}, which is not read here; save it whole, as float.")
        if shard not in data:
            file = prefix.with_name(f"{prefix.name}.data-{shard:05d}-of-{shards:05d}")
            if not file.is_file():
                raise UserError(f"'{index}' needs '{file.name}' beside it, which is not there; copy it there, too.")
            data[shard] = np.memmap(file, np.uint8, "r") if file.stat().st_size else np.empty(0, np.uint8)
        start, size = entry.get(4, [0])[0], entry.get(5, [0])[0]
        dims = _message(entry[2][0]).get(2, []) if 2 in entry else []
        shape = [_message(dim).get(1, [0])[0] for dim in dims]
        if start + size > len(data[shard]) or size != np.dtype(TYPES[kind]).itemsize * int(np.prod(shape)):
            raise UserError(f"The data of '{prefix}' ends before '{name}' does: it is cut off; copy it again.")
        raw = np.array(data[shard][start : start + size]).view(TYPES[kind]).reshape(shape)
        found[name] = (raw.astype(np.uint32) << 16).view(np.float32) if kind == BFLOAT16 else raw
    return found


def _table(content: bytes, file: Path) -> dict[str, bytes]:
    """Keys and values of a sorted table."""
    if len(content) < FOOTER or content[-8:] != MAGIC:
        raise UserError(f"'{file}' is no index of a TensorFlow checkpoint, or it is cut off; copy it again.")
    try:
        footer = content[-FOOTER:]
        _, at = _handle(footer, 0)
        blocks, _ = _handle(footer, at)
        places = [_handle(value, 0)[0] for _, value in _entries(_block(content, blocks))]
        return {k.decode(): v for place in places for k, v in _entries(_block(content, place))}
    except (IndexError, struct.error, UnicodeDecodeError):
        raise UserError(f"'{file}' is damaged; copy it again.") from None
    except NotImplementedError:
        raise UserError(f"'{file}' is compressed, which is not read here; save it again with TensorFlow.") from None


def _block(content: bytes, place: tuple[int, int]) -> bytes:
    start, size = place
    if content[start + size]:  # the byte behind a block says how it is compressed
        raise NotImplementedError
    return content[start : start + size]


def _entries(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of a block; behind them lie the places where keys are whole, and their number."""
    (restarts,) = struct.unpack("<I", block[-4:])
    at, end, key = 0, len(block) - 4 - 4 * restarts, b""
    while at < end:
        shared, at = _varint(block, at)
        own, at = _varint(block, at)
        size, at = _varint(block, at)
        key = key[:shared] + block[at : at + own]
        at += own
        yield key, block[at : at + size]
        at += size


def _handle(data: bytes, at: int) -> tuple[tuple[int, int], int]:
    start, at = _varint(data, at)
    size, at = _varint(data, at)
    return (start, size), at


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _message(data: bytes) -> dict[int, list[Any]]:
    """The fields of a protocol buffer by number: whole numbers, or bytes."""
    fields: dict[int, list[Any]] = {}
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        value: Any
        if wire == 0:
            value, at = _varint(data, at)
        else:
            size, at = _varint(data, at) if wire == 2 else ({1: 8, 5: 4}[wire], at)
            value, at = data[at : at + size], at + size
        fields.setdefault(number, []).append(value)
    return fields
