from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from selfsight.contracts import Batch
from selfsight.errors import UserError
from selfsight.evaluation.features import Features, checked, extract, frozen, stage_names, staged
from selfsight.nn.vit import last_tokens

from .conftest import TinyBackbone


def test_eval_mode_is_proven_and_every_flag_restored(backbone: TinyBackbone, batches: list[Batch]) -> None:
    backbone.train()
    backbone.stem[1].eval()  # a frozen BatchNorm inside a training network has to stay frozen afterwards
    flags = [module.training for module in backbone.modules()]
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    first = extract(backbone, batches)["final"]
    second = extract(backbone, batches)["final"]
    assert torch.equal(first.x, second.x), "dropout or batch statistics were at work"
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert [module.training for module in backbone.modules()] == flags
    assert not first.x.requires_grad


def test_features_do_not_depend_on_the_batch_they_came_in(backbone: TinyBackbone, batches: list[Batch]) -> None:
    whole = Batch(
        [torch.cat([b.views[0] for b in batches])],
        torch.cat([b.indices for b in batches]),
        torch.cat([b.labels for b in batches if b.labels is not None]),
    )
    parts, one = extract(backbone, batches)["final"], extract(backbone, [whole])["final"]
    torch.testing.assert_close(parts.x, one.x)
    assert torch.equal(parts.indices, one.indices)
    assert torch.equal(parts.known_labels, one.known_labels)


def test_stages_are_the_pooled_outputs_of_the_named_modules(backbone: TinyBackbone, batches: list[Batch]) -> None:
    head = nn.Linear(6, 2)
    found = extract(backbone, batches, stages=["stem", "top", "final", "last2", "projection"], head=head)
    backbone.eval()
    images = torch.cat([b.views[0] for b in batches])
    with torch.no_grad():
        stem = backbone.stem(images)
        torch.testing.assert_close(found["stem"].x, stem.mean(dim=(2, 3)))
        torch.testing.assert_close(found["final"].x, backbone(images))
        torch.testing.assert_close(found["projection"].x, head(backbone(images)))
    torch.testing.assert_close(found["top"].x, found["final"].x)
    torch.testing.assert_close(found["last2"].x, torch.cat([found["stem"].x, found["top"].x], dim=1))
    assert not backbone.stem._forward_hooks


def test_every_stage_of_a_timm_network_has_the_width_the_registry_states() -> None:
    backbone = timm.create_model("resnet10t", num_classes=0)
    names = stage_names(backbone)
    found = extract(backbone, [Batch([torch.randn(2, 3, 32, 32)], torch.arange(2))], stages=names)
    widths = [info["num_chs"] for info in backbone.feature_info] + [backbone.num_features]
    assert [found[name].x.shape[1] for name in names] == widths


def test_class_tokens_are_those_of_dinos_linear_evaluation(batches: list[Batch]) -> None:
    net = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=9, patch_size=3, embed_dim=12, depth=3)
    stages = ["token1", "token3", "token-avg"]
    alone, found = extract(net, batches, stages=stages), extract(net, batches, stages=["final", "last2", *stages])
    images = torch.cat([batch.views[0] for batch in batches])
    with torch.no_grad():
        for stage, blocks in (("token1", 1), ("token3", 3), ("token-avg", 1)):
            expected = last_tokens(net.eval(), images, blocks, average=stage == "token-avg")
            torch.testing.assert_close(found[stage].x, expected)
            assert torch.equal(alone[stage].x, found[stage].x)
    torch.testing.assert_close(found["token1"].x, found["final"].x)
    torch.testing.assert_close(found["token-avg"].x[:, ::2], found["final"].x)
    for stage, told in (
        ("token4", "4 class tokens, and this backbone has 3 blocks: take token3"),
        ("token0", "asks for 0"),
    ):
        with pytest.raises(UserError, match=told):
            extract(net, batches, stages=[stage])
    with pytest.raises(UserError, match="Did you mean 'token-avg'"):
        extract(net, batches, stages=["token_avg"])
    with pytest.raises(UserError, match="'token3' is no map"), staged(net, ["token3"], maps=True):
        pass
    del batches[1:]
    pooled = timm.create_model("vit_relpos_small_patch16_224", num_classes=0, img_size=32, depth=2)
    with pytest.raises(UserError, match="has not"):
        extract(pooled, batches, stages=["token2"])


def test_a_network_that_will_not_leave_training_mode_is_refused(backbone: TinyBackbone, batches: list[Batch]) -> None:
    class Stubborn(nn.Dropout):
        def train(self, mode: bool = True) -> Stubborn:
            self.training = True
            return self

    backbone.top[3] = Stubborn()
    backbone.train()
    with pytest.raises(UserError, match="Stubborn stays in training mode"):
        extract(backbone, batches)
    assert backbone.training


def test_images_too_small_for_the_network() -> None:
    pools = nn.Sequential(nn.Conv2d(3, 4, 11, stride=4), nn.MaxPool2d(3, 2), nn.MaxPool2d(3, 2), nn.Flatten())
    for network in (pools, nn.Sequential(nn.Conv2d(3, 4, 31))):
        with pytest.raises(UserError, match="Images of 30 x 30 pixels are too small"):
            extract(network, [Batch([torch.zeros(2, 3, 30, 30)], torch.arange(2))])


def test_frozen_restores_after_an_error(backbone: TinyBackbone) -> None:
    backbone.train()
    with pytest.raises(ZeroDivisionError), frozen(backbone):
        raise ZeroDivisionError
    assert all(module.training for module in backbone.modules())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("stage", "sentence"),
    [
        ("stemm", "Did you mean 'stem'"),
        ("last3", "asks for 3 stages"),
        ("projection", "comes after a projector, and there is none"),
        ("token4", "vision transformers .* have and this TinyBackbone has not: take final"),
        ("token-avg", "asks for class tokens"),
    ],
)
def test_wrong_stages(backbone: TinyBackbone, batches: list[Batch], stage: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        extract(backbone, batches, stages=[stage])


def features(x: torch.Tensor, labels: torch.Tensor | None) -> Features:
    return Features(x, labels, torch.arange(len(x)))


def test_bad_features_are_one_sentence_each() -> None:
    x, labels = torch.randn(6, 3), torch.arange(6) % 2
    good = features(x, labels)
    broken = x.clone()
    broken[4, 1] = torch.nan
    for train, test, sentence in [
        (good, features(broken, labels), "1 of 6 test features are NaN"),
        (features(x, torch.zeros_like(labels)), good, "carry one label"),
        (good, features(x, None), "have no labels"),
        (good, features(x[:, :2], labels), "3 dimensions and test features 2"),
        (good, features(x[:0], labels[:0]), "no labelled images"),
    ]:
        with pytest.raises(UserError, match=sentence) as error:
            checked(train, test)
        assert "\n" not in str(error.value)


def test_unlabelled_images_are_left_out_where_labels_matter() -> None:
    some = features(torch.arange(12.0).view(6, 2), torch.tensor([0, -1, 1, -1, 0, 1]))
    train, _ = checked(some, some)
    assert train.indices.tolist() == [0, 2, 4, 5]
    assert len(checked(some, some, labels=False)[1]) == 6
