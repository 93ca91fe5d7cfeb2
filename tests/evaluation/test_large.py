"""Features that are too many for the memory: the same figures, from a file, block by block."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from selfsight.contracts import Batch
from selfsight.datamodules.images.sets import ArrayImages
from selfsight.errors import UserError
from selfsight.evaluation import KNN, Diagnostics, LinearProbe, cache, rows
from selfsight.evaluation.base import protocol
from selfsight.evaluation.cache import FeatureCache
from selfsight.evaluation.features import Features, extract
from selfsight.evaluation.probes import inverted_lists, knn, linear
from selfsight.evaluation.probes.diagnostics import singular_values
from selfsight.evaluation.probes.knn import neighbours
from selfsight.evaluation.rows import Rows, Writing
from selfsight.nn.sphere import directions

from .conftest import TinyBackbone, clusters


def halved(features: Features) -> tuple[Features, Features]:
    """As they are kept if they are many, and the same numbers in memory."""
    half = replace(features, x=features.x.half())
    return half, replace(features, x=half.x.float())


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (rows, knn, linear, inverted_lists):
        monkeypatch.setattr(module, "BLOCK_ROWS", 50)


def test_a_bank_in_blocks_has_the_same_neighbours_in_the_same_order() -> None:
    x = torch.randn(170, 12, generator=torch.Generator().manual_seed(0))
    x[60:75] = x[5]  # copies within a block and over blocks
    x[120] = x[5]
    x = x.half()
    queries = directions(torch.cat([x[3:9].float(), torch.randn(20, 12)]))
    for backend in ("torch", "faiss"):
        whole = neighbours(queries, directions(x.float()), 30, backend=backend)
        blocks = neighbours(queries, Rows(x, directions), 30, backend=backend)
        assert torch.equal(whole[1], blocks[1])
        assert torch.equal(whole[0], blocks[0])


def test_figures_are_those_of_features_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knn, "QUERIES", 30)
    (train, of_train), (test, of_test) = (halved(clusters(n, 4, 6, spread=1.2, seed=n)) for n in (230, 70))
    assert train.large
    for evaluator in (KNN(), Diagnostics()):
        assert evaluator(train, test) == pytest.approx(evaluator(of_train, of_test), rel=1e-9)
    found, expected = (LinearProbe()(*pair) for pair in ((train, test), (of_train, of_test)))
    assert found["linear_penalty"] == expected["linear_penalty"]
    assert found["linear_top1"] == pytest.approx(expected["linear_top1"], abs=1 / 70)


def test_singular_values_of_blocks() -> None:
    x = torch.randn(130, 7)
    torch.testing.assert_close(singular_values(x), torch.linalg.svdvals(x.double()))
    torch.testing.assert_close(singular_values(x, centred=True), torch.linalg.svdvals(x.double() - x.double().mean(0)))


def test_features_are_written_to_a_file_without_a_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, backbone: TinyBackbone, batches: list[Batch]
) -> None:
    expected = extract(backbone, batches)["final"]
    monkeypatch.setattr(rows, "LARGE", 1)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    found = extract(backbone, batches, images=20)["final"]
    assert not list(tmp_path.iterdir())
    assert found.large
    assert found.file is None
    torch.testing.assert_close(found.x, expected.x.half())
    assert torch.equal(found.indices, expected.indices)


def test_numbers_beyond_half_precision_keep_theirs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(rows, "LARGE", 1)
    written = Writing(3, tmp_path / "x.npy")
    written.add(torch.tensor([[1e6, 2.0]]))
    assert written.result().tolist() == [[1e6, 2.0]]


def test_they_come_from_the_cache_the_second_time(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    backbone: TinyBackbone,
    batches: list[Batch],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(rows, "LARGE", 1)
    monkeypatch.setattr(cache, "ROWS", 5)
    pixels = (torch.cat([batch.views[0] for batch in batches]) * 40).to(torch.uint8)
    images = ArrayImages(pixels, torch.arange(12) % 3)
    data = SimpleNamespace(split=lambda name: images, image_size=9, eval_resize=None)
    module = SimpleNamespace(
        data=data, views=[SimpleNamespace(mean=None, std=None)], eval_dataloader=lambda split: batches
    )
    kept = FeatureCache(tmp_path / "features")
    first = kept.extract(backbone, module, "train")["final"]
    assert first.large
    expected = first.x.clone()
    monkeypatch.setattr(module, "eval_dataloader", None)
    second = kept.extract(backbone, module, "train")["final"]
    assert torch.equal(expected, second.x)
    assert torch.equal(first.known_labels, second.known_labels)
    (file,) = (tmp_path / "features").glob("*.npy")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    module.eval_dataloader = lambda split: batches
    again = kept.extract(backbone, module, "train")["final"]
    assert "are damaged" in caplog.text
    assert torch.equal(expected, again.x)


def test_a_full_disk_is_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rows, "LARGE", 1)
    monkeypatch.setattr("numpy.lib.format.open_memmap", full)
    with pytest.raises(
        UserError, match=r"features of 1,000 images .*No space left on device.*: make room, or set TMPDIR"
    ):
        Writing(1000, tmp_path / "x.npy").add(torch.ones(1, 8))


def test_a_search_in_lists_says_what_it_misses() -> None:
    train, test = clusters(600, 5, 8, spread=0.8), clusters(60, 5, 8, spread=0.8, seed=1)
    exact, found = KNN(k=[5])(train, test), KNN(k=[5], approximate_from=500)(train, test)
    assert "knn_search_recall" not in exact
    assert 0.5 < found["knn_search_recall"] <= 1
    assert found["knn_top1"] == pytest.approx(exact["knn_top1"], abs=0.1)
    evaluator = KNN(approximate_from=500)
    assert "approximate search from 500 images on" in evaluator.protocol
    told = protocol(evaluator, found)
    share = f"{found['knn_search_recall']:.1%}"
    assert told.endswith(f"; approximate search from 500 images on, which found {share} of the exact neighbours")
    assert protocol(evaluator, exact) == evaluator.protocol
    assert "5,000,000 images on, which found" in protocol(KNN(), found)
    everywhere = inverted_lists.InvertedLists(directions(train.x))
    everywhere.index.nprobe = everywhere.index.nlist
    nearest = neighbours(directions(test.x), directions(train.x), 5)[1]
    assert torch.equal(everywhere.neighbours(directions(test.x), 5)[1], nearest)
