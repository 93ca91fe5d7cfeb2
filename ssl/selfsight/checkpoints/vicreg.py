"""The VICReg authors' checkpoints in (facebookresearch/vicreg, ``*_fullckpt.pth``), and those of Barlow Twins.

Both keep ``backbone`` and ``projector``; VICReg's hidden layers have biases, Barlow Twins has a BatchNorm in its loss.
Files of the backbone alone are weights alone.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from selfsight.checkpoints.format import Format, by_rules


def _widths(state: Mapping[str, Tensor]) -> str:
    """``[8192,8192,8192]``: outputs of the projector's linear layers."""
    return str([len(v) for name, v in state.items() if name.startswith("projector.") and v.ndim == 2]).replace(" ", "")


VICREG = Format(
    name="VICReg",
    project="facebookresearch/vicreg",
    marks=(
        r"backbone\.layer1\.0\.conv1\.weight",
        r"projector\.0\.bias",
        r"projector\.1\.running_mean",
        r"projector\.6\.weight",
    ),
    never=(r"projector\.6\.bias", r"(classifier|online_\w+|momentum_\w+|predictor|prototypes|head|neck)\..+"),
    rename=by_rules((r"(backbone|projector)\..+", r"\g<0>")),
    method="vicreg",
    settings=lambda state: [f"method.expander={_widths(state)}"],
)
BARLOW = Format(
    name="Barlow Twins",
    project="facebookresearch/barlowtwins",
    marks=(r"backbone\.layer1\.0\.conv1\.weight", r"projector\.0\.weight", r"bn\.running_mean"),
    never=(r"projector\.0\.bias", r"(classifier|online_\w+|momentum_\w+|predictor|prototypes|head|neck)\..+"),
    rename=by_rules((r"(backbone|projector|bn)\..+", r"\g<0>")),
    method="barlow",
    settings=lambda state: [f"method.projector={_widths(state)}"],
)
