"""Files and words of any content: read, or refused in a sentence; never another exception, never without an end.

``SELFSIGHT_FUZZ=5000 python -m pytest tests/security/test_fuzz.py`` looks at more of them, others every time.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from selfsight import cli
from selfsight.composition.overrides import checked, finish, load
from selfsight.datamodules import folder
from selfsight.datamodules.datasets.lists import listed
from selfsight.datamodules.datasets.splits import LabelSplit
from selfsight.datamodules.datasets.tables import Table
from selfsight.datamodules.images import bands, formats
from selfsight.datamodules.images.decode import decode
from selfsight.datamodules.images.formats import Unreadable
from selfsight.datamodules.images.sets import FileImages
from selfsight.datamodules.images.tars import LocalTars
from selfsight.errors import UserError
from selfsight.jobs.launch import check

from ..data.test_dicom import dicom
from ..data.writers import encoded, picture, write_pictures

MANY = os.environ.get("SELFSIGHT_FUZZ")
MOST = 100_000  # pixels: what a damaged header claims is refused before it is made


def examples(number: int) -> Any:
    """So many of them, the same ones every time; of a run by hand as many as that asks for, and others."""
    return settings(
        max_examples=int(MANY or number),
        derandomize=not MANY,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """The bytes with a few places overwritten, cut out, doubled or cut off; more often at the beginning."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.one_of(st.integers(0, min(64, len(data))), st.integers(0, len(data))))
        how = draw(st.sampled_from(["overwrite", "number", "remove", "double", "cut"]))
        length = draw(st.integers(1, 12))
        if how == "overwrite":
            data[at : at + length] = draw(st.binary(min_size=length, max_size=length))
        elif how == "number":
            data[at : at + 4] = draw(
                st.sampled_from([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\1"])
            )
        elif how == "remove":
            del data[at : at + length]
        elif how == "double":
            data[at:at] = data[at : at + length]
        else:
            del data[at:]
    return bytes(data)


def whole_images() -> dict[str, bytes]:
    colours = picture(0)
    array, arrays = io.BytesIO(), io.BytesIO()
    np.save(array, colours)
    np.savez(arrays, image=colours)
    deep = Image.fromarray(picture(1, channels=1).astype(np.uint16) * 257)
    moving = {"save_all": True, "append_images": [Image.fromarray(picture(2))]}
    turned = Image.Exif()
    turned[0x112] = 6
    return {
        **{kind: encoded(colours, kind) for kind in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000")},
        "16 bits": encoded(deep, "PNG"),
        "deep TIFF": encoded(deep, "TIFF"),
        "palette": encoded(Image.fromarray(colours).convert("P"), "PNG"),
        "CMYK": encoded(Image.fromarray(colours).convert("CMYK")),
        "moving": encoded(Image.fromarray(colours), "PNG", **moving),
        "turned": encoded(colours, exif=turned),
        "npy": array.getvalue(),
        "npz": arrays.getvalue(),
        "DICOM": dicom(picture(3, channels=1).astype(np.uint16)),
    }


IMAGES = whole_images()


@pytest.mark.filterwarnings("ignore")
@examples(120)
@given(content=st.one_of(st.sampled_from(list(IMAGES)).flatmap(lambda kind: damaged(IMAGES[kind])), st.binary()))
def test_images(content: bytes) -> None:
    for read in (decode, bands.decode_bands):
        try:
            image = read(content, MOST)
        except Unreadable:
            continue
        assert image.ndim == 3
        assert image.shape[0] * image.shape[1] <= MOST
        if read is decode:
            assert (image.dtype, image.shape[2]) == (np.uint8, 3)
    bands.kind_of_bytes(content)
    with place() as root:
        (root / "file").write_bytes(content)
        formats.look(root / "file")
        bands.kind_of_file(root / "file")


@contextlib.contextmanager
def place() -> Iterator[Path]:
    """An empty folder, which is gone afterwards."""
    with tempfile.TemporaryDirectory() as made:
        yield Path(made)


# --- tables and lists ------------------------------------------------------------------------------------------------

NAMES = ["sea/1.png", "sea/2.png", "wood/3.png", "wood/é.png", "4.png"]
CELL = st.one_of(
    st.sampled_from(
        [*NAMES, "path", "label", "-1", "0", "1", "2.5", "nan", "1e999", "a|b", "|", "", '"', "../4.png", "/"]
    ),
    st.text("ab,\"'|;\\/\t\r\n\0 é\ud800\u2028\x85-.01", max_size=6),
)
LINES = st.lists(st.lists(CELL, min_size=1, max_size=4).map(",".join), max_size=6)
TEXT = st.one_of(
    st.tuples(LINES, st.sampled_from(["\n", "\r\n", "\r"])).map(lambda made: made[1].join(made[0])), st.text()
).map(lambda text: text.encode("utf-8", "surrogatepass"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    write_pictures(root, NAMES, height=8, width=8)
    return root


@examples(150)
@given(content=TEXT, task=st.sampled_from(["auto", "classes", "multilabel", "regression"]))
def test_tables_of_labels(photos: Path, content: bytes, task: str) -> None:
    file = photos / "table.csv"
    file.write_bytes(content)
    try:
        table = Table(file, photos, task=task)
        if table.columns:
            assert len(table.targets(photos, NAMES)) == len(NAMES)
        else:
            assert len(table.names(photos, NAMES)) == len(NAMES)
        table.check_rest()
    except UserError:
        pass
    finally:
        file.unlink()


@examples(10)
@given(content=TEXT)
def test_folders_with_such_a_table(photos: Path, content: bytes) -> None:
    (photos / "labels.csv").write_bytes(content)
    with contextlib.suppress(UserError):
        assert len(folder(photos, test_fraction=0).train) > 1
    (photos / "labels.csv").unlink()


@examples(100)
@given(content=TEXT)
def test_lists_of_labelled_images(photos: Path, content: bytes) -> None:
    file, images = photos / "list.txt", FileImages(photos, NAMES)
    file.write_bytes(content)
    with contextlib.suppress(UserError):
        assert len(listed(images, file)) > 0
    with contextlib.suppress(UserError):
        LabelSplit.read(file, images)
    file.unlink()


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["indices", "images", "fingerprint", "rule", "tar", "members"]), inner),
    ),
    max_leaves=8,
)


@examples(60)
@given(content=JSON)
def test_splits_of_labels(photos: Path, content: Any) -> None:
    (photos / "labels.json").write_text(json.dumps(content))
    with contextlib.suppress(UserError):
        LabelSplit.read(photos / "labels.json", FileImages(photos, NAMES))


# --- archives --------------------------------------------------------------------------------------------------------


def write_tar(root: Path) -> str:
    with tarfile.open(root / "set.tar", "w") as file:
        for number, ending in enumerate((".png", ".cls", ".npy", ".png", ".cls", ".txt")):
            content = {".png": IMAGES["PNG"], ".npy": IMAGES["npy"]}.get(ending, b"1")
            about = tarfile.TarInfo(f"sea/{number // 2}{ending}")
            about.size = len(content)
            file.addfile(about, io.BytesIO(content))
    return "set.tar"


def write_parquet(root: Path) -> str:
    rows = [{"bytes": IMAGES["PNG"], "path": name} for name in NAMES]
    of = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    parquet.write_table(
        pyarrow.table({"image": pyarrow.array(rows, of), "label": [0, 1, 0, 1, 0]}), root / "set.parquet"
    )
    return "set.parquet"


def write_hdf5(root: Path) -> str:
    with h5py.File(root / "set.h5", "w") as file:
        file["images"] = np.stack([picture(i, 8, 8) for i in range(5)])
        file["labels"] = [0, 1, 0, 1, 0]
    return "set.h5"


def write_raw(root: Path) -> str:
    write_pictures(root / "photos", NAMES, height=8, width=8)
    cli.run(["prepare", f"source={root / 'photos'}", f"out={root}/out", "encode=raw"])
    for path in (root / "out").iterdir():
        path.rename(root / path.name)
    (root / "out").rmdir()
    shutil.rmtree(root / "photos")
    return "images.csv"


MEMBERS = st.one_of(
    JSON, st.lists(st.tuples(st.sampled_from(["1.png", "1.cls", "/a.npy"]), st.integers(), st.integers(0, 9999)))
)

WRITERS = {"tar": write_tar, "parquet": write_parquet, "hdf5": write_hdf5, "raw": write_raw}


@functools.cache
def whole(kind: str) -> tuple[dict[str, bytes], str]:
    """The files of a folder by their paths in it, and the one that is damaged."""
    with place() as root:
        name = WRITERS[kind](root)
        return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}, name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", WRITERS)
