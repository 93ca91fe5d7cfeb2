"""Every method can be made with what the data tell, says what it is, and has one home for its defaults."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch
from hydra.utils import get_class
from omegaconf import OmegaConf
from torch import nn

from selfsight import cli
from selfsight.composition.catalogue import choices
from selfsight.engine import build
from selfsight.errors import UserError
from selfsight.methods.base import Method

from ..every_method import FACTS, arguments, backbones, every_method, told
from ..small import SmallNet

#: facts of a data set that is large enough for the defaults
LARGE = {"num_images": 9000, "num_unlabelled": 9000, "labels": torch.arange(300) % 3}
#: methods whose file in conf/method is for small images, and the recipe that has their values for ImageNet
ON_IMAGENET = {"simmatch": "imagenet/simmatch_1percent", "simmatchv2": "imagenet/simmatchv2_1percent"}


@pytest.mark.parametrize("kind", every_method(), ids=lambda kind: kind.__name__)
def test_it_is_made_of_a_backbone_and_what_it_needs(kind: type[Method]) -> None:
    assert set(kind.needs) <= {*FACTS}, "a fact that no data module tells"
    assert set(kind.needs) <= {*arguments(kind)}
    refusals = []
    for backbone in backbones():
        try:
            method = kind(backbone, **told(kind, **LARGE))
        except (UserError, AttributeError) as error:
            refusals.append(error)
            continue
        assert method.backbone is backbone
        return
    raise AssertionError(refusals)


@pytest.mark.parametrize("kind", every_method(), ids=lambda kind: kind.__name__)
def test_it_says_what_it_is_and_what_each_argument_does(kind: type[Method]) -> None:
    text = inspect.cleandoc(kind.__doc__ or "")
    assert re.match(r"[A-Z][^\n]*\.\n", text), "a docstring begins with a sentence in a line"
    for section, names in {"Args": ["backbone", *arguments(kind)], "Attributes": [*own_buffers(kind)]}.items():
        if names:
            lines = re.search(rf"^{section}:\n(.*?)(^\S|\Z)", text, flags=re.M | re.S)
            assert lines, f"no section {section}"
            said = re.findall(r"^    (\w+): ", lines[1], flags=re.M)
            assert [name for name in names if name not in said] == [], f"not in {section}, one a line"


def own_buffers(kind: type[Method]) -> list[str]:
    """Buffers that a method annotates as its own."""
    return [name for name, said in vars(kind).get("__annotations__", {}).items() if said == "Tensor"]


@pytest.mark.slow
@pytest.mark.parametrize("name", choices("method"))
def test_what_is_composed_for_imagenet_is_the_constructors_defaults(name: str) -> None:
    words = ["dataset=imagenet", f"method={name}"]
    if name in ON_IMAGENET:
        words = [f"recipe={ON_IMAGENET[name]}", "labels.per_class=13"]
    cfg = cli.compose("pretrain", cli.checked("pretrain", words, sweep=False))
    composed: Any = OmegaConf.to_container(cfg.method, resolve=True)
    kind = get_class(composed.pop("_target_"))
    defaults = {key: p.default for key, p in arguments(kind).items()}
    for key, value in composed.items():
        if key not in kind.needs:
            default = list(defaults[key]) if isinstance(defaults[key], tuple) else defaults[key]
            assert value == default, f"{key}: {value} in {' '.join(words)}, {default} in the constructor"


class Idle(Method):
    """Does not learn."""


def test_a_method_without_training_step_is_refused() -> None:
    with pytest.raises(UserError, match=r"^Idle has no training_step\(self, batch, batch_idx\)"):
        Idle(nn.Identity())


@pytest.mark.parametrize(
    ("target", "sentence"),
    [
        ("torch.nn.Identity", r"method \(torch.nn.Identity\) is no method"),
        ("selfsight.methods.semi.flexmatch.FlexMatch", "FlexMatch has to know num_unlabelled, which ImageDataModule"),
    ],
)
def test_what_cannot_be_a_method_of_these_data_is_refused(target: str, sentence: str) -> None:
    cfg = cli.compose("pretrain", ["limit_images=40", "batch_size=8"])
    data = build.datamodule(cfg)
    OmegaConf.set_struct(cfg, False)
    cfg.method = {"_target_": target}
    with pytest.raises(UserError, match=sentence):
        build.method(cfg, data, backbone=SmallNet())
