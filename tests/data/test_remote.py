"""Tar files behind a server: the same batches as from a disk, whatever the server does."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from selfsight import cli
from selfsight.datamodules import ImageData, ImageDataModule, folder
from selfsight.datamodules.images import remote
from selfsight.datamodules.images.remote import Blocks, expanded
from selfsight.datamodules.views.view import View
from selfsight.errors import UserError

from .range_server import Served, serving
from .writers import write_pictures


class Store(MemoryFileSystem):
    """A store in memory that answers to ``s3://``."""

    store: dict[str, object] = {}
    pseudo_dirs = [""]

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + str(path).removeprefix("s3://").strip("/")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("remote")
    write_pictures(root / "photos", [f"{'sea' if i % 2 else 'wood'}/{i}.png" for i in range(14)])
    cli.main(["prepare", f"source={root / 'photos'}", f"out={root / 'tars'}", "encode=tar", "per_shard=5", "workers=1"])
    return root / "tars"


@pytest.fixture
def server(shards: Path, tmp_path: Path) -> Iterator[Served]:
    shutil.copytree(shards, tmp_path / "served")
    with serving(tmp_path / "served") as served:
        yield served


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "WAIT", 0.01)
    monkeypatch.setattr(remote, "BLOCK", 1 << 12)


def opened(root: str | Path, cache: Path, **options: object) -> ImageData:
    chosen: dict[str, object] = {"tars": True, "image_size": 8, "test_fraction": 0.3, "resident": False, **options}
    return folder(root, cache=cache, **chosen)  # type: ignore[arg-type]


def batches(data: ImageData, workers: int = 0) -> list[torch.Tensor]:
    module = ImageDataModule(data, [View(8, crop="resized", hflip=0.5)], batch_size=4, num_workers=workers)
    found = []
    for batch in [*module.train_dataloader(), *module.eval_dataloader("test")]:
        assert batch.labels is not None
        found += [*batch.views, batch.indices, batch.labels]
    module.close()
    return found


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_batches_as_from_a_disk(shards: Path, server: Served, tmp_path: Path, workers: int) -> None:
    expected = opened(shards, tmp_path)
    data = opened(server.url, tmp_path / "cache")
    assert data.classes == expected.classes == ("sea", "wood")
    assert equal(batches(data, workers), batches(expected))
    server.status = 500  # everything that was fetched is there
    assert equal(batches(data, workers), batches(expected))


def test_tar_files_named_one_by_one(shards: Path, server: Served, tmp_path: Path) -> None:
    names = f"{server.url}/shard-{{00000..00002}}.tar"
    assert equal(batches(opened(names, tmp_path / "cache")), batches(opened(shards, tmp_path)))
    one = opened(f"{server.url}/shard-00001.tar", tmp_path / "cache", test_fraction=0, labels="none")
    assert len(one.train) == 5
    assert expanded("a-{8..10}/{0..1}.tar") == [f"a-{n}/{m}.tar" for n in (8, 9, 10) for m in (0, 1)]


def test_an_index_beside_a_tar_file_spares_reading_it(shards: Path, server: Served, tmp_path: Path) -> None:
    def asked(name: str) -> int:
        server.asked.clear()
        data = opened(server.url, tmp_path / name, channels="rgb", labels="none", test_fraction=0)
        assert len(data.train) == 14
        return len(server.asked)

    with_index = asked("one")
    for index in server.root.glob("*.index.json"):
        index.unlink()
    assert with_index < asked("other")


