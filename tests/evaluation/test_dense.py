from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image

from selfsight.errors import UserError
from selfsight.evaluation.dense.dilation import dilated
from selfsight.evaluation.dense.probes import DenseKNN, DenseLinear, Maps, cell_labels, maps, miou
from selfsight.evaluation.dense.segmentation import VOID, Masked, SegmentationData, folder, shapes, voc

from .conftest import TinyBackbone

LIKE = SimpleNamespace(views=[SimpleNamespace(mean=(0.5,) * 3, std=(0.25,) * 3)])


def informative(masks: list[torch.Tensor], classes: int, side: int) -> Maps:
    return Maps(torch.stack([cell_labels(mask, classes, side, side) for mask in masks]), masks)


@pytest.fixture(scope="module")
def drawn() -> SegmentationData:
    return shapes(train=24, test=8, size=64)


def masks_of(part: Masked) -> list[torch.Tensor]:
    return [torch.from_numpy(mask) for _, mask in part]


def test_an_informative_map_is_segmented_and_a_constant_one_is_all_background(drawn: SegmentationData) -> None:
    train, test = masks_of(drawn.train), masks_of(drawn.test)
    linear, nearest = DenseLinear(drawn, 64), DenseKNN(drawn, 64)
    good = informative(train, 5, 32), informative(test, 5, 32)
    assert miou(linear.fit(*good, 5)[0], test, 5) > 0.9
    assert miou(nearest.fit(*good, 5), test, 5) > 0.9
    flat = Maps(torch.ones(24, 3, 8, 8), train), Maps(torch.ones(8, 3, 8, 8), test)
    pixels = torch.cat([mask.flatten() for mask in test])
    background = ((pixels == 0).sum() / (pixels != VOID).sum()).item()
    assert miou(linear.fit(*flat, 5)[0], test, 5) == pytest.approx(background / 5, abs=1e-6)


def test_miou_by_hand_with_void_and_an_absent_class() -> None:
    mask = torch.tensor([[0, 0], [1, VOID]], dtype=torch.uint8)
    scores = F.one_hot(torch.tensor([[0, 1], [1, 2]]), 4).permute(2, 0, 1)[None].float()
    # class 0: 1 of 2; class 1: 1 of 2; class 2 is predicted on void alone and class 3 nowhere: both left out
    assert miou(scores, [mask], 4) == pytest.approx(0.5)


def test_the_measure_is_over_the_whole_set_and_not_the_mean_of_images() -> None:
    scores = torch.zeros(2, 2, 2, 2)
    scores[:, 0] = 1
    masks = [torch.zeros(2, 2, dtype=torch.uint8), torch.ones(2, 2, dtype=torch.uint8)]
    assert miou(scores, masks, 2) == pytest.approx((4 / 8 + 0) / 2)


def test_cell_labels_leave_void_out() -> None:
    mask = torch.tensor(
        [[0, 0, 1, VOID], [0, 1, VOID, VOID], [VOID, VOID, 2, 2], [VOID, VOID, 2, 2]], dtype=torch.uint8
    )
    labels = cell_labels(mask, 3, 2, 2)
    assert labels[:, 0, 0].tolist() == [0.75, 0.25, 0]
    assert labels[:, 0, 1].tolist() == [0, 1, 0]
    assert labels[:, 1, 0].tolist() == [0, 0, 0]
    assert labels[:, 1, 1].tolist() == [0, 0, 1]


