"""How a project's checkpoints are told from others', and what each of their tensors is here."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]

IMAGENET = {"image_size": 224, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}

#: what a name may begin with that says nothing: containers of a file, and what wraps a network for training
WRAPPERS = (
    "module.", "_orig_mod.", "model.", "state_dict.", "network.", "net.", "model_state_dict.", "params.", "weights.",
    "classy_state_dict.base_model.model.", "base_model.model.", "trunk.base_model.", "_forward_module.",
)  # fmt: skip


@dataclass
class Converted:
    """A checkpoint's tensors under our names.

    Attributes:
        state: ``backbone.*`` and, where the method is one of ours, the rest of its state dict.
        names: our name of each of theirs that is used.
        unused: reason: names in the file of what is left out for it.
        unknown: names that neither have a place here nor a reason to be left out.
        spec: arguments of `selfsight.backbones.registry.create`, where the format itself tells the network.
        slots: what the optimiser keeps of each parameter, by our name and its own word, where the file tells by name.
    """

    state: State = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    unused: dict[str, list[str]] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    spec: dict[str, Any] | None = None
    slots: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def leave_out(self, reason: str, names: Iterable[str]) -> None:
        if found := list(names):
            self.unused.setdefault(reason, []).extend(found)


@dataclass(frozen=True)
class Format:
    """The checkpoints of one project.

    Attributes:
        name: of the method or library; project: where its files come from.
        marks: patterns, each of which is the whole of some name in every such file.
        never: patterns that no name matches.
        rename: our name of one of theirs; None where it has none.
        unused: (pattern, reason) of names that are left out.
        method: the choice of ``method=`` that goes on from such a file; None where no method of ours does.
        settings: words for ``selfsight pretrain`` that follow from the shapes of the converted state.
        anew: patterns of our names that the file does not hold and that begin as in a new run.
        finish: values that have another form here, from renamed to ours.
        network: prefix in our names of the network that is evaluated.
        described: image size and normalisation the network was trained with.
        untrained: pattern of their names that the optimiser does not hold: banks and slow networks.
        amend: arguments of the network that shapes do not tell, from those that they do.
        epoch_offset: what the file's ``epoch`` is less than the number of finished epochs.
    """

    name: str
    project: str
    marks: tuple[str, ...]
    rename: Callable[[str], str | None]
    never: tuple[str, ...] = ()
    unused: tuple[tuple[str, str], ...] = ()
    method: str | None = None
    settings: Callable[[State], Sequence[str]] = lambda state: ()
    anew: tuple[str, ...] = ()
    finish: Callable[[State], State] = lambda state: state
    network: str = "backbone."
    described: Mapping[str, Any] = field(default_factory=lambda: IMAGENET)
    untrained: str = ""
    amend: Callable[[dict[str, Any], State], dict[str, Any]] = lambda spec, state: spec
    epoch_offset: int = 0

    @property
    def title(self) -> str:
        return f"{self.name} ({self.project})"

    def missing(self, names: Iterable[str]) -> list[str]:
        """Marks that no name matches; empty for a file of this format."""
        names = list(names)
        return [mark for mark in self.marks if not any(re.fullmatch(mark, name) for name in names)]

    def matches(self, names: Iterable[str]) -> bool:
        names = list(names)
        return not self.missing(names) and not any(re.fullmatch(no, name) for no in self.never for name in names)

    def convert(self, state: Mapping[str, Tensor]) -> Converted:
        """Every tensor of ``state`` under our name, left out for a reason, or unknown."""
        converted = Converted()
        for name, value in state.items():
            ours = self.rename(name)
            reason = next((why for pattern, why in self.unused if re.fullmatch(pattern, name)), None)
            if reason is not None:
                converted.leave_out(reason, [name])
            elif ours is None:
                converted.unknown.append(name)
            else:
                converted.names[name] = ours
                converted.state[ours] = value
        if not converted.unknown:
            converted.state = self.finish(converted.state)
        return converted


def by_rules(*rules: tuple[str, str]) -> Callable[[str], str | None]:
    """A `Format.rename` from (pattern, ours): the first pattern that is the whole of a name says the new one."""
    compiled = [(re.compile(pattern), ours) for pattern, ours in rules]

    def rename(name: str) -> str | None:
        matches = ((pattern.fullmatch(name), ours) for pattern, ours in compiled)
        return next((match.expand(ours) for match, ours in matches if match), None)

    return rename


def unwrapped(state: Mapping[str, Tensor]) -> State:
    """``state`` without what every one of its names begins with for nothing, and without `torch.compile`'s prefix."""
    found = {re.sub(r"(^|\.)_orig_mod\.", r"\1", name): value for name, value in state.items()}
    while found:
        prefix = next((p for p in WRAPPERS if all(name.startswith(p) for name in found)), None)
        if prefix is None:
            break
        found = {name.removeprefix(prefix): value for name, value in found.items()}
    return found


def counters(state: State) -> State:
    """``state`` with the counters of BatchNorm, at 0 where a file has none (PyTorch before 0.4.1, TensorFlow)."""
    absent = {name.replace("running_mean", "num_batches_tracked") for name in state if name.endswith("running_mean")}
    return {name: torch.tensor(0) for name in absent} | state


#: blocks of the four stages of a ResNet, and whether they are bottlenecks: depth
RESNETS: dict[tuple[bool, tuple[int, ...]], int] = {
    (False, (2, 2, 2, 2)): 18, (False, (3, 4, 6, 3)): 34, (True, (3, 4, 6, 3)): 50, (True, (3, 4, 23, 3)): 101,
    (True, (3, 8, 36, 3)): 152, (True, (3, 24, 36, 3)): 200,
}  # fmt: skip


def length(state: Mapping[str, Tensor], pattern: str) -> int:
    """How many numbers the first group of ``pattern`` takes at the beginning of names, counted from 0."""
    return 1 + max((int(m[1]) for name in state if (m := re.match(pattern, name))), default=-1)


def depth_of(state: Mapping[str, Tensor], prefix: str = "") -> tuple[int | None, bool]:
    """Depth of a ResNet under torchvision's names, None for none of the usual ones; whether it has bottlenecks.

    A torn file is of the smallest depth that the stages it has can belong to.
    """
    bottleneck = f"{prefix}layer1.0.conv3.weight" in state
    layers = tuple(length(state, rf"{re.escape(prefix)}layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4))
    if (bottleneck, layers) in RESNETS or 0 not in layers:
        return RESNETS.get((bottleneck, layers)), bottleneck
    fits = (depth for (b, full), depth in RESNETS.items() if b == bottleneck and all(map(int.__le__, layers, full)))
    return next(fits, None), bottleneck
