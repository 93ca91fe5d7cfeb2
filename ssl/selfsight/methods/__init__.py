"""Methods, one file each; ``from selfsight.methods import SwAV`` finds a class when it is asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from selfsight.compat import moved

if TYPE_CHECKING:
    from selfsight.methods.barlow import BarlowTwins as BarlowTwins
    from selfsight.methods.base import Method as Method
    from selfsight.methods.byol import BYOL as BYOL
    from selfsight.methods.deepclusterv2 import DeepClusterV2 as DeepClusterV2
    from selfsight.methods.dino import DINO as DINO
    from selfsight.methods.distillation import Distillation as Distillation
    from selfsight.methods.feature_distillation import FeatureDistillation as FeatureDistillation
    from selfsight.methods.finetune import FineTune as FineTune
    from selfsight.methods.lejepa import LeJEPA as LeJEPA
    from selfsight.methods.mae import MAE as MAE
    from selfsight.methods.mocov3 import MoCoV3 as MoCoV3
    from selfsight.methods.pixpro import PixPro as PixPro
    from selfsight.methods.rotation import Rotation as Rotation
    from selfsight.methods.semi.adamatch import AdaMatch as AdaMatch
    from selfsight.methods.semi.base import SemiMethod as SemiMethod
    from selfsight.methods.semi.comatch import CoMatch as CoMatch
    from selfsight.methods.semi.fixmatch import FixMatch as FixMatch
    from selfsight.methods.semi.flexmatch import FlexMatch as FlexMatch
    from selfsight.methods.semi.freematch import FreeMatch as FreeMatch
    from selfsight.methods.semi.meanteacher import MeanTeacher as MeanTeacher
    from selfsight.methods.semi.mixmatch import MixMatch as MixMatch
    from selfsight.methods.semi.remixmatch import ReMixMatch as ReMixMatch
    from selfsight.methods.semi.simmatch import SimMatch as SimMatch
    from selfsight.methods.semi.simmatchv2 import SimMatchV2 as SimMatchV2
    from selfsight.methods.semi.softmatch import SoftMatch as SoftMatch
    from selfsight.methods.simclrv2 import SimCLRv2 as SimCLRv2
    from selfsight.methods.simsiam import SimSiam as SimSiam
    from selfsight.methods.spark import SparK as SparK
    from selfsight.methods.supce import SupCE as SupCE
    from selfsight.methods.supcon import SupCon as SupCon
    from selfsight.methods.swav import SwAV as SwAV
    from selfsight.methods.vicreg import VICReg as VICReg

_ALONE = (
    "BYOL", "DINO", "DeepClusterV2", "Distillation", "FineTune", "LeJEPA", "MAE", "MoCoV3", "PixPro", "Rotation",
    "SimCLRv2", "SimSiam", "SparK", "SupCE", "SupCon", "SwAV", "VICReg",
)  # fmt: skip
_SEMI = (
    "AdaMatch", "CoMatch", "FixMatch", "FlexMatch", "FreeMatch", "MeanTeacher", "MixMatch", "ReMixMatch",
    "SimMatch", "SimMatchV2", "SoftMatch",
)  # fmt: skip
#: class: the module it stands in
_HOMES = {
    "BarlowTwins": "barlow",
    "FeatureDistillation": "feature_distillation",
    "Method": "base",
    "SemiMethod": "semi.base",
    **{name: name.lower() for name in _ALONE},
    **{name: f"semi.{name.lower()}" for name in _SEMI},
}
__all__ = sorted(_HOMES)

_moved = moved(
    __name__,
    dict.fromkeys(("comatch", "fixmatch", "flexmatch", "freematch", "mixmatch", "simmatch", "simmatchv2"), "semi"),
)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    return _moved(name)


def reference(method: str) -> str:
    """The paper that the file of a method cites, by the choice of ``method=``; empty where that is not told."""
    homes = [home for home in _HOMES.values() if home == method or home.endswith((f".{method}", f"_{method}"))]
    if len(homes) != 1:
        return ""
    text = importlib.import_module(f"{__name__}.{homes[0]}").__doc__ or ""
    return " ".join(line.strip() for line in text.splitlines() if line.startswith("    "))