def test_folders_of_a_store_that_lists_them(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Store()
    monkeypatch.setattr(fsspec, "filesystem", {"s3": made}.__getitem__)
    for part in ("train", "test"):
        for path in sorted(shards.glob("*.tar")):
            made.pipe_file(f"/bucket/{part}/{path.name}", path.read_bytes())
    data = opened("s3://bucket", tmp_path / "cache", drop_copies=True)
    assert (len(data.train), len(data.test or ())) == (14, 14)
    assert data.classes == ("0", "1")
    assert "not looked for" in data.about[-1]


def test_connections_that_drop_are_made_again(shards: Path, server: Served, tmp_path: Path) -> None:
    data = opened(server.url, tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache/blocks")
    server.drops = 4
    assert equal(batches(data), batches(opened(shards, tmp_path)))
    assert server.drops == 0


def test_a_slow_server_is_waited_for(
    shards: Path, server: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "BLOCK", 1 << 22)
    data = opened(server.url, tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache/blocks")
    server.slow = 0.3
    assert equal(batches(data), batches(opened(shards, tmp_path)))
    monkeypatch.setattr(remote, "PATIENCE", 0.1)
    monkeypatch.setattr(remote, "TRIES", 2)
    with pytest.raises(UserError, match="2 times no answer: "):
        opened(f"{server.url}/./", tmp_path / "another")


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("404", r"/none.tar' cannot be read \(404, not found: look at its address\)"),
        ("403", r"shard-00000.tar' cannot be read \(403, forbidden: give the credentials"),
        ("page", r"shard-00000.tar' is a web page \(HTML\), where a tar file was expected"),
        ("folder 404", "/none' lists no tar files"),
        ("folder page", "lists no tar files: name them, such as dataset.root=http"),
        ("no ranges", "gives whole files alone, no ranges of them"),
        ("cut", "is cut short: .* is the last that begins in it; copy it again"),
        ("no server", "6 times no answer"),
        ("no images", r"lists no images: name them in http://.*/labels.csv or /files.txt, one path a line"),
        ("tars alone", "holds tar files and no images of their own: dataset=shards reads them"),
    ],
)
def test_what_is_wrong_is_said(server: Served, tmp_path: Path, what: str, sentence: str) -> None:
    root, options = f"{server.url}/shard-00000.tar", dict[str, object]()
    if what == "404":
        root = f"{server.url}/none.tar"
    elif what == "403":
        server.status = 403
    elif what == "page":
        server.pages = True
    elif what == "folder 404":
        root = f"{server.url}/none"
    elif what == "folder page":
        root, server.pages = server.url, True
    elif what == "no ranges":
        server.ranges = False
    elif what == "cut":
        path = server.root / "shard-00000.tar"
        path.write_bytes(path.read_bytes()[:4000])
    elif what == "no server":
        root = "http://127.0.0.1:9/a.tar"
    elif what == "no images":
        root, options = f"{server.url}/none", {"tars": "auto"}
    else:
        root, options = server.url, {"tars": False}
    with pytest.raises(UserError, match=sentence) as said:
        opened(root, tmp_path / "cache", **options)
    assert "\n" not in str(said.value)


def test_a_tar_file_that_changes_is_fetched_again(server: Served, tmp_path: Path) -> None:
    before = opened(server.url, tmp_path / "cache", test_fraction=0)
    shutil.copy(server.root / "shard-00001.tar", server.root / "shard-00000.tar")
    (server.root / "shard-00002.tar").unlink()
    after = opened(server.url, tmp_path / "cache", test_fraction=0)
    assert len(before.train) == 14
    assert len(after.train) == 10


def test_what_goes_while_a_run_reads_is_named(server: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = opened(server.url, tmp_path / "cache", max_unreadable=0.2)
    shutil.rmtree(tmp_path / "cache/blocks")
    monkeypatch.setattr(remote, "TRIES", 2)
    server.status = 500
    with pytest.raises(
        UserError, match=r"cannot be read as images, .* \(the file it lies in cannot be read: 2 times no answer"
    ):
        batches(data)


def test_the_cache_keeps_to_its_size(tmp_path: Path) -> None:
    blocks = Blocks(tmp_path, 1000)
    for number in range(40):
        blocks.put(f"block-{number}", bytes(100))
        assert sum(path.stat().st_size for path in tmp_path.glob("*/*")) <= 1100
    assert blocks.get("block-39") == bytes(100)
    assert blocks.get("block-0") is None
    kept = Blocks(tmp_path, 1000)
    assert kept.get("block-38") is not None


def test_a_full_disk_is_said_once_and_loses_nothing(
    shards: Path, server: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    data = opened(server.url, tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache/blocks")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    assert equal(batches(data), batches(opened(shards, tmp_path)))
    told = [record.message for record in caplog.records if "fetched anew every time" in record.message]
    assert len(told) == 1
    assert "No space left on device" in told[0]


def test_a_run_from_a_server(
    server: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["recipe=digits/simclrv2", "dataset=shards", f"dataset.root={server.url}", "dataset.cache=cache"]
    small = ["dataset.image_size=16", "backbone.width=4", "batch_size=4", "num_workers=0", "trainer.max_epochs=1"]
    cli.main(["pretrain", *words, *small, "dataset.test_fraction=0.3", "report=false", "name=run"])
    capsys.readouterr()
    cli.main(["knn", "run=runs/run"])
    assert "knn_top1" in capsys.readouterr().out


# --- images that are files of their own ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("files")
    for part, count in (("train", 12), ("test", 6)):
        write_pictures(root / part, [f"{'sea' if i % 2 else 'wood'}/{i}.png" for i in range(count)])
    (root / "train" / "sea" / ".hidden.png").write_bytes(b"")
    (root / "train" / "about.txt").write_text("photographs")
    return root


def files_of(root: str | Path, cache: Path, **options: object) -> ImageData:
    return opened(root, cache, **{"tars": "auto", **options})


@pytest.mark.parametrize("workers", [0, 2])
def test_a_store_of_single_files_gives_the_batches_of_a_folder(photos: Path, tmp_path: Path, workers: int) -> None:
    store = fsspec.filesystem("memory")
    store.put(str(photos), "/photos", recursive=True)
    try:
        data = files_of("memory://photos", tmp_path / "cache")
        expected = files_of(photos, tmp_path)
        assert (data.classes, len(data.train), len(data.test or ())) == (("sea", "wood"), 12, 6)
        assert equal(batches(data, workers), batches(expected))
        assert "1 .txt" in " ".join(data.about)
        store.rm("/photos/train", recursive=True)
        assert equal(batches(data), batches(expected))  # from the cache
    finally:
        store.rm("/photos", recursive=True)


def test_a_file_of_a_store_that_changes_is_fetched_again(photos: Path, tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    store.put(str(photos / "train"), "/changing", recursive=True)
    try:
        before = files_of("memory://changing", tmp_path, test_fraction=0)
        first = before.train.read(0)
        store.pipe_file(f"/changing/{before.train.name(0)}", store.cat_file(f"/changing/{before.train.name(1)}"))
        after = files_of("memory://changing", tmp_path, test_fraction=0)
        assert not (after.train.read(0) == first).all()
        assert (after.train.read(0) == before.train.read(1)).all()
    finally:
        store.rm("/changing", recursive=True)


@pytest.mark.parametrize("how", ["listing", "files.txt", "labels.csv"])
def test_single_files_of_a_web_server(photos: Path, tmp_path: Path, how: str) -> None:
    shutil.copytree(photos / "train", tmp_path / "served")
    names = [f"{'sea' if i % 2 else 'wood'}/{i}.png" for i in range(12)]
    if how != "listing":
        lines = names if how == "files.txt" else ["path,label", *(f"{name},{name.split('/')[0]}" for name in names)]
        (tmp_path / "served" / how).write_text("\n".join(lines) + "\n")
    with serving(tmp_path / "served") as server:
        data = files_of(server.url, tmp_path / "cache")
        expected = files_of(photos / "train", tmp_path)
        assert data.classes == expected.classes
        assert server.url in data.about_labels
        assert equal(batches(data), batches(expected))
        server.status = 500
        assert equal(batches(data), batches(expected))  # from the cache


def test_a_list_from_elsewhere_names_nothing_outside_the_cache(photos: Path, tmp_path: Path) -> None:
    """Folders and tables are kept here by the paths of the list, which a stranger has written."""
    shutil.copytree(photos / "train", tmp_path / "served")
    (tmp_path / "served" / "labels.csv").write_text("sea/1.png,sea\nwood/0.png,wood\n")
    out = tmp_path / "out"
    odd = [f"{out}/labels.csv", f"{out}/1.png", "../../../up/1.png", "sea/../../../../up/labels.csv", "sea//2.png"]
    (tmp_path / "served" / "files.txt").write_text("\n".join(["sea/1.png", "wood/0.png", *odd]) + "\n")
    with serving(tmp_path / "served") as server:
        data = files_of(server.url, tmp_path / "cache", test_fraction=0)
    assert data.num_images == 2
    assert {path.name for path in tmp_path.iterdir()} == {"served", "cache"}


def test_the_cache_of_single_files_is_bounded_and_what_is_gone_is_named(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(photos / "train", tmp_path / "served")
    size = max(path.stat().st_size for path in (tmp_path / "served").rglob("*.png"))
    with serving(tmp_path / "served") as server:
        data = files_of(server.url, tmp_path / "cache", cache_gb=4 * size / 1e9, max_unreadable=0.2)
        batches(data)
        kept = sum(path.stat().st_size for path in (tmp_path / "cache" / "blocks").glob("*/*"))
        assert 0 < kept <= 5 * size
        shutil.rmtree(tmp_path / "cache" / "blocks")
        (tmp_path / "served" / data.train.name(3)).unlink()
        monkeypatch.setattr(remote, "TRIES", 2)
        assert len(batches(data)) > 0
        assert "404, not found" in str(data.unreadable)


def test_pretraining_from_single_files_elsewhere(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(photos) as server:
        words = ["debug=smoke", "dataset=folder", f"dataset.root={server.url}", f"dataset.cache={tmp_path / 'cache'}"]
        cli.main(["pretrain", *words, "dataset.image_size=16", "report=false", "evaluator=knn", f"runs={tmp_path}"])
    assert "copies of test images are not looked for in what lies elsewhere" in " ".join(
        capsys.readouterr().out.split()
    )
