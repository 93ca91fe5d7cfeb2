"""Detection on drawn shapes in COCO's layout: files read and refused, AP of known answers, pretrained weights kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as run_lengths
from torch import nn

from selfsight import cli
from selfsight.backbones.registry import create
from selfsight.checkpoints.export import export_backbone
from selfsight.engine import nodes
from selfsight.errors import UserError
from selfsight.evaluation.dense.segmentation import VOID, shapes
from selfsight.evaluation.detection.coco import CocoImages, average_precision, coco
from selfsight.evaluation.detection.detector import Detection, detector, predict

from ..jobs.test_evaluate import finished

SIDE = 64
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
SPEC = {"backbone": {"name": "resnet10_slim", "width": 8}, "image_size": SIDE, "mean": MEAN, "std": STD}


def content_of(number: int, folder: Path) -> dict[str, Any]:
    """Images of one to three shapes; every class in an image is one object with a box and a mask. Ids with gaps."""
    drawn = shapes(train=number, test=0, size=SIDE).train
    folder.mkdir(parents=True)
    images, objects = [], []
    for i in range(number):
        image, mask = drawn[i]
        Image.fromarray(image).save(folder / f"{i}.png")
        images.append({"id": 10 + i, "file_name": f"{i}.png", "height": SIDE, "width": SIDE})
        for kind in set(np.unique(mask)) - {0, VOID}:
            rle = run_lengths.encode(np.asfortranarray(mask == kind, np.uint8))
            objects.append(
                {
                    "id": len(objects) + 1,
                    "image_id": 10 + i,
                    "category_id": 3 * int(kind),
                    "bbox": run_lengths.toBbox(rle).tolist(),
                    "area": float(run_lengths.area(rle)),
                    "iscrowd": 0,
                    "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
                }
            )
    categories = [{"id": 3 * kind, "name": name} for kind, name in enumerate(("disc", "square", "triangle", "ring"), 1)]
    return {"images": images, "annotations": objects, "categories": categories}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("coco") / "drawn"
    (top / "annotations").mkdir(parents=True)
    for split, number in (("train2017", 6), ("val2017", 4)):
        content = content_of(number, top / split)
        (top / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return top


def answers(images: CocoImages, change: Callable[[dict[str, Any]], dict[str, Any]]) -> list[dict[str, Any]]:
    rows = images.annotations.dataset["annotations"]
    return [
        change({k: row[k] for k in ("image_id", "category_id", "bbox", "segmentation")} | {"score": 0.9})
        for row in rows
    ]


def test_right_answers_have_an_ap_of_one_and_wrong_ones_of_nothing(root: Path) -> None:
    images = coco(str(root), masks=True).test
    right = answers(images, lambda one: one)
    other = answers(images, lambda one: {**one, "category_id": one["category_id"] % 12 + 3})
    for kind, name in (("bbox", "box"), ("segm", "mask")):
        figures = average_precision(images, right, kind)
        assert figures[f"{name}_ap"] == figures[f"{name}_ap50"] == pytest.approx(1)
        assert f"{name}_ap_large" not in figures  # no object is larger than 96 x 96
        assert average_precision(images, other, kind)[f"{name}_ap"] < 0.1
        assert average_precision(images, [], kind)[f"{name}_ap"] == 0
    # a box moved by a quarter of its width overlaps by 0.6: right at 0.5, wrong at 0.75
    moved = answers(images, lambda one: {**one, "bbox": [one["bbox"][0] + one["bbox"][2] / 4, *one["bbox"][1:]]})
    figures = average_precision(images, moved, "bbox")
    assert figures["box_ap50"] == pytest.approx(1)
    assert figures["box_ap75"] == 0
    assert figures["box_ap"] == pytest.approx(0.3)  # thresholds 0.5, 0.55 and 0.6 out of ten


def test_targets_are_what_the_file_says(root: Path) -> None:
    images = coco(str(root), masks=True).train
    content = json.loads((root / "annotations" / "instances_train2017.json").read_text())
    torch.manual_seed(0)
    mirrored = 0
    for i in range(len(images)):
        pixels, target = images[i]
        rows = [row for row in content["annotations"] if row["image_id"] == int(target["image_id"])]
        assert target["labels"].tolist() == [row["category_id"] // 3 for row in rows]
        there = torch.from_numpy(np.array(Image.open(images.paths[i]))).permute(2, 0, 1).float() / 255
        flipped = not torch.equal(pixels, there)
        mirrored += flipped
        assert torch.equal(pixels.flip(2) if flipped else pixels, there)
        for mask, box in zip(target["masks"], target["boxes"], strict=True):  # both are mirrored with the image
            ys, xs = mask.nonzero().T
            assert box.tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
    assert 0 < mirrored < len(images)


@pytest.mark.parametrize("norm", ["frozen", "batch"])
def test_the_pretrained_weights_sit_in_the_detector(norm: str) -> None:
    backbone = create("resnet10_slim", width=8)
    weights = {name: value.clone() for name, value in backbone.state_dict().items()}
    net = detector(backbone, 4, masks=True, norm=norm, heads="conv", short_side=(SIDE,), long_side=SIDE)
    inside = {
        k.removeprefix("backbone.body."): v for k, v in net.state_dict().items() if k.startswith("backbone.body.")
    }
    assert inside.keys() == weights.keys()
    assert all(torch.equal(inside[name], weights[name]) for name in weights)
    assert net.transform.image_std == [1.0] * 3

    x = torch.randn(2, 3, SIDE, SIDE)
    maps = net.train().backbone(x)
    assert [tuple(level.shape[1:]) for level in maps.values()] == [(256, n, n) for n in (16, 8, 4, 2, 1)]
    changed = not torch.equal(net.state_dict()["backbone.body.bn1.running_mean"], weights["bn1.running_mean"])
    assert changed == (norm == "batch")
    learns = [p.requires_grad for m in backbone.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()]
    assert set(learns) == {norm == "batch"}

    # the coarsest level but one sees the last stage alone, through the pyramid's own two convolutions
    fpn, net = net.backbone.fpn, net.eval()
    wanted = fpn.layer_blocks[3](fpn.inner_blocks[3](backbone.forward_features(x)))
    torch.testing.assert_close(net.backbone(x)["3"], wanted)


def make(root: Path, **changes: Any) -> Detection:
    options: dict[str, Any] = {
        "data": coco(str(root), masks=True),
        "optimizer": lambda groups: torch.optim.SGD(groups, lr=0.01),
        "masks": True, "iterations": 2, "batch_size": 2, "warmup": 0, "drops": (1,), "gamma": 0.5, "layer_decay": 1.0,
        "norm": "frozen", "heads": "fc", "short_side": (SIDE,), "long_side": SIDE, "boxes": 16, "proposals": 20,
        "seed": 0,
    }  # fmt: skip
    return Detection(**{**options, **changes})


def test_every_image_once_before_any_comes_again(root: Path) -> None:
    detection = make(root, iterations=5)
    seen = [int(target["image_id"]) for _, targets in detection.batches(0) for target in targets]
    assert len(seen) == 10
    assert sorted(seen[:6]) == list(range(10, 16))
    assert [detection.rate(step) for step in range(3)] == [1, 0.5, 0.5]
    ramp = make(root, warmup=10, drops=())
    assert [ramp.rate(step) for step in (0, 5, 10, 11)] == pytest.approx([1e-3, 0.5005, 1, 1])


def test_a_diverging_training_is_told(root: Path) -> None:
    detection = make(root, optimizer=lambda groups: torch.optim.SGD(groups, lr=1e12), iterations=3, masks=False)
    with pytest.raises(UserError, match=r"no number at step [23]: lower optimizer.lr"):
        detection(create("resnet10_slim", width=8), None, None)


def test_lower_layers_learn_more_slowly(root: Path) -> None:
    net = detector(create("resnet18"), 4, masks=False)
    optimizer, _ = make(root, layer_decay=0.5).optimisation(net)
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    names = {name: rate[id(p)] for name, p in net.named_parameters() if p.requires_grad}
    # SparK's numbering: the stem is 0, the stages of a ResNet-18 are 1 to 4, everything above them 5
    assert names["backbone.body.conv1.weight"] == pytest.approx(0.01 * 0.5**5)
    assert names["backbone.body.layer2.1.conv1.weight"] == pytest.approx(0.01 * 0.5**3)
    assert {lr for name, lr in names.items() if ".body." not in name} == {0.01}
    assert all(group["weight_decay"] == 0 for group in optimizer.param_groups if group["params"][0].ndim == 1)


def broken(root: Path, top: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """The folder again, its training annotations changed."""
    (top / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        (top / split).symlink_to(root / split)
        content = json.loads((root / "annotations" / f"instances_{split}.json").read_text())
        content = change(content) or content if split == "train2017" else content
        text = content if isinstance(content, str) else json.dumps(content)
        (top / "annotations" / f"instances_{split}.json").write_text(text)
    return top


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda c: json.dumps(c)[:200], "cannot be read as JSON"),
        (lambda c: [c], "has no list 'images'"),
        (lambda c: c.pop("categories") and None, "has no list 'categories'"),
        (lambda c: c["annotations"][1].pop("bbox") and None, "entry 1 of 'annotations' has no 'bbox'"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, 3]), "bbox of annotation 1 is .1, 2, 3., and four numbers"),
        (lambda c: c["annotations"][0].update(image_id=99), "annotation 1 is of image 99, which 'images'"),
        (lambda c: c["annotations"][0].update(category_id=5), "annotation 1 is of category 5, which 'categories'"),
        (lambda c: c["annotations"][2].pop("segmentation") and None, "entry 2 of 'annotations' has no 'segmentation'"),
        (lambda c: c["images"][3].update(file_name="gone.png"), "1 of the 6 images .* 'gone.png' for one"),
        (lambda c: c["categories"][0].update(name="sphere"), "different categories"),
        (lambda c: c["annotations"].clear(), "lists no images with objects"),
    ],
)
def test_broken_annotations_are_one_sentence_each(
    root: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any], told: str
) -> None:
    with pytest.raises(UserError, match=told) as error:
        coco(str(broken(root, tmp_path / "broken", change)), masks=True)
    assert "\n" not in str(error.value)


def test_masks_of_another_size_than_their_images(root: Path, tmp_path: Path) -> None:
    """Told in one sentence out of a worker process, too."""
    top = broken(root, tmp_path / "other", lambda c: [one.update(width=32) for one in c["images"]] and None)
    with pytest.raises(UserError, match=r"has 64 x 64 pixels, and its annotations were made for 32 x 64") as error:
        list(make(top).batches(1))
    assert "\n" not in str(error.value)


def test_networks_without_a_pyramid_are_refused() -> None:
    with pytest.raises(UserError, match="take a ResNet or ConvNeXt"):
        detector(create("alexnet_rotnet"), 2, masks=False)
    with pytest.raises(UserError, match="norm of detector is 'sync'; frozen or batch was expected"):
        detector(create("resnet10_slim", width=8), 2, masks=False, norm="sync")


def test_masks_are_learnt_and_found(root: Path) -> None:
    """On few boxes an image, for speed. What is measured are the masks, and pasted into images of their own size."""
    detection = make(root)
    backbone = create("resnet10_slim", width=8)
    net = detector(backbone, 4, masks=True, short_side=(SIDE,), long_side=SIDE, boxes=8, proposals=20)
    heads: Any = net.roi_heads
    before = {name: value.clone() for name, value in net.state_dict().items()}
    losses: list[float] = []
    detection.fit(net, 0, lambda step, loss: losses.append(loss))
    assert len(losses) == 2
    changed = [name for name, value in net.state_dict().items() if not torch.equal(value, before[name])]
    for part in ("backbone.body.conv1", "backbone.fpn", "rpn", "roi_heads.box_head", "roi_heads.mask_head"):
        assert any(name.startswith(part) for name in changed), part

    heads.detections_per_img, heads.score_thresh = 2, 0.0
    images = detection.data.test
    found = predict(net, images)
    assert len(found) == 2 * len(images)
    for one in found:
        assert one["segmentation"]["size"] == [SIDE, SIDE]
        assert one["category_id"] in (3, 6, 9, 12)
        x, y, w, h = one["bbox"]
        mask = run_lengths.decode(one["segmentation"])
        ys, xs = np.nonzero(mask)
        if len(xs):
            assert x - 2 <= xs.min() <= xs.max() <= x + w + 2
            assert y - 2 <= ys.min() <= ys.max() <= y + h + 2
    assert "mask_ap" in average_precision(images, found, "segm")


def test_the_job(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file

    backbone = create("resnet10_slim", width=8, zero_init_last=False)
    weights = backbone.state_dict()
    export_backbone(backbone, SPEC, tmp_path)
    short = [
        "detection.iterations=2", "detection.batch_size=2", f"detection.short_side=[{SIDE}]", "detection.norm=frozen",
        "detection.heads=fc", "detection.warmup=0", "detection.boxes=16", "detection.proposals=20",
        "masks=false", "num_workers=0", "accelerator=cpu",
    ]  # fmt: skip
    words = [f"backbone={tmp_path}", *short]
    cli.main(["detect", *words, f"out={tmp_path / 'out'}", f"dataset.root={root}"])
    record = json.loads((tmp_path / "out" / "detect.json").read_text())
    assert record["classes"] == ["disc", "square", "triangle", "ring"]
    assert {"box_ap", "box_ap50"} <= record["result"].keys()
    assert "mask_ap" not in record["result"]
    told = ("Faster R-CNN with FPN", "2 steps of 2", "SGD rate 0.02", "BatchNorm frozen", "on 4 images", "last step")
    assert all(part in record["protocol"] for part in told), record["protocol"]

    # what is kept is the detector that was measured, its images normalised as the backbone's were
    net = detector(
        create("resnet10_slim", width=8), 4, masks=False, short_side=(SIDE,), proposals=20, mean=MEAN, std=STD
    )
    kept = load_file(tmp_path / "out" / "detector.safetensors")
    net.load_state_dict(kept)
    images = coco(str(root)).test
    again = average_precision(images, predict(net, images), "bbox")
    assert again["box_ap"] == pytest.approx(record["result"]["box_ap"], abs=1e-6)
    assert not torch.equal(kept["backbone.body.layer1.0.conv1.weight"], weights["layer1.0.conv1.weight"])
    assert torch.equal(kept["backbone.body.bn1.running_mean"], weights["bn1.running_mean"])

    capsys.readouterr()
    for given, told_instead in (
        ([*words, f"dataset.root={root}"], "out=DIR"),
        ([*words, "out=x"], "dataset.root has to be given"),
        ([*words, f"out={tmp_path / 'no'}", f"dataset.root={tmp_path}"], "no annotation file"),
        (["dataset.root=x"], "run=runs/NAME"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["detect", *given])
        error = capsys.readouterr().err
        assert told_instead in error
        assert error.count("\n") == 1
    assert not (tmp_path / "no").exists()


def test_other_settings_leave_what_was_measured_before(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has its record and its detector, the same command finds its own again, and the report shows them all."""
    rates = iter((0.1, 0.2, 0.3))
    monkeypatch.setattr(Detection, "__call__", lambda *_, **__: ({"box_ap": next(rates)}, nn.Linear(1, 1)))
    run = finished(tmp_path / "run", "limit_images=40")
    words = [f"run={run}", f"dataset.root={root}", "masks=false", "num_workers=0", "accelerator=cpu"]
    for changed in ("detection.iterations=2", "detection.iterations=3", "detection.iterations=2"):
        cli.main(["detect", *words, changed])
    made = {path.name for path in (run / "eval").iterdir()}
    assert made == {"detect.json", "detector.safetensors", "detect-2.json", "detector-2.safetensors"}
    kept = {name: json.loads((run / "eval" / f"{name}.json").read_text()) for name in ("detect", "detect-2")}
    assert [kept[name]["result"]["box_ap"] for name in ("detect", "detect-2")] == [0.3, 0.2]
    cli.main(["report", f"run={run}", "projection=pca"])
    told = (run / "report.html").read_text()
    assert "<h3>detect-2</h3>" in told
    assert "<tr><td>box_ap</td><td>0.3000</td></tr>" in told


@pytest.mark.parametrize("recipe", ["coco/pixpro", "coco/spark"])
def test_recipes_compose(recipe: str) -> None:

    cfg = cli.compose("detect", cli.checked("detect", [f"recipe={recipe}", "run=x", "dataset.root=y"], sweep=False))
    assert cfg.job == "detect"
    detection = nodes.build(cfg.detection, data=None, optimizer=nodes.build(cfg.optimizer))
    assert detection.batch_size * detection.iterations == 16 * 90_000
    assert detection.short_side[-1] == 800
