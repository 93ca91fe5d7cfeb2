"""Images in the rows of parquet, arrow and HDF5 files: the batches of the same images in a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import ipc, parquet

from selfsight import cli
from selfsight.datamodules import ImageData, ImageDataModule, folder
from selfsight.datamodules.images.bands import Kind
from selfsight.datamodules.images.rows import as_file
from selfsight.datamodules.views.view import View
from selfsight.errors import UserError

from .writers import picture, write_pictures

NAMES = sorted(f"{'sea' if i % 2 else 'wood'}/{i}.png" for i in range(14))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rows") / "photos"
    write_pictures(root, NAMES)
    return root


def table(photos: Path, names: list[str], *, paths: bool = True, stated: bool = True) -> pyarrow.Table:
    """As ``datasets`` writes them: a struct of bytes and path, and a class; what they are in the metadata."""
    rows = [{"bytes": (photos / name).read_bytes(), "path": name if paths else None} for name in names]
    made = pyarrow.table({
        "picture" if stated else "image": pyarrow.array(
            rows, pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
        ),
        "kind" if stated else "label": pyarrow.array([int(name.startswith("wood")) for name in names], pyarrow.int64()),
        "caption": pyarrow.array(["a picture"] * len(names)),
    })  # fmt: skip
    features = {
        "picture": {"_type": "Image"},
        "kind": {"_type": "ClassLabel", "names": ["sea", "wood"]},
        "caption": {"_type": "Value", "dtype": "string"},
    }
    return made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})} if stated else {})


def write(path: Path, rows: pyarrow.Table) -> Path:
    """By its ending; a name with ``stream`` in it as a stream."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        parquet.write_table(rows, path, row_group_size=3)
    else:
        with (ipc.new_stream if "stream" in path.name else ipc.new_file)(str(path), rows.schema) as out:
            out.write_table(rows, max_chunksize=4)
    return path


def opened(root: Path, cache: Path, **options: Any) -> ImageData:
    return folder(
        root, cache=cache, **{"tars": True, "image_size": 8, "test_fraction": 0.3, "resident": False, **options}
    )


def batches(data: ImageData, workers: int = 0) -> list[torch.Tensor]:
    module = ImageDataModule(data, [View(8, count=2, crop="resized", hflip=0.5)], batch_size=4, num_workers=workers)
    found = []
    for batch in [*module.train_dataloader(), *module.train_dataloader(), *module.eval_dataloader("test")]:
        assert batch.labels is not None
        found += [*batch.views, batch.indices, batch.labels]
    module.close()
    return found


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_folder_tar_parquet_and_arrow_give_equal_batches(photos: Path, tmp_path: Path, workers: int) -> None:
    expected = opened(photos, tmp_path, tars=False)
    cli.main(["prepare", f"source={photos}", f"out={tmp_path / 'tars'}", "encode=tar", "per_shard=5", "workers=1"])
    for half, names in enumerate((NAMES[:5], NAMES[5:])):
        write(tmp_path / f"parquet/data-{half}.parquet", table(photos, names))
        write(tmp_path / f"arrow/data-{half}.arrow", table(photos, names))
        write(tmp_path / f"streams/stream-{half}.arrow", table(photos, names))
    for kind in ("tars", "parquet", "arrow", "streams"):
        data = opened(tmp_path / kind, tmp_path / "cache")
        assert data.classes == ("sea", "wood"), kind
        assert equal(batches(data, workers), batches(expected)), kind


def test_what_the_names_of_files_say_of_the_split(photos: Path, tmp_path: Path) -> None:
    write(tmp_path / "data/train-00000-of-00001.parquet", table(photos, NAMES[:8], paths=False))
    write(tmp_path / "data/test-00000-of-00001.parquet", table(photos, NAMES[8:], paths=False))
    data = opened(tmp_path, tmp_path / "cache")
    assert (len(data.train), len(data.test or ())) == (8, 6)
    assert data.classes == ("sea", "wood")
    assert data.about_labels == "labels from the tables"
    np.testing.assert_array_equal(data.train.read(3), folder(photos, resident=False, test_fraction=0).train.read(3))


def test_a_single_file_and_columns_by_their_names(photos: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "other.parquet", table(photos, NAMES, stated=False))
    write(tmp_path / "more.parquet", table(photos, NAMES))
    data = opened(path, tmp_path / "cache", test_fraction=0)
    assert len(data.train) == 14
    assert data.classes == ("0", "1")
    turned = list((tmp_path / "cache/tables").glob("*.arrow"))
    assert len(turned) == 1
    before = turned[0].stat().st_mtime_ns
    opened(path, tmp_path / "cache")
    assert turned[0].stat().st_mtime_ns == before


