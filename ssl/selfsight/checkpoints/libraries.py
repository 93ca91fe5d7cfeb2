"""How libraries name the networks in their checkpoints. Their heads have their own forms, so the backbone is taken."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from selfsight.checkpoints.format import Converted, Format, State, by_rules

HEAD = "a head of another form than here: training goes on from the backbone"
SECOND = "a second network (momentum encoder, teacher or student)"
MEMORY = "keys or codes remembered from earlier batches"
CLASSIFIES = "a classifier"
CONSTANTS = "constants of preprocessing or loss"

VISSL = Format(
    name="VISSL",
    project="facebookresearch/vissl",
    marks=(r"(trunk\.)?_feature_blocks\.(conv1|layer1\.0\.conv1)\.weight|trunk\.(patch_embed|blocks\.0)\..+",),
    rename=by_rules((r"(?:trunk\.)?_feature_blocks\.(.+)", r"backbone.\1"), (r"trunk\.(.+)", r"backbone.\1")),
    unused=((r"heads\..+", HEAD),),
)

MMPRETRAIN = Format(
    name="mmpretrain",
    project="open-mmlab/mmpretrain",
    marks=(
        r"backbone\.(conv1|layer1\.0\.conv1|patch_embed\.projection|stages\.0\.0\.depthwise_conv)\.weight",
        r"backbone\.(patch_embed\.projection|stages\.0\.0\.depthwise_conv)\.weight|(neck|head|data_preprocessor)\..+",
    ),
    rename=by_rules((r"backbone\..+", r"\g<0>")),
    unused=(
        (r"head\.(fc|layers\.\d|layers\.head)\.(weight|bias)", CLASSIFIES),
        (r"(neck|head|projector|predictor)\..+", HEAD),
        (r"(target_net|target_generator|teacher|momentum_\w+|encoder_k)\..+", SECOND),
        (r"(queue|queue_ptr|memory_bank\..+)", MEMORY),
        (r"data_preprocessor\..+", CONSTANTS),
    ),
)

LIGHTLY = Format(
    name="lightly",
    project="lightly-ai/lightly",
    marks=(r"(query_)?backbone\..+", r"(student_|query_)?projection_head\.(layers|last_layer)\..+"),
    rename=by_rules((r"(?:query_)?backbone\.(.+)", r"backbone.\1")),
    unused=(
        (r"(student|teacher|momentum|key)_(backbone|projection_head|prediction_head)\..+", SECOND),
        (r"(backbone|projection_head)_momentum\..+", SECOND),
        (r"(query_)?(projection_head|prediction_head|prototypes)\..+", HEAD),
        (r"(queues?|memory_bank|start_queue_at)\b.*|criterion\.memory_bank\..+", MEMORY),
        (r"criterion\..+", CONSTANTS),
        (r"online_classifier\..+", CLASSIFIES),
    ),
)


def _pads_by_two(spec: dict[str, Any], state: State) -> dict[str, Any]:
    """solo-learn's first convolution for small images is as wide as others' and pads by 2 (solo/methods/base.py)."""
    return {**spec, "stem": "cifar_pad2"} if spec.get("stem") == "cifar" else spec


SOLO = Format(
    name="solo-learn",
    project="vturrisi/solo-learn",
    marks=(
        r"(backbone|encoder)\..+",
        r"classifier\.weight",
        r"(projector|predictor|prototypes|momentum_backbone|momentum_encoder|decoder|head)\..+",
    ),
    never=(r"projector\.0\.linear\.weight", r"(teacher|target_backbone|average)\..+", "usage"),  # a run of ours
    rename=by_rules((r"(?:backbone|encoder)\.(.+)", r"backbone.\1")),
    unused=(
        (r"(momentum_)?classifier\..+", CLASSIFIES),
        (r"momentum_\w+\..+", SECOND),
        (r"queue\w*|local_memory_\w+|assignments|centroids.*", MEMORY),
        (r"(projector|predictor|prototypes|decoder\w*|head|mask_token|key_\w+)\b.*", HEAD),
        (r"\w*loss\w*\..+", CONSTANTS),
    ),
    amend=_pads_by_two,
)

#: prefixes of a network in a checkpoint of nobody's form, the most telling first
PREFIXES = (
    "", "backbone.", "encoder_q.", "online_encoder.", "base_encoder.", "encoder.", "student.backbone.", "student.",
    "trunk.", "feature_extractor.", "features.", "online_network.", "online.", "visual.", "f.",
)  # fmt: skip


@dataclass(frozen=True)
class Plain(Format):
    """Weights of a network alone, or under a prefix beside what a training has kept."""

    prefix: str = ""

    def convert(self, state: Mapping[str, Tensor]) -> Converted:
        converted = Converted()
        for name, value in state.items():
            reason = next((why for pattern, why in self.unused if re.fullmatch(pattern, name)), None)
            if name.startswith(self.prefix):
                ours = "backbone." + name.removeprefix(self.prefix).removeprefix("module.")
                converted.names[name] = ours
                converted.state[ours] = value
            elif reason is not None:
                converted.leave_out(reason, [name])
            else:
                converted.unknown.append(name)
        return converted


PLAIN = Plain(
    name="weights alone",
    project="torchvision, timm, or a plain state_dict",
    marks=(r"(.+\.)?(layer1\.0\.conv1|blocks\.0\.attn\.qkv|stages\.0\.blocks\.0\.conv_dw)\.weight",),
    rename=lambda name: name,
    unused=(
        (r"(\w+_)?(k|momentum|teacher|target|ema|slow|key|average)(_\w+)?\..+", SECOND),
        (r"(\w+_)?(queues?|memory|banks?|center|centroids|pointer|ptr|usage|known|clusters)(_\w+)?(\..+)?", MEMORY),
        (r"(\w+_)?(classifier|probe|linear|fc)\..+", CLASSIFIES),
        (r"(\w+_)?(project\w+|predict\w+|proj|mlp|neck|prototypes|heads?|decoder|propagation|mask_tokens?)\b.*", HEAD),
        (r"(criterion|loss|loss_fn|data_preprocessor|normalize)\..+|mean|std", CONSTANTS),
    ),
)
