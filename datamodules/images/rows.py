"""Images in the rows of tables and arrays: parquet and arrow files of Hugging Face's ``datasets``, and HDF5 files."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from selfsight.datamodules.images.archives import Archives
from selfsight.datamodules.images.formats import Unreadable
from selfsight.errors import UserError
from selfsight.files import replace

#: names of columns, or arrays, of images and of their classes where nothing else tells
IMAGES, LABELS = (
    ("image", "images", "img", "x", "data", "pixels"),
    ("label", "labels", "cls", "class", "y", "fine_label"),
)
_SPLIT = re.compile(r"(train|test|validation|valid|val)[-_.]")
FEWEST_SIDES = 3
#: bytes that one stored byte may stand for: deflate's limit
MOST_COMPRESSED = 1032


def split_of(file: str) -> str:
    """The folder that stands before the names of images: ``train/`` for ``data/train-00000-of-00002.parquet``."""
    folder, _, name = file.rpartition("/")
    found = _SPLIT.match(name)
    return f"{found[1]}/" if found else f"{folder}/" if folder else ""


# --- parquet and arrow -----------------------------------------------------------------------------------------------


class TableFiles:
    """The rows of parquet and arrow files; see `archives.Store`.

    Rows of parquet lie compressed in groups: such a file is turned once into one of arrow, which is mapped.

    Args:
        cache: a folder for what parquet files are turned into.

    Attributes:
        columns: of the images, file by file.
    """

    def __init__(self, root: Path, files: Sequence[str], cache: Path) -> None:
        self.root, self.files, self.cache = root, list(files), cache
        self.columns: list[str] = []
        self._tables: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_tables": {}}

    def table(self, file: int) -> Any:
        """All of a file, mapped."""
        if file not in self._tables:
            self._tables[file] = _mapped(self.root / self.files[file], self.cache)
        return self._tables[file]

    def content(self, place: Sequence[int]) -> bytes:
        """The bytes of the image in file and row."""
        file, row = place
        value = self.table(file).column(self.columns[file])[row].as_py()
        content = value.get("bytes") if isinstance(value, dict) else value
        if content is None:
            raise Unreadable("a row without the bytes of an image")
        return bytes(content)

    def stored_size(self, place: Sequence[int]) -> None:
        return None


class TableShards(Archives):
    """The images in the parquet and arrow files below a folder, as Hugging Face's ``datasets`` writes them.

    The column of images, that of classes and their names are what the file says of itself, else what their names and
    types say. An image is called by its path in the row, else by its file and row.

    Raises:
        UserError: the package is missing, a file is damaged, or has no column of images.
    """

    def __init__(self, root: Path, files: Sequence[str], cache: Path) -> None:
        try:
            import pyarrow  # noqa: F401 - whether it is there
        except ImportError:
            raise UserError(f"'{root / files[0]}' takes a package: pip install 'selfsight[parquet]'.") from None
        rows = TableFiles(root, files, cache)
        super().__init__(root, rows, "the tables")
        self.folders = sorted({split_of(file).split("/")[0] for file in files} - {""})
        for number, file in enumerate(files):
            with _damage_told(root / file):
                self._add(rows, number, file)

    def _add(self, rows: TableFiles, number: int, file: str) -> None:
        table = rows.table(number)
        image, label, names = _columns(table.schema, self.root / file)
        rows.columns.append(image)
        if names and self.classes not in ([], names):
            raise UserError(f"'{self.root / file}' has other classes than the files before it: read them one by one.")
        self.classes = names or self.classes
        import pyarrow

        column = table.column(image)
        has_paths = pyarrow.types.is_struct(column.type) and column.type.get_field_index("path") >= 0
        paths = [None] * len(table)
        if has_paths:
            paths = pyarrow.compute.struct_field(column, "path").to_pylist()
        whole = None not in paths and len(set(paths)) == len(paths)
        labels = table.column(label).to_pylist() if label is not None else [None] * len(table)
        stem = Path(file).stem
        for row, (path, known) in enumerate(zip(paths, labels, strict=True)):
            name = split_of(file) + (str(path) if whole else f"{stem}/{row:07}")
            self._places[name] = (number, row)
            if isinstance(known, int) and known >= 0:
                self._labels[name] = known


def _columns(schema: Any, file: Path) -> tuple[str, str | None, list[str]]:
    """The column of images, that of their classes or None, and the names of these."""
    import pyarrow

    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        features = {}
    kinds = {name: each.get("_type") for name, each in features.items() if isinstance(each, dict)}
    of_bytes = [
        field.name
        for field in schema
        if pyarrow.types.is_binary(field.type)
        or pyarrow.types.is_large_binary(field.type)
        or (pyarrow.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0)
    ]
    stated = [name for name, kind in kinds.items() if kind == "Image" and name in of_bytes]
    images = stated or [name for name in of_bytes if name.lower() in IMAGES] or (of_bytes if len(of_bytes) == 1 else [])
    if not images:
        raise UserError(f"'{file}' has no column of images among {', '.join(schema.names)}: one of bytes is expected.")
    whole = [field.name for field in schema if pyarrow.types.is_integer(field.type)]
    classes = [name for name, kind in kinds.items() if kind == "ClassLabel" and name in whole]
    labels = classes or [name for name in whole if name.lower() in LABELS]
    names = features[labels[0]].get("names", []) if classes else []
    return images[0], labels[0] if labels else None, [str(name) for name in names]


def _mapped(path: Path, cache: Path) -> Any:
    """The table in an arrow file, or of a parquet file that has been turned into one."""
    import pyarrow
    from pyarrow import ipc, parquet

    try:
        if path.suffix == ".parquet":
            about = path.stat()
            key = f"{path.resolve()} {about.st_size} {about.st_mtime_ns}".encode()
            turned = cache / "tables" / f"{hashlib.sha256(key).hexdigest()[:16]}.arrow"
            if not turned.is_file():
                turned.parent.mkdir(parents=True, exist_ok=True)
                with parquet.ParquetFile(path) as file:

                    def write(beside: Path) -> None:
                        with ipc.new_file(os.fspath(beside), file.schema_arrow) as out:
                            for batch in file.iter_batches(1024):
                                out.write_batch(batch)

                    replace(turned, write)
            path = turned
        source = pyarrow.memory_map(os.fspath(path))
        try:
            return ipc.open_file(source).read_all()
        except pyarrow.ArrowInvalid:  # as a stream, which `datasets` writes
            source.seek(0)
            return ipc.open_stream(source).read_all()
    except (pyarrow.ArrowException, OSError) as error:
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or ["damaged"])[0]
        raise UserError(f"'{path}' cannot be read as a table ({reason.rstrip('.')}): copy it again.") from None


@contextlib.contextmanager
def _damage_told(path: Path) -> Iterator[None]:
    """Whatever a library stumbles over in a damaged file becomes a sentence."""
    try:
        yield
    except (UserError, ImportError):
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(f"'{path}' cannot be read ({reason}): copy it again.") from error


# --- HDF5 ------------------------------------------------------------------------------------------------------------


class ArrayFiles:
    """The rows of arrays in HDF5 files; see `archives.Store`. The content of an image is that of a file of its own."""

    def __init__(self, root: Path, files: Sequence[str]) -> None:
        self.root, self.files = root, list(files)
        self.arrays: list[tuple[int, str]] = []
        self._opened: dict[int, Any] = {}
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": {}}

    def file(self, number: int) -> Any:
        """A file, opened in this process."""
        import h5py

        if self._process != os.getpid():  # what was opened before a fork is of the other process
            self._opened, self._process = {}, os.getpid()
        if number not in self._opened:
            path = self.root / self.files[number]
            try:
                self._opened[number] = h5py.File(path, "r")
            except OSError as error:
                raise UserError(f"'{path}' is no HDF5 file, or a damaged one: copy it again.") from error
        return self._opened[number]

    def content(self, place: Sequence[int]) -> bytes:
        """The image in array and row, as a PGM or PPM file where it has eight bits and one or three channels."""
        number, name = self.arrays[place[0]]
        return as_file(np.asarray(self.file(number)[name][place[1]]))

    def stored_size(self, place: Sequence[int]) -> None:
        return None


class ArrayShards(Archives):
    """The images in HDF5 files: arrays ``[N, H, W]``, ``[N, H, W, C]`` or ``[N, C, H, W]``, with an array of N classes.

    A group ``train`` beside a ``test`` is as two folders of these names. Names of classes are the attribute ``classes``
    of their array.

    Raises:
        UserError: the package is missing, a file is damaged, has no array of images, or classes of another number.
    """

    def __init__(self, root: Path, files: Sequence[str]) -> None:
        try:
            import h5py  # noqa: F401 - whether it is there
        except ImportError:
            raise UserError(f"'{root / files[0]}' takes a package: pip install 'selfsight[hdf5]'.") from None
        arrays = ArrayFiles(root, files)
        super().__init__(root, arrays, "the arrays")
        found: set[str] = set()
        for number, file in enumerate(files):
            with _damage_told(root / file):
                found |= self._add_file(arrays, number, file)
        self.folders = sorted(found - {""})

    def _add_file(self, arrays: ArrayFiles, number: int, file: str) -> set[str]:
        """Add the images of a file; the folders that they are in."""
        opened = arrays.file(number)
        there = _arrays(opened)
        images = {name: shape for name, shape in there.items() if _is_of_images(name, shape, there)}
        if not images:
            told = ", ".join(f"{name} {list(shape)}" for name, shape in there.items()) or "none"
            raise UserError(
                f"'{self.root / file}' has no array of images [N, H, W] or [N, H, W, C] called {', '.join(IMAGES)}; "
                f"its arrays are {told}."
            )
        found = set()
        for name, shape in images.items():
            stored = opened[name].id.get_storage_size()
            if shape[0] > MOST_COMPRESSED * stored:
                raise UserError(
                    f"'{name}' in '{self.root / file}' claims {shape[0]} images and holds {stored} bytes: it is "
                    "damaged, or was never filled."
                )
            group = name.rpartition("/")[0]
            before = f"{group}/" if group else split_of(file)
            found.add(before.split("/")[0])
            self._add(arrays, number, name, shape[0], f"{before}{Path(file).stem}")
        return found

    def _add(self, arrays: ArrayFiles, number: int, name: str, count: int, before: str) -> None:
        file, group = arrays.file(number), name.rpartition("/")[0]
        beside = {each.rpartition("/")[2].lower(): each for each in _arrays(file) if each.rpartition("/")[0] == group}
        label = next((beside[each] for each in LABELS if each in beside), None)
        numbers = None if label is None else np.asarray(file[label]).reshape(-1)
        if label is not None and numbers is not None:
            if len(numbers) != count or numbers.dtype.kind not in "iu":
                raise UserError(
                    f"'{label}' in '{file.filename}' holds {len(numbers)} values of {numbers.dtype}, where the whole "
                    f"numbers of the classes of {count} images were expected."
                )
            names = [
                each.decode() if isinstance(each, bytes) else str(each) for each in file[label].attrs.get("classes", [])
            ]
            self.classes = names or self.classes
        arrays.arrays.append((number, name))
        for row in range(count):
            path = f"{before}/{row:07}"
            self._places[path] = (len(arrays.arrays) - 1, row)
            if numbers is not None and numbers[row] >= 0:
                self._labels[path] = int(numbers[row])


def _arrays(file: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of all arrays in an HDF5 file by their paths."""
    found: dict[str, tuple[int, ...]] = {}
    file.visititems(lambda name, each: found.update({name: each.shape}) if hasattr(each, "shape") else None)
    return found


def _is_of_images(name: str, shape: tuple[int, ...], every: dict[str, tuple[int, ...]]) -> bool:
    large = [each for each, sides in every.items() if len(sides) in (FEWEST_SIDES, FEWEST_SIDES + 1)]
    return name in large and (name.rpartition("/")[2].lower() in IMAGES or len(large) == 1)


def as_file(image: np.ndarray) -> bytes:
    """An image ``[H, W]``, ``[H, W, C]`` or ``[C, H, W]`` as a file: PGM or PPM where these hold it, else npy."""
    if image.dtype == np.uint8 and image.ndim == 3 and image.shape[0] in (1, 3) and image.shape[0] < image.shape[-1]:
        image = np.moveaxis(image, 0, -1)
    if image.dtype == np.uint8 and image.ndim == 3 and image.shape[-1] == 1:
        image = image[..., 0]
    if image.dtype == np.uint8 and (image.ndim == 2 or image.shape[-1] == 3):
        height, width = image.shape[:2]
        return f"P{5 if image.ndim == 2 else 6}\n{width} {height}\n255\n".encode() + image.tobytes()
    file = io.BytesIO()
    np.lib.format.write_array(file, image, allow_pickle=False)
    return file.getvalue()