def test_a_full_memory_keeps_rare_classes_and_the_same_number_of_every_image() -> None:
    soft = torch.zeros(4, 100, 2)
    soft[:, :, 0] = 1
    soft[:, 7] = torch.tensor([0.0, 1.0])  # one cell in a hundred
    soft[:, 9] = 0  # void
    probe = DenseKNN(shapes(1, 1, 16), 16, memory=40)
    kept = probe._kept(soft)
    assert torch.bincount(kept // 100).tolist() == [10] * 4
    assert not bool((kept % 100 == 9).any())
    assert (kept % 100 == 7).sum() >= 3
    assert len(DenseKNN(shapes(1, 1, 16), 16, memory=1000)._kept(soft)) == 4 * 99


def test_maps_are_the_last_map_or_a_named_stage(backbone: TinyBackbone) -> None:
    data = shapes(train=5, test=3, size=20)
    backbone.train()
    train, test = maps(backbone, data, 18, LIKE)
    stem, _ = maps(backbone, data, 18, LIKE, stage="stem")
    assert train.x.shape == (5, 6, 7, 7)
    assert stem.x.shape == (5, 4, 16, 16)
    assert backbone.training
    image = torch.from_numpy(data.test[0][0]).permute(2, 0, 1)[None].float()
    resized = F.interpolate(image, (18, 18), mode="bilinear", antialias=True)
    with torch.no_grad():
        expected = backbone.eval().forward_features((resized / 255 - 0.5) / 0.25)
    torch.testing.assert_close(test.x[:1], expected)
    with pytest.raises(UserError, match="no stage"):
        maps(backbone, data, 18, LIKE, stage="layer9")


def test_both_probes_run_on_a_backbone_and_report_by_class(backbone: TinyBackbone) -> None:
    data = shapes(train=12, test=6, size=32)
    linear = DenseLinear(data, 32, epochs=2).on_images(backbone, LIKE)
    nearest = DenseKNN(data, 32).on_images(backbone, LIKE)
    assert list(linear["dense_linear_iou"]) == list(nearest["dense_knn_iou"]) == list(data.classes)
    present = [value for name, value in nearest["dense_knn_iou"].items() if name in data.classes]
    assert nearest["dense_knn_miou"] == pytest.approx(np.mean(present), abs=1e-6)
    assert linear["dense_linear_rate"] in (0.01, 0.1, 1.0)


def test_shapes_are_fixed_by_the_seed_and_use_every_class_and_void(drawn: SegmentationData) -> None:
    again = shapes(train=24, test=8, size=64)
    assert np.array_equal(drawn.test[3][0], again.test[3][0])
    assert not np.array_equal(drawn.test[3][0], shapes(24, 8, 64, seed=1).test[3][0])
    assert set(np.unique(np.stack([mask for _, mask in drawn.train]))) == {0, 1, 2, 3, 4, VOID}


def write(path: Path, array: np.ndarray, mode: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    if mode == "P":
        image.putpalette([value for i in range(256) for value in (i * 7 % 256, i * 13 % 256, i)])
    image.save(path)


def test_a_folder_is_read_as_numbers_even_from_palette_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(10):
        write(tmp_path / "images" / f"{i}.jpg", rng.integers(0, 255, (12, 9, 3), dtype=np.uint8))
        mask = rng.choice(np.array([0, 1, 3, VOID], np.uint8), (12, 9))
        write(tmp_path / "masks" / f"{i}.png", mask, mode="P")
    data = folder(str(tmp_path))
    assert (len(data.train), len(data.test)) == (8, 2)
    assert not set(data.train.names) & set(data.test.names)
    assert data.classes == ("0", "1", "2", "3")
    image, mask = data.train[0]
    assert image.shape == (12, 9, 3)
    assert set(np.unique(mask)) <= {0, 1, 3, VOID}


def read_all(root: Path) -> None:
    data = folder(str(root))
    assert len(list(data.train) + list(data.test)) == len(data.train) + len(data.test)


def test_bad_folders_are_one_sentence_each(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="images is missing"):
        folder(str(tmp_path))
    for i in range(4):
        write(tmp_path / "images" / f"{i}.png", np.zeros((6, 6, 3), np.uint8))
        write(tmp_path / "masks" / f"{i}.png", np.zeros((6, 6), np.uint8))
    write(tmp_path / "masks" / "2.png", np.zeros((6, 5), np.uint8))
    with pytest.raises(UserError, match=r"mask of .*2\.png has 5 x 6 pixels and its image 6 x 6"):
        read_all(tmp_path)
    write(tmp_path / "masks" / "2.png", np.zeros((6, 6, 3), np.uint8))
    with pytest.raises(UserError, match="has colours"):
        read_all(tmp_path)
    (tmp_path / "masks" / "2.png").unlink()
    with pytest.raises(UserError, match=r"1 of 4 images in .* have no mask"):
        folder(str(tmp_path))
    with pytest.raises(UserError, match="Pascal VOC 2012 is not in"):
        voc(str(tmp_path))


def test_pictures_are_read_as_data_sets_read_theirs(tmp_path: Path) -> None:
    """A 16-bit image keeps its greys, one that was taken upright is turned as its mask is; damaged ones are named."""
    grey = (np.arange(256, dtype=np.uint16).reshape(16, 16)) << 8
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter
    wide = np.zeros((16, 24, 3), np.uint8)
    wide[:, :12] = 200
    (tmp_path / "images").mkdir()
    for name, picture in (("a", Image.fromarray(grey)), ("b", Image.fromarray(wide))):
        write(tmp_path / "masks" / f"{name}.png", np.zeros(picture.size, np.uint8))
        picture.save(tmp_path / "images" / f"{name}.png", exif=exif if name == "b" else None)
    data = folder(str(tmp_path), classes=["ground"])
    pictures = {Path(part.names[i]).stem: part[i][0] for part in (data.train, data.test) for i in range(len(part))}
    assert np.abs(pictures["a"].astype(int) - (grey >> 8)[..., None]).max() <= 1
    assert pictures["b"].shape == (24, 16, 3)
    assert (pictures["b"][:12] > 150).all()
    for part in ("images", "masks"):
        (tmp_path / part / "a.png").write_bytes(b"nothing")
        with pytest.raises(UserError, match=r"a\.png' cannot be read as a"):
            read_all(tmp_path)


def test_stages_without_a_map_are_refused(backbone: TinyBackbone, drawn: SegmentationData) -> None:
    for stage, told in (("last2", "is no map; take one of stem, top, final"), ("stemm", "Did you mean 'stem'")):
        with pytest.raises(UserError, match=told):
            maps(backbone, drawn, 12, LIKE, stage)
    with pytest.raises(UserError, match="hold none to measure on"):
        maps(backbone, shapes(train=2, test=0), 12, LIKE)


def test_masks_beyond_the_classes_are_refused(backbone: TinyBackbone, tmp_path: Path) -> None:
    for i in range(5):
        write(tmp_path / "images" / f"{i}.png", np.zeros((12, 12, 3), np.uint8))
        write(tmp_path / "masks" / f"{i}.png", np.full((12, 12), 2, np.uint8))
    data = folder(str(tmp_path), classes=["ground", "thing"])
    with pytest.raises(UserError, match="holds class 2, and the 2 classes go from 0 to 1"):
        maps(backbone, data, 12, LIKE)


@pytest.mark.parametrize(("name", "size"), [("resnet18", 64), ("resnet18", 96), ("resnet50", 64)])
def test_every_second_cell_of_a_dilated_map_is_the_strided_one(name: str, size: int) -> None:
    backbone = timm.create_model(name, num_classes=0).eval().double()
    with torch.no_grad():
        for part in backbone.modules():
            if isinstance(part, torch.nn.BatchNorm2d):
                part.running_mean.normal_(std=0.1)
                part.running_var.uniform_(0.5, 2)
        images = torch.randn(1, 3, size, size, dtype=torch.float64)
        coarse = backbone.forward_features(images)
        fine = dilated(backbone, 2)
        torch.testing.assert_close(fine.forward_features(images)[:, :, ::4, ::4], coarse)
        assert fine.forward_features(images).shape[-1] == 4 * coarse.shape[-1]
        torch.testing.assert_close(backbone.forward_features(images), coarse)
    assert fine.state_dict().keys() == backbone.state_dict().keys()


def test_networks_that_cannot_be_dilated_say_so() -> None:
    with pytest.raises(UserError, match="kernel of 2"):
        dilated(timm.create_model("convnext_atto", num_classes=0), 2)
    with pytest.raises(UserError, match="shrinks its map"):
        dilated(timm.create_model("resnet26d", num_classes=0), 1)
    with pytest.raises(UserError, match="5 stages"):
        dilated(timm.create_model("resnet18", num_classes=0), 5)
