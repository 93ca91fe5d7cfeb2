"""Others' checkpoints: whose a file is, which network is in it, and what else it holds for training to go on from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from selfsight.checkpoints import authors
from selfsight.checkpoints.architecture import BEHIND, Spec, blank, matching, recognise, renamed, shown
from selfsight.checkpoints.byol import BYOL
from selfsight.checkpoints.dino import DINO
from selfsight.checkpoints.format import Converted, Format, State, unwrapped
from selfsight.checkpoints.lejepa import LEJEPA
from selfsight.checkpoints.libraries import LIGHTLY, MMPRETRAIN, PLAIN, PREFIXES, SOLO, VISSL
from selfsight.checkpoints.mae import MAE
from selfsight.checkpoints.mocov3 import MOCOV3
from selfsight.checkpoints.pixpro import PIXPRO
from selfsight.checkpoints.rotation import ALEXNET_FORMAT, NIN
from selfsight.checkpoints.simclr import SIMCLR, SIMCLR_SUPERVISED
from selfsight.checkpoints.simmatchv2 import SIMMATCHV2
from selfsight.checkpoints.simsiam import SIMSIAM
from selfsight.checkpoints.spark import SPARK
from selfsight.checkpoints.supcon import SUPCE, SUPCON
from selfsight.checkpoints.swav import DEEPCLUSTERV2, SWAV
from selfsight.checkpoints.vicreg import BARLOW, VICREG
from selfsight.errors import UserError

#: asked in this order; `PLAIN` after all of them
FORMATS: tuple[Format, ...] = (
    SIMCLR, SIMCLR_SUPERVISED, SWAV, DEEPCLUSTERV2, PIXPRO, SPARK, SIMMATCHV2, NIN, ALEXNET_FORMAT, SUPCON, SUPCE,
    BYOL, MOCOV3, SIMSIAM, VICREG, BARLOW, LEJEPA, DINO, MAE, VISSL, MMPRETRAIN, LIGHTLY, SOLO,
)  # fmt: skip

#: what a file calls the part that holds the network, and the parts that do not
NETWORKS = ("state_dict", "model", "model_state_dict", "module", "network", "net", "params", "weights")
AVERAGES = ("state_dict_ema", "model_ema", "ema", "ema_state_dict")
OPTIMISERS = ("optimizer", "optimizer_states", "optimizers", "optim", "optimizer_state_dict")
RECORDS = ("scaler", "fp16_scaler", "amp", "callbacks", "lr_schedulers", "scheduler", "loops")


@dataclass
class Imported:
    """A checkpoint of others, read.

    Attributes:
        format: whose it is. spec: arguments of `selfsight.backbones.registry.create`.
        backbone: the network's tensors under its names here.
        state: the whole state dict of ``format.method``; empty where the file holds no more than the network.
        unused: reason: names of what is left out.
        told: what was changed, a sentence each.
        epochs: finished ones, where the file says so.
        slots: what the optimiser keeps of each parameter, by our name of it; empty where the file does not tell.
    """

    format: Format
    spec: Spec
    backbone: State
    state: State
    unused: dict[str, list[str]]
    told: list[str]
    epochs: int | None
    slots: dict[str, dict[str, Tensor]]

    @property
    def settings(self) -> list[str]:
        """Words for ``selfsight pretrain`` that make the method this is the state of."""
        return [f"method={self.format.method}", *self.format.settings(self.state)]


def read(
    path: str | Path,
    *,
    backbone: str | Mapping[str, Any] | None = None,
    trust: bool = False,
    net: nn.Module | None = None,
) -> Imported:
    """A checkpoint of any project known here.

    Args:
        path: see `selfsight.checkpoints.authors.read`.
        backbone: the network, where its tensors do not tell: a name, or arguments of `create`.
        trust: let the file run the code that it brings.
        net: the network itself, whose tensors are looked for.

    Raises:
        UserError: the file cannot be read, is of no known project, or holds a network that is not whole.
    """
    content = authors.read(path, trust=trust)
    try:
        return of(content, backbone=backbone, net=net)
    except UserError as error:
        raise UserError(f"'{path}': {error}", status=error.status) from None


def of(
    content: Mapping[str, Any], *, backbone: str | Mapping[str, Any] | None = None, net: nn.Module | None = None
) -> Imported:
    """`read` for what a file holds, once it is read."""
    sought = Sought.given(backbone, net)
    tensors, unused = networks(content)
    told: list[str] = []
    state = unwrapped(in_single_precision(tensors, told))
    if not state:
        raise UserError("there are no weights in it.")
    format = next((format for format in FORMATS if format.matches(state)), None) or plain(state, sought)
    converted = format.convert(state)
    if converted.unknown:
        raise UserError(
            f"it looks like {format.title}, but {len(converted.unknown)} of its tensors have no place in such a file: "
            f"{listed(converted.unknown)}."
        )
    spec, weights = network(converted, format, sought)
    for reason, names in unused.items():
        converted.leave_out(reason, names)
    whole = {f"{format.network}{name}": value for name, value in weights.items()}
    whole |= {name: value for name, value in converted.state.items() if not name.startswith(format.network)}
    return Imported(
        format=format,
        spec=spec,
        backbone=weights,
        state=whole if format.method is not None else {},
        unused=converted.unused,
        told=told,
        epochs=_epochs(content, format),
        slots=converted.slots or slots(content, state, converted.names, format),
    )


# --- the network -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sought:
    """The network that is looked for.

    Attributes:
        spec: its arguments, as far as they are known. wanted: its state dict. what: it is, for sentences.
        left_out: its parts without a parameter, which stand where a network that classifies has further layers.
    """

    spec: Spec
    wanted: Mapping[str, Tensor]
    what: str
    left_out: Sequence[str] = ()

    @classmethod
    def of(cls, net: nn.Module, spec: Spec, what: str) -> Sought:
        bare = [name for name, part in net.named_children() if not any(True for _ in part.parameters())]
        return cls(spec, net.state_dict(), what, bare)

    @classmethod
    def made_from(cls, spec: Spec) -> Sought:
        return cls.of(blank(spec), spec, shown(spec))

    @classmethod
    def given(cls, backbone: str | Mapping[str, Any] | None, net: nn.Module | None) -> Sought | None:
        """
        Raises:
            UserError: there is no network of that name.
        """
        if net is not None:
            return cls.of(net, {}, "backbone as this run has it")
        if backbone is None:
            return None
        return cls.made_from({"name": backbone} if isinstance(backbone, str) else dict(backbone))


def network(converted: Converted, format: Format, sought: Sought | None) -> tuple[Spec, State]:
    """The network of a converted checkpoint and its tensors; layers behind it are left out, anything else is a mistake.

    Raises:
        UserError: its family is not known, it is not whole, or there is more than the network.
    """
    state = {n.removeprefix(format.network): v for n, v in converted.state.items() if n.startswith(format.network)}
    if sought is None:
        spec = converted.spec
        if spec is None:
            found = recognise(state)
            if found is None:
                raise UserError(
                    f"its network ({listed(state)}) is of a family that names do not tell; name it as timm does: "
                    "backbone=NAME."
                )
            spec = format.amend(found[0], state)
        sought = Sought.made_from(spec)
    state = renamed(state)
    weights, left = matching(state, sought.wanted, sought.what)
    rest = [n for n in left if not re.fullmatch(BEHIND, n) and n.partition(".")[0] not in sought.left_out]
    if rest:
        raise UserError(
            f"beside a {sought.what} it holds {len(rest)} tensors that this network does not have: {listed(rest)}; if "
            "it is another network, name it as timm does: backbone=NAME."
        )
    wide = next((f", {len(state[name])} outputs" for name in reversed(left) if state[name].ndim > 1), "")
    converted.leave_out(f"layers behind the features{wide}", left)
    return sought.spec, weights


def plain(state: Mapping[str, Tensor], sought: Sought | None) -> Format:
    """The format of weights alone under the first prefix below which there is a network.

    Raises:
        UserError: there is none; names the nearest format and what it lacks.
    """
    if sought is None:
        found = next((p for p in PREFIXES if recognise(below(state, p)) is not None), None)
    else:
        shares = {p: len(sought.wanted.keys() & renamed(below(state, p)).keys()) for p in PREFIXES}
        found = max(shares, key=lambda p: shares[p]) if any(shares.values()) else None
    if found is None:
        raise UserError(unknown(state))
    return replace(PLAIN, name=PLAIN.name + (f" under '{found}'" if found else ""), prefix=found)


def below(state: Mapping[str, Tensor], prefix: str) -> State:
    """What lies under a prefix, without it."""
    return {n.removeprefix(prefix).removeprefix("module."): v for n, v in state.items() if n.startswith(prefix)}


def unknown(state: Mapping[str, Tensor]) -> str:
    """A sentence on names that no format has: the nearest one, and what it would have."""

    def share_missing(format: Format) -> float:
        return len(format.missing(state)) / len(format.marks)

    nearest = min(FORMATS, key=share_missing)
    nearest = nearest if share_missing(nearest) <= 0.5 else PLAIN
    return (
        f"its {len(state)} tensors ({listed(state)}) are those of no project known here; the nearest is "
        f"{nearest.title}, of which {listed(map(spoken, nearest.missing(state)))} is missing. If they are the weights "
        "of one network, name it as timm does: backbone=NAME."
    )


def spoken(mark: str) -> str:
    """A name that a mark fits."""
    mark = re.sub(r"\([^()]*\)\?", "", mark)
    while (shorter := re.sub(r"\(([^()|]*)[^()]*\)", r"\1", mark)) != mark:
        mark = shorter
    return mark.partition("|")[0].replace(".+", "*").replace(r"\d", "0").replace("\\", "")


# --- what a file holds -----------------------------------------------------------------------------------------------


def networks(content: Mapping[str, Any]) -> tuple[State, dict[str, list[str]]]:
    """The tensors of the networks in a file by name, and the names of what else there is, by reason."""
    unused: dict[str, list[str]] = {}
    if isinstance(content.get("classy_state_dict"), Mapping):  # VISSL's, with its optimiser inside
        content = content["classy_state_dict"]
        content = content.get("base_model", content)
    parts = {str(key): dict(authors.tensors(value, str(key))) for key, value in content.items()}
    chosen = next((key for key in NETWORKS if isinstance(content.get(key), Mapping) and parts[key]), None)
    state: State = {}
    for key, found in parts.items():
        if key in OPTIMISERS:
            reason = "state of the optimiser"
        elif key in AVERAGES and chosen is not None:
            reason = "a moving average beside the network"
        elif key in RECORDS or (chosen is not None and key != chosen):
            reason = "records of the training"
        else:
            state |= {name.removeprefix(f"{chosen}."): value for name, value in found.items()}
            continue
        unused.setdefault(reason, []).extend(found)
    return state, {reason: names for reason, names in unused.items() if names}


def in_single_precision(state: Mapping[str, Tensor], told: list[str]) -> State:
    """``state`` with half and bfloat16 tensors in float32, which is said."""
    half = {value.dtype for value in state.values() if value.dtype in (torch.float16, torch.bfloat16)}
    if half:
        names = " and ".join(sorted(str(kind).removeprefix("torch.") for kind in half))
        told.append(f"weights are stored in {names}; they become float32")
    return {name: value.float() if value.dtype in half else value for name, value in state.items()}


def _epochs(content: Mapping[str, Any], format: Format) -> int | None:
    epoch = content.get("epoch")
    return int(epoch) + format.epoch_offset if isinstance(epoch, (int, float, np.number)) else None


# --- the optimiser ---------------------------------------------------------------------------------------------------


def slots(
    content: Mapping[str, Any], state: Mapping[str, Tensor], names: Mapping[str, str], format: Format
) -> dict[str, dict[str, Tensor]]:
    """What a PyTorch optimiser in the file keeps of each parameter, by our name of it; empty where that is not told.

    Such a state numbers its parameters: in the order of the network, or kernels apart from vectors. Which it is follows
    from the shapes, all of which have to agree.
    """
    found = next((content[key] for key in OPTIMISERS if key in content), None)
    kept = found[0] if isinstance(found, Sequence) and found else found
    if not isinstance(kept, Mapping) or not isinstance(kept.get("state"), Mapping) or not kept["state"]:
        return {}
    numbers = [[int(i) for i in group["params"]] for group in kept.get("param_groups", ())]
    trained = [n for n in names if not n.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    online = [name for name in trained if not re.fullmatch(format.untrained, name)]
    for parameters in (online, trained):
        vectors = [name for name in parameters if state[name].ndim <= 1]
        kernels = [name for name in parameters if state[name].ndim > 1]
        for groups in ([parameters], [kernels, vectors], [vectors, kernels]):
            if [len(group) for group in groups] != [len(group) for group in numbers]:
                continue
            order = dict(zip(chain.from_iterable(numbers), chain.from_iterable(groups), strict=True))
            values = {order[int(i)]: _words_of_ours(slot) for i, slot in kept["state"].items()}
            if all(v.shape in ((), state[name].shape) for name, slot in values.items() for v in slot.values()):
                return {names[name]: slot for name, slot in values.items() if slot}
    return {}


def _words_of_ours(slot: Mapping[str, Any]) -> dict[str, Tensor]:
    """Numbers and tensors of a parameter's slot; what the LARS of Facebook's projects calls ``mu`` is its momentum."""
    found = {key: value for key, value in slot.items() if isinstance(value, (Tensor, int, float))}
    return {"momentum_buffer" if key == "mu" else key: torch.as_tensor(value) for key, value in found.items()}


def listed(names: Iterable[str], most: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")
