"""Checkpoints of LeJEPA's minimal script in (rbalestr-lab/lejepa, MINIMAL.md); the authors publish no weights.

Its backbone is timm's with a linear layer of 512 outputs as classifier, its projector torchvision's MLP, which counts
its dropouts.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from selfsight.checkpoints.format import Format, by_rules

#: place of a layer in torchvision's MLP: in ours, without dropout
_PLACES = {"0": "0", "1": "1", "4": "3", "5": "4", "8": "6"}


def _settings(state: Mapping[str, Tensor]) -> list[str]:
    widths = [len(v) for name, v in state.items() if name.startswith("projector.") and v.ndim == 2]
    return [f"method.embedding_dim={len(state['embedding.weight'])}", f"method.projector={widths}".replace(" ", "")]


LEJEPA = Format(
    name="LeJEPA",
    project="rbalestr-lab/lejepa",
    marks=(
        r"backbone\.head\.weight",
        r"backbone\.blocks\.0\.attn\.qkv\.weight",
        r"proj\.0\.weight",
        r"proj\.8\.weight",
    ),
    rename=by_rules(
        (r"backbone\.head\.(.+)", r"embedding.\1"),
        (r"backbone\..+", r"\g<0>"),
        *((rf"proj\.{theirs}\.(.+)", rf"projector.{ours}.\1") for theirs, ours in _PLACES.items()),
    ),
    unused=((r"(\w+\.)*(t|phi|weights|global_step)", "constants of the loss"), (r"probe\..+", "a classifier")),
    method="lejepa",
    settings=_settings,
)
