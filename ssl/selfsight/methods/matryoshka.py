"""Features that can be cut: a method learns from their first numbers as it does from all of them.

Every step the method's loss is computed of the first m features for every m of a list, and the losses are added up, so
that each prefix has to do the job by itself. What one wants to carry away are the backbone's features, and so it is
these that are cut, in front of the projection head; a head's output is thrown away.

    Kusupati, Bhatt, Rege, Wallingford, Sinha, Ramanujan, Howard-Snyder, Chen, Kakade, Jain, Farhadi: Matryoshka
    Representation Learning. NeurIPS 2022, arXiv:2205.13147. Code: RAIVNLab/MRL.

The backbone sees each image once; what is computed of every prefix is what comes after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from selfsight.errors import UserError
from selfsight.losses.matryoshka import weighted_sum
from selfsight.methods.base import Method
from selfsight.nn.batchnorm import frozen_statistics
from selfsight.nn.matryoshka import PrefixLinear, all_widths
from selfsight.optim.sam import RandomState, random_state, set_random_state
from selfsight.validation import SWITCH, at_least, takes, whole


@takes(dims=whole(1), efficient=SWITCH, importance=at_least(0))
class Matryoshka:
    """Nested dimensions for any method whose heads read the backbone's pooled features.

    Args:
        dims: numbers of first features, ascending; all of them are always learned from as well. None: powers of two
            from 8 on, as in the paper.
        efficient: the heads' first layers use the first columns of their weights for the first features (MRL-E);
            False: they have weights of their own for each of ``dims`` (MRL). What follows them is shared either way.
        importance: weight of the loss of each of ``dims``, and last of all features; None: 1 each, as published.
    """

    def __init__(
        self, *, dims: Sequence[int] | None = None, efficient: bool = False, importance: Sequence[float] | None = None
    ) -> None:
        self.dims, self.efficient, self.importance = dims, efficient, importance

    def on(self, method: Method) -> Method:
        """The method, which learns from the first features as well from now on.

        Its loss is the sum of those of all prefixes, ``loss_first_8`` and so on are theirs; other figures of a step are
        those of all features, and so is what goes into queues, banks and running means.

        Raises:
            UserError: dimensions that the features do not have, or a method that learns from no features.
        """
        readers = [layer for layer in method.modules() if isinstance(layer, PrefixLinear)]
        if not readers:
            raise UserError(
                f"heads=matryoshka cuts the pooled features that a head reads, and {type(method).__name__} has no such "
                "head: it learns from maps, patches or another network's features; leave out heads=matryoshka."
            )
        widths = all_widths(self.dims, features := cast(int, method.backbone.num_features))
        if len(widths) < 2:
            raise UserError(
                f"heads=matryoshka has nothing to cut: the features are {features} numbers and heads.dims names none "
                "below; give some, or leave out heads=matryoshka."
            )
        total = float(weighted_sum(torch.ones(len(widths)), self.importance))
        if not self.efficient:
            for layer in readers:
                layer.own_weights(widths)
        # in place of the class's, which a trainer and a plain loop find by name
        learn = partial(_learn, method, method.training_step, widths, self.importance)
        chance = partial(_times, method.chance_loss, total)
        for name, function in (("training_step", learn), ("chance_loss", chance)):
            setattr(method, name, function)
        method.prefixes = tuple(widths[:-1])
        others = {name: part for name, part in method.named_children() if part is not method.backbone}
        whole = [name for name, part in others.items() if _twins(part, method)]
        method.uncompiled = (*method.uncompiled, *whole)  # compiled as one they would not be cut inside
        kind, listed = "MRL-E" if self.efficient else "MRL", ", ".join(map(str, widths[:-1]))
        method.tell(f"nested dimensions ({kind}): the first {listed} features learn as all do")
        return method


def _times(chance: Callable[[], float | None], total: float) -> float | None:
    value = chance()
    return None if value is None else total * value


def _learn(
    method: Method,
    whole_step: Callable[[Any, int], Mapping[str, Tensor]],
    widths: Sequence[int],
    importance: Sequence[float] | None,
    batch: Any,
    batch_idx: int,
) -> Mapping[str, Tensor]:
    """A training step of all features, then of each prefix with the same random numbers."""
    before, random = method.collected(), random_state()
    with _kept_features(method) as features:
        found = whole_step(batch, batch_idx)
        losses, after = {widths[-1]: found["loss"]}, random_state()
        with frozen_statistics(method), _on_prefix(method):
            for m in widths[:-1]:
                set_random_state(random)
                features.cut(m)
                with method.collecting_aside(before):
                    losses[m] = whole_step(batch, batch_idx)["loss"]
    set_random_state(after)
    ordered = torch.stack([losses[m] for m in widths])
    single = {f"loss_first_{m}": losses[m].detach() for m in widths[:-1]}
    return {**found, "loss": weighted_sum(ordered, importance), **single}


@contextmanager
def _on_prefix(method: Method) -> Iterator[None]:
    method.on_prefix = True
    try:
        yield
    finally:
        method.on_prefix = False


class _Features:
    """What networks have given for their calls, to be given again, cut, in the order of the calls."""

    def __init__(self) -> None:
        self.given: list[tuple[Tensor, RandomState]] = []
        self.again: Iterator[tuple[Tensor, RandomState]] | None = None
        self.width = 0

    def cut(self, width: int) -> None:
        """From now on the calls get the first ``width`` numbers of what they got the first time."""
        self.again, self.width = iter(self.given), width

    def of(self, call: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        if self.again is None:
            features = call(*args, **kwargs)
            self.given.append((features, random_state()))
            return features
        features, random = next(self.again)
        set_random_state(random)  # as if the network had drawn what it draws
        return features[..., : self.width]


@contextmanager
def _kept_features(method: Method) -> Iterator[_Features]:
    """Calls of the backbone and of its averages give what `_Features` keeps of them."""
    features = _Features()
    with ExitStack() as stack:
        for network in _twins(method, method):
            # the slot that nn.Module.compile fills comes before the module's own call
            slot = network._compiled_call_impl
            network._compiled_call_impl = partial(features.of, slot or network._call_impl)
            stack.callback(setattr, network, "_compiled_call_impl", slot)
        yield features


def _twins(part: nn.Module, method: Method) -> list[nn.Module]:
    """The backbone and the networks that were copied from it, inside a part of a method."""
    kind, width = type(method.backbone), method.backbone.num_features
    found: dict[str, nn.Module] = {}
    for name, module in part.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if not inside and type(module) is kind and getattr(module, "num_features", None) == width:
            found[name] = module
    return list(found.values())
