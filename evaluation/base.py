"""What an evaluator is: something that puts numbers on a frozen backbone. There are two kinds."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import nn
from typing_extensions import TypeIs

from selfsight.evaluation.features import Features

#: numbers by name, means with their spread and further figures inside one another among them
Figures = dict[str, Any]


@runtime_checkable
class FeatureEvaluator(Protocol):
    """An evaluator that features are enough for. Fitted on ``train``, measured on ``test``, never the reverse.

    One with a true ``takes_targets`` is content with several labels or numbers of each image (`Features.targets`) in
    place of classes.

    A person's own may be any callable of this form: without ``needs_labels`` it is taken to need none, without
    ``protocol`` its name stands for how its numbers are made.
    """

    needs_labels: bool

    @property
    def protocol(self) -> str:
        """One line naming how the numbers are made."""

    def __call__(self, train: Features, test: Features) -> Figures:
        """Numbers by name; fractions of 1 for accuracies."""


@runtime_checkable
class ImageEvaluator(Protocol):
    """An evaluator that needs the backbone and images: augmented ones, feature maps, images of its own.

    Where its numbers are of one stage of the network it has a field ``stage`` (or ``stages``), where it wants the
    projection head a field ``head``, where it brings its own images ``data``.
    """

    needs_labels: bool

    @property
    def protocol(self) -> str:
        """One line naming how the numbers are made."""

    def on_images(self, backbone: nn.Module, datamodule: Any) -> Figures:
        """Numbers by name; fractions of 1 for accuracies."""


Evaluator = FeatureEvaluator | ImageEvaluator


def looks_at_images(evaluator: object) -> TypeIs[ImageEvaluator]:
    """Whether an evaluator is an `ImageEvaluator`, as far as its methods tell."""
    return callable(getattr(evaluator, "on_images", None))


def is_evaluator(made: object) -> TypeIs[Evaluator]:
    """Whether something is an evaluator, as far as can be told without calling it."""
    return looks_at_images(made) or (callable(made) and not isinstance(made, type))


def needs_labels(evaluator: object) -> bool:
    """Whether an evaluator compares with the labels of test images."""
    return bool(getattr(evaluator, "needs_labels", False))


def takes_targets(evaluator: object) -> bool:
    """Whether an evaluator is content with several labels or numbers of each image in place of one class."""
    return bool(getattr(evaluator, "takes_targets", False))


def protocol(evaluator: object, found: Figures | None = None) -> str:
    """How an evaluator's numbers are made, in one line.

    Args:
        found: the numbers, where they are made already: an evaluator with a method ``protocol_of`` says more by them.
    """
    if found is not None and callable(tell := getattr(evaluator, "protocol_of", None)):
        return str(tell(found))
    named = getattr(evaluator, "__name__", type(evaluator).__name__)
    return str(getattr(evaluator, "protocol", named))
