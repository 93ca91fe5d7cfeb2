"""The SimMatchV2 authors' checkpoints in, and out again (mingkai-zheng/SimMatchV2, ``main.py`` and ``models/``).

A checkpoint holds ``epoch, best_acc1, best_acc5, arch, state_dict, optimizer, scaler``. Its state dict has the prefix
``module.``, six buffers, and two networks of the same shape, ``main`` (student) and ``ema`` (teacher), each with
``backbone`` (torchvision's ResNet-50 without fc), ``fc``, ``head`` and ``norm`` (the last one with the feature norm).
The classifier expects LayerNorm'ed features: it is no ``fc`` for a torchvision ResNet.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from selfsight.checkpoints.format import Format, State, by_rules
from selfsight.errors import UserError

#: (the authors' network, the prefix of its backbone here, of its heads)
_NETWORKS = (
    ("main.", "backbone.", "heads."),
    ("ema.", "teacher.module.backbone.", "teacher.module.heads."),
)
_HEADS = ("fc.", "head.", "norm.")


def official_names(state: Mapping[str, Tensor]) -> State:
    """State dict of our `SimMatchV2` under the authors' names, in their order; labels of the bank one-hot."""
    classes = state["da"].shape[-1]
    buffers = {
        "l_bank": state["l_bank"],
        "l_labels": F.one_hot(state["l_labels"], classes).to(state["l_bank"].dtype),
        "ptr": state["u_bank.pointer"].reshape(1),
        "u_bank": state["u_bank.data"],
        "u_labels": state["u_labels.data"],
        "da": state["da"],
    }
    named = {f"module.{name}": value for name, value in buffers.items()}
    for network, backbone, heads in _NETWORKS:
        for ours, theirs in ((backbone, "backbone."), *((heads + part, part) for part in _HEADS)):
            for name, value in state.items():
                if name.startswith(ours):
                    named[f"module.{network}{theirs}{name.removeprefix(ours)}"] = value
    return named


def from_official(checkpoint: Mapping[str, Any]) -> State:
    """State dict for our `SimMatchV2` from an authors' checkpoint, or from its ``state_dict``.

    The method has to be built with the same number of labelled images and the same ``K``.

    Raises:
        UserError: a file that is not one of theirs.
    """
    return SIMMATCHV2.convert(_authors_state(checkpoint)).state


_our_name = by_rules(
    (r"l_bank|l_labels|da|ptr", r"\g<0>"),
    (r"u_bank|u_labels", r"\g<0>.data"),
    *(
        pair
        for network, backbone, heads in _NETWORKS
        for pair in ((rf"{network}backbone\.(.+)", rf"{backbone}\1"), (rf"{network}(.+)", rf"{heads}\1"))
    ),
)


def _banks(state: State) -> State:
    """Labels as numbers; where each bank goes on being written, and how many of its rows are."""
    ours = dict(state)
    pointer, labels = ours.pop("ptr"), ours["l_labels"]
    filled = (ours["u_labels.data"].sum(1) > 0).sum()
    ours["l_labels"] = labels.argmax(1) if labels.ndim == 2 else labels
    for bank in ("u_bank", "u_labels"):
        ours |= {f"{bank}.pointer": pointer.reshape(()).to(torch.int64), f"{bank}.filled": filled}
    return ours


def _settings(state: Mapping[str, Tensor]) -> list[str]:
    return [
        f"method.K={len(state['u_bank.data'])}",
        f"method.dim={state['l_bank'].shape[1]}",
        f"method.norm_feat={str('heads.norm.weight' in state).lower()}",
    ]


def backbone_weights(checkpoint: Mapping[str, Any], *, teacher: bool = False) -> State:
    """The ResNet of student or teacher under torchvision's names; nothing but ``fc`` is missing."""
    prefix = ("ema." if teacher else "main.") + "backbone."
    state = _authors_state(checkpoint)
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _authors_state(checkpoint: Mapping[str, Any]) -> State:
    state = checkpoint.get("state_dict", checkpoint)
    state = {name.removeprefix("module."): value for name, value in state.items()}
    absent = [name for name in ("l_bank", "u_bank", "u_labels", "ptr", "da", "main.fc.weight") if name not in state]
    if absent:
        raise UserError(
            f"This is no checkpoint of SimMatchV2's authors: {', '.join(absent)} not found; give the .pth file of a "
            "training run of mingkai-zheng/SimMatchV2."
        )
    return state


SIMMATCHV2 = Format(
    name="SimMatchV2",
    project="mingkai-zheng/SimMatchV2",
    marks=("l_bank", "l_labels", "u_bank", "u_labels", "ptr", "da", r"main\.fc\.weight", r"ema\.fc\.weight"),
    rename=_our_name,
    method="simmatchv2",
    settings=_settings,
    finish=_banks,
    untrained=r"(l|u)_(bank|labels)|ptr|da|ema\..+",
)
