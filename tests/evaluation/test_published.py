from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from selfsight.datamodules import ArrayImages, ImageData
from selfsight.datamodules.module import ImageDataModule
from selfsight.datamodules.views.view import View
from selfsight.errors import UserError
from selfsight.evaluation.features import extract
from selfsight.evaluation.published import PROTOCOLS, PublishedProbe, classifier
from selfsight.optim.lars import LARS
from selfsight.optim.schedule import Clock

from .conftest import TinyBackbone

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


@pytest.fixture
def module() -> ImageDataModule:
    """Three classes, each with a colour of its own."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(72) % 3
    colour = torch.eye(3)[labels][:, :, None, None] * 120
    pixels = (colour + 60 * torch.rand(72, 3, 12, 12, generator=generator)).to(torch.uint8)
    train, test = (ArrayImages(pixels[part], labels[part]) for part in (slice(48), slice(48, None)))
    data = ImageData("colours", train, test, ("r", "g", "b"), 12, MEAN, STD)
    return ImageDataModule(data, [View(12, mean=MEAN, std=STD)], batch_size=8, num_workers=0, engine="cpu", seed=0)


@pytest.mark.parametrize("name", ["swav", "simclr-cifar10", "supcon", "mae"])
def test_training_is_the_authors_optimiser_on_frozen_features_of_augmented_views(
    name: str, backbone: TinyBackbone, module: ImageDataModule
) -> None:
    probe = PublishedProbe(name, epochs=3, batch_size=16, lr=0.5)
    found = probe.train(backbone, module, torch.device("cpu"))["final"]
    published = PROTOCOLS[name]
    layer = classifier(torch.zeros(1, 6), 3, published, seed=0)
    unmoved = copy.deepcopy(layer)
    if name == "mae":
        weight, bias = layer[1].weight, layer[1].bias
        groups: list[Any] = [{"params": [weight]}, {"params": [bias], "plain": True}]
        optimizer: torch.optim.Optimizer = LARS(groups, 0.5, momentum=0.9, weight_decay=0.0, variant="torch")
    else:
        optimizer = torch.optim.SGD(
            layer.parameters(), 0.5, 0.9, nesterov=published.nesterov, weight_decay=published.weight_decay
        )
    backbone.eval()
    again, step = probe._datamodule(module, probe.rule, torch.device("cpu")), 0
    for _ in range(3):
        for batch in again.train_dataloader():
            rate = published.schedule(step, Clock(48, 16, 3, 3))
            for group in optimizer.param_groups:
                group["lr"] = 0.5 * rate
            with torch.no_grad():
                x = backbone(batch.views[0])
            optimizer.zero_grad()
            F.cross_entropy(layer(x), batch.labels).backward()
            optimizer.step()
            step += 1
    assert step == 9
    assert any(not torch.equal(p, q) for p, q in zip(found.parameters(), unmoved.parameters(), strict=True))
    for name, value in layer.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value)


def test_schedules_are_the_published_ones() -> None:
    clock = Clock(1000, 10, 100, 100)

    def rate(name: str, epoch: float) -> float:
        return PROTOCOLS[name].lr * PROTOCOLS[name].schedule(int(epoch * 100), clock)

    assert rate("supcon", 59.99) == 5
    assert rate("supcon", 60) == pytest.approx(1)
    assert rate("supcon", 99) == pytest.approx(5 * 0.2**3)
    assert rate("swav", 30.5) == rate("swav", 30) == pytest.approx(0.3 * (1 + math.cos(math.pi * 0.3)) / 2)
    assert rate("simclr", 50.5) == pytest.approx(1.6 * (1 + math.cos(math.pi * 0.505)) / 2)
    assert rate("pixpro", 2.5) == pytest.approx(15)
    assert rate("pixpro", 5) == pytest.approx(30)
    assert rate("mae", 5) == pytest.approx(3.2)
    assert rate("dino", 30.5) == rate("dino", 30) == pytest.approx(0.004 * (1 + math.cos(math.pi * 0.3)) / 2)


def test_only_rates_that_scale_with_the_batch_are_scaled() -> None:
    assert PublishedProbe("simclr-cifar10", batch_size=256).rule.lr == pytest.approx(0.1)
    assert PublishedProbe("swav", batch_size=512).rule.lr == 0.3


def test_colours_are_learnt_and_the_backbone_is_left_alone(backbone: TinyBackbone, module: ImageDataModule) -> None:
    backbone.train()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    results = PublishedProbe("swav", stages=["stem", "final"], epochs=15, batch_size=16).on_images(backbone, module)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert all(part.training for part in backbone.modules())
    assert all(p.grad is None for p in backbone.parameters())
    assert set(results) == {"linear_stem_top1", "linear_final_top1", "linear_top1"}
    assert results["linear_top1"] == results["linear_final_top1"] > 0.9
    assert results["linear_stem_top1"] > 0.9


def test_measured_on_plain_test_images(backbone: TinyBackbone, module: ImageDataModule) -> None:
    probe = PublishedProbe("swav", epochs=2, batch_size=16)
    heads = probe.train(backbone, module, torch.device("cpu"))
    test = extract(backbone, module.eval_dataloader("test"))["final"]
    right = heads["final"](test.x).argmax(dim=1) == test.known_labels
    assert probe.on_images(backbone, module)["linear_top1"] == pytest.approx(right.double().mean().item())


def test_the_protocol_line_names_every_change() -> None:
    published, changed = PublishedProbe("supcon").protocol, PublishedProbe("supcon", epochs=10, lr=1).protocol
    assert "epochs" not in published.split("(")[1]
    assert "epochs 10 for 100; lr 1 for 5" in changed
    assert all("\n" not in PublishedProbe(name).protocol for name in PROTOCOLS)


def test_wrong_names_and_missing_labels(backbone: TinyBackbone, module: ImageDataModule) -> None:
    with pytest.raises(UserError, match="Did you mean 'simclr'"):
        PublishedProbe("simcrl")
    with pytest.raises(UserError, match="selfsight finetune"):
        PublishedProbe("spark-finetune")
    module.data.train.labels = None
    with pytest.raises(UserError, match="needs labels"):
        PublishedProbe("swav", epochs=1).train(backbone, module, torch.device("cpu"))


def test_rotnets_classifiers_sit_on_maps_of_the_published_sizes(
    backbone: TinyBackbone, module: ImageDataModule
) -> None:
    rule = PROTOCOLS["rotation"]
    for channels, side in ((64, 12), (192, 7), (384, 5), (256, 6)):  # AlexNet's five maps, pooled as published
        head = classifier(torch.zeros(1, channels, 55, 55), 10, rule, seed=0)
        assert head.linear.in_features == channels * side**2
    for name in ("rotation", "rotation-conv", "rotation-mlp"):
        found = PublishedProbe(name, stages=["stem", "final"], epochs=6, batch_size=16, lr=0.1).on_images(
            backbone, module
        )
        assert found["linear_stem_top1"] > 0.9, name
    clock = Clock(100, 10, 100, 10)
    rates = [0.1 * PROTOCOLS["rotation-conv"].schedule(10 * epoch, clock) for epoch in (34, 35, 70, 85, 99)]
    assert rates == pytest.approx([0.1, 0.02, 0.004, 0.0008, 0.0008])


def test_few_labels_are_the_first_and_an_epoch_stays_as_long(backbone: TinyBackbone, module: ImageDataModule) -> None:
    labels, device = module.data.train.labels, torch.device("cpu")
    assert labels is not None
    probe = PublishedProbe("rotation-conv", batch_size=16, first_per_class=2)
    few = probe._datamodule(module, probe.rule, device)
    assert few.steps_per_epoch == 48 // 16
    drawn = [batch.labels for batch in few.train_dataloader()]
    assert torch.bincount(torch.cat(drawn)).tolist() == [16, 16, 16]
    assert torch.equal(few.data.train.pixels, module.data.train.pixels[:6]), "labels go 0, 1, 2, 0, 1, 2, ..."
    assert "first 2 of every class" in probe.protocol
    everything = PublishedProbe("rotation-conv", batch_size=16)._datamodule(module, probe.rule, device)
    assert torch.equal(everything.data.train.pixels, module.data.train.pixels)
    with pytest.raises(UserError, match="the smallest class has 16 labelled training images"):
        PublishedProbe("rotation-conv", first_per_class=17).train(backbone, module, device)


def test_stages_are_those_of_every_evaluator(backbone: TinyBackbone, module: ImageDataModule) -> None:
    head = nn.Linear(6, 5)
    probe = PublishedProbe("swav", stages=["last2", "projection"], epochs=8, batch_size=16, lr=1.0, head=head)
    heads = probe.train(backbone, module, torch.device("cpu"))
    assert [heads[stage].in_features for stage in ("last2", "projection")] == [4 + 6, 5]
    assert probe.on_images(backbone, module)["linear_last2_top1"] > 0.9
    for stage, told in (("banana", "is no stage"), ("projection", "comes after a projector, and there is none")):
        with pytest.raises(UserError, match=told):
            PublishedProbe("swav", stages=[stage]).on_images(backbone, module)
    with pytest.raises(UserError, match="'last2' is no map; take one of stem, top, final"):
        PublishedProbe("rotation", stages=["last2"]).on_images(backbone, module)


def test_dinos_probe_sits_on_class_tokens_and_says_so(backbone: TinyBackbone, module: ImageDataModule) -> None:
    torch.manual_seed(0)
    net = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=12, patch_size=4, embed_dim=12, depth=3)
    probe = PublishedProbe("dino", ["token3", "token-avg"], epochs=15, batch_size=8, lr=0.5)
    heads = probe.train(net, module, torch.device("cpu"))
    assert [heads[stage].in_features for stage in probe.stages] == [36, 24]
    assert probe.on_images(net, module)["linear_token3_top1"] > 0.9
    assert "stage token3, token-avg, the authors' token4 of ViT-S, token-avg of ViT-B" in probe.protocol
    assert "stage final, the authors'" in PublishedProbe("dino").protocol
    assert "stage" not in PublishedProbe("mae").protocol
    with pytest.raises(UserError, match="this TinyBackbone has not: take final"):
        PublishedProbe("dino", ["token4"]).on_images(backbone, module)


def test_test_images_without_a_label_are_not_counted_as_wrong(
    backbone: TinyBackbone, module: ImageDataModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = PublishedProbe("swav", epochs=15, batch_size=16)
    whole = probe.on_images(backbone, module)["linear_top1"]
    assert module.data.test is not None
    assert module.data.test.labels is not None
    module.data.test.labels[::2] = -1
    assert whole > 0.9
    assert probe.on_images(backbone, module)["linear_top1"] > 0.9
    monkeypatch.setattr(PublishedProbe, "train", lambda *_: pytest.fail("trained for nothing"))
    for labels in (torch.full((24,), -1), None):
        module.data.test.labels = labels
        with pytest.raises(UserError, match="the test images of data set 'colours' have no labels"):
            probe.on_images(backbone, module)
    module.data.test = None
    with pytest.raises(UserError, match="data set 'colours' has no test images"):
        probe.on_images(backbone, module)


def test_images_without_a_label_are_left_out(backbone: TinyBackbone, module: ImageDataModule) -> None:
    labels = module.data.train.labels
    assert labels is not None
    labels[:20] = -1
    probe = PublishedProbe("swav")
    seen = probe._datamodule(module, probe.rule, torch.device("cpu"))
    assert len(seen.images) == 28
