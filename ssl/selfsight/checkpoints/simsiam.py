"""The SimSiam authors' checkpoints in (facebookresearch/simsiam, ``checkpoint_0099.pth.tar``).

The projector stands in the place of the ResNet's classifier, ``encoder.fc``.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from selfsight.checkpoints.format import Format, by_rules


def _settings(state: Mapping[str, Tensor]) -> list[str]:
    return [
        f"method.dim={len(state['projector.6.weight'])}",
        f"method.predictor_dim={len(state['predictor.0.weight'])}",
    ]


SIMSIAM = Format(
    name="SimSiam",
    project="facebookresearch/simsiam",
    marks=(
        r"encoder\.layer1\.0\.conv1\.weight",
        r"encoder\.fc\.0\.weight",
        r"encoder\.fc\.6\.bias",
        r"predictor\.0\.weight",
    ),
    rename=by_rules(
        (r"encoder\.fc\.(.+)", r"projector.\1"),
        (r"encoder\.(.+)", r"backbone.\1"),
        (r"predictor\.(.+)", r"predictor.\1"),
    ),
    method="simsiam",
    settings=_settings,
)