@examples(15)
@given(data=st.data())
def test_archives(kind: str, data: st.DataObject) -> None:
    files, name = whole(kind)
    if kind == "raw" and data.draw(st.booleans()):
        name = data.draw(st.sampled_from(["shard-00000.bin", "prepared.json"]))
    made = files | {name: data.draw(damaged(files[name]))}
    with place() as root:
        for each, content in made.items():
            (root / each).parent.mkdir(exist_ok=True)
            (root / each).write_bytes(content)
        if kind == "tar" and data.draw(st.booleans()):  # an index of this very file, and of no tar file
            index = {"tar": LocalTars(root).state(name), "members": data.draw(MEMBERS)}
            (root / f"{name}.index.json").write_text(json.dumps(index))
        with contextlib.suppress(UserError):
            images = folder(
                root, tars="auto" if kind == "raw" else True, cache=root / "cache", test_fraction=0,
                resident=False, max_pixels=MOST, max_unreadable=1.0, channels="rgb",
            ).train  # fmt: skip
            for index in range(len(images)):
                with contextlib.suppress(Unreadable):
                    images.read(index)


# --- words -----------------------------------------------------------------------------------------------------------

KEYS = st.sampled_from([
    "method", "backbone", "backbone.stem", "dataset", "dataset.root", "dataset.mean", "batch_size", "optimizer",
    "optimizer.lr", "optimizer.betas", "schedule.lr.warmup_epochs", "trainer.max_epochs", "trainer.devices",
    "trainer.precision", "views.global.count", "views.global.size", "labels.fraction", "labels.list", "evaluator.final",
    "evaluator.online.evaluators", "recipe", "debug", "callbacks", "callbacks.x._target_", "logger", "name", "runs",
    "seed", "resume", "extend", "init_from", "method.temperature", "limit_images", "presets", "hydra.run.dir",
])  # fmt: skip
VALUES = st.one_of(
    st.sampled_from([
        "simclrv2", "swav", "simsiam", "resnet50", "vit_small", "digits", "folder", "lars", "small", "null", "auto",
        "true", "-1", "0", "1e999", "nan", "9" * 30, "[1,2,3]", "{a:1}", "{}", "[]", "${seed}", "${oc.env:HOME}", "${x",
        "torch.nn.Linear", "os.system", "'", '"', "a,b", "choice(1,2)", "range(3)", "1:2", "\\", "=", "~", "",
    ]),
    st.text("ab01,.[]{}()='\"$:~+-_ /\\\n\té\0", max_size=10),
    st.floats().map(str),
)  # fmt: skip
WORD = st.one_of(
    st.tuples(st.sampled_from(["", "", "", "+", "++", "~"]), KEYS, VALUES).map(
        lambda made: f"{made[0]}{made[1]}={made[2]}"
    ),
    st.tuples(st.sampled_from(["", "~", "@"]), KEYS).map("".join),
    st.text(max_size=10),
)


@examples(12)
@given(words=st.lists(WORD, min_size=1, max_size=2))
def test_words(words: list[str]) -> None:
    with contextlib.suppress(UserError):
        overrides = checked("pretrain", words)
        composed = load("pretrain", overrides)
        check("pretrain", composed.cfg)
        finish("pretrain", composed, overrides)