def test_wrong_tables(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "cut").mkdir()
    content = write(tmp_path / "whole.parquet", table(photos, NAMES)).read_bytes()
    (tmp_path / "cut/a.parquet").write_bytes(content[:-100])
    with pytest.raises(UserError, match=r"a.parquet' cannot be read as a table .*: copy it again") as said:
        opened(tmp_path / "cut", tmp_path / "cache")
    assert "\n" not in str(said.value)
    write(tmp_path / "text/a.parquet", pyarrow.table({"caption": ["a", "b"]}))
    with pytest.raises(UserError, match="has no column of images among caption"):
        opened(tmp_path / "text", tmp_path / "cache")
    write(tmp_path / "both/a.parquet", table(photos, NAMES))
    (tmp_path / "both/a.tar").touch()
    with pytest.raises(UserError, match=r"archives of several kinds, such as 'a.tar' and 'a.parquet': name one"):
        opened(tmp_path / "both", tmp_path / "cache")
    rows = table(photos, NAMES).to_pylist()
    rows[2]["picture"]["bytes"] = None
    write(tmp_path / "empty/a.parquet", pyarrow.Table.from_pylist(rows, table(photos, NAMES).schema))
    data = opened(tmp_path / "empty", tmp_path / "cache", resident=True, max_unreadable=0.1)
    assert dict(data.unreadable.kinds()) == {"a row without the bytes of an image": 1}


def test_arrays_of_colours(tmp_path: Path) -> None:
    images = np.stack([picture(i, 12, 12) for i in range(10)])
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["images"] = images
        file["labels"] = np.arange(10) % 2
        file["labels"].attrs["classes"] = ["sea", "wood"]
    for root in (tmp_path, tmp_path / "a.h5"):
        data = opened(root, tmp_path, test_fraction=0)
        assert data.bands is None
        assert data.classes == ("sea", "wood")
        np.testing.assert_array_equal(data.train.read(7), images[7])
        assert data.train.labels is not None
        assert data.train.labels.tolist() == [0, 1] * 5
    batches_of = opened(tmp_path, tmp_path)
    assert equal(batches(batches_of, 2), batches(batches_of))


@pytest.mark.parametrize("first", [True, False])
def test_arrays_of_other_channels_and_groups(tmp_path: Path, first: bool) -> None:
    images = np.random.default_rng(0).integers(0, 65536, (8, 9, 10, 4), dtype=np.uint16)
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        for group in ("train", "test"):
            file[f"{group}/x"] = np.moveaxis(images, 3, 1) if first else images
            file[f"{group}/y"] = np.arange(8) % 2
    data = opened(tmp_path, tmp_path)
    assert data.bands is not None
    assert data.bands.kind == Kind(4, "uint16")
    assert (len(data.train), len(data.test or ())) == (8, 8)
    np.testing.assert_array_equal(data.train.read(5), images[5])


def test_wrong_arrays(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["scores"] = np.zeros(4)
    with pytest.raises(UserError, match=r"has no array of images .*; its arrays are scores \[4\]"):
        opened(tmp_path, tmp_path)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["images"], file["labels"] = np.zeros((4, 5, 5), np.uint8), np.zeros(3, np.int64)
    with pytest.raises(
        UserError, match=r"'labels' in .* holds 3 values of int64, where the whole numbers of the classes of 4"
    ):
        opened(tmp_path, tmp_path)
    (tmp_path / "a.h5").write_bytes(b"no HDF5")
    with pytest.raises(UserError, match=r"a.h5' is no HDF5 file, or a damaged one"):
        opened(tmp_path, tmp_path)


def test_a_file_of_an_array() -> None:
    assert as_file(np.zeros((2, 3), np.uint8)).startswith(b"P5\n3 2\n255\n")
    assert as_file(np.zeros((3, 4, 5), np.uint8)).startswith(b"P6\n5 4\n255\n")
    assert as_file(np.zeros((4, 5, 1), np.float32)).startswith(b"\x93NUMPY")


def test_a_run_on_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["images"] = np.stack([picture(i, 18, 18) for i in range(16)])
        file["labels"] = np.arange(16) % 2
    words = [
        "recipe=digits/simclrv2",
        "dataset=shards",
        "dataset.root=a.h5",
        "dataset.image_size=16",
        "backbone.width=4",
    ]
    small = ["batch_size=4", "num_workers=0", "trainer.max_epochs=1", "dataset.test_fraction=0.3", "report=false"]
    cli.main(["pretrain", *words, *small, "name=run"])
    capsys.readouterr()
    cli.main(["knn", "run=runs/run"])
    assert "knn_top1" in capsys.readouterr().out
