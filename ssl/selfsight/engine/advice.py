"""Whether the sizes of a run fit its images: a table of rules, the words that mend what does not, and a look back.

A rule is a pure function of a `Plan`. Its numbers are rules of thumb for some hundreds to some thousands of images, and
say nothing of large sets, to which the published values belong.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from selfsight.evaluation.probes import diagnostics

#: optimiser steps under which hardly anything is learned, an epoch and in all; and steps to aim at
FEWEST_AN_EPOCH, FEWEST, ENOUGH = 4, 100, 2000
LONGEST, SHORTEST = 400, 50  #: epochs that a rule names
LINES = 3

Values = Mapping[str, int | float]


@dataclass(frozen=True)
class Plan:
    """The sizes of a run.

    Attributes:
        images: that it learns from. batch: of them a step, over all devices. steps_per_epoch, steps: of the optimiser.
        epochs: passes over the images. warmup_epochs: of the learning rate.
        shared: the batch is named by ``batch_size`` alone; not so where labelled images go beside.
        settings: arguments of the method.
        in_steps: the length is given in steps.
    """

    images: int
    batch: int
    steps_per_epoch: int
    steps: int
    epochs: float
    warmup_epochs: float = 0.0
    shared: bool = True
    in_steps: bool = False
    settings: Mapping[str, object] = field(default_factory=dict)

    def number(self, name: str) -> float:
        """A setting of the method that is a number, or the largest of several; 0 where it has none of that name."""
        value = self.settings.get(name)
        several = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        return max((float(one) for one in several if isinstance(one, (int, float))), default=0.0)


@dataclass(frozen=True)
class Advice:
    """What does not fit, and the keys with values that do."""

    reason: str
    values: Values

    @property
    def words(self) -> list[str]:
        """``key=value``, as they are typed."""
        return [
            f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in self.values.items()
        ]


# --- values by rule --------------------------------------------------------------------------------------------------


def small_batch(images: int) -> int:
    """The largest power of two that is an eighth of the images or less, from 16 to 256."""
    return 2 ** int(math.log2(min(256, max(16, images // 8))))


def small_epochs(images: int, batch: int) -> int:
    """Passes that make `ENOUGH` steps, from `SHORTEST` to `LONGEST`."""
    return min(LONGEST, max(SHORTEST, math.ceil(ENOUGH / max(1, images // batch))))


def small_warmup(epochs: float) -> int:
    """A tenth of the run, at most 10 epochs."""
    return min(10, int(epochs) // 10)


def small_prototypes(images: int) -> int:
    """Five images each, in tens."""
    return max(10, images // 50 * 10)


def value_by_rule(key: str, plan: Plan) -> int:
    """What a size that is ``auto`` comes to; a batch of labelled images is a fourth, since others go beside it."""
    if key == "batch_size":
        return small_batch(plan.images) if plan.shared else max(4, small_batch(plan.images) // 4)
    return small_epochs(plan.images, plan.batch) if key == "trainer.max_epochs" else small_warmup(plan.epochs)


# --- rules -----------------------------------------------------------------------------------------------------------


def too_few_steps(plan: Plan) -> Advice | None:
    if plan.steps_per_epoch >= FEWEST_AN_EPOCH and plan.steps >= FEWEST:
        return None
    values: dict[str, int | float] = {}
    better = small_batch(plan.images) if plan.shared else plan.batch
    if better < plan.batch:
        values["batch_size"] = better
    batch = min(better, plan.batch)
    steps = max(1, plan.images // batch) if plan.shared else plan.steps_per_epoch
    epochs = min(LONGEST, max(SHORTEST, math.ceil(ENOUGH / steps)))
    if plan.in_steps and plan.steps < FEWEST:
        values["trainer.max_steps"] = ENOUGH
    elif epochs > plan.epochs and not plan.in_steps:
        values["trainer.max_epochs"] = epochs
    reason = (
        f"{plan.images:,} images in batches of {plan.batch} are {counted(plan.steps_per_epoch, 'step')} an epoch and "
        f"{plan.steps:,} in all, too few to learn much"
    )
    return Advice(reason, values) if values else None


def more_prototypes_than_images_fill(plan: Plan) -> Advice | None:
    number, fit = plan.number("num_prototypes"), small_prototypes(plan.images)
    if 4 * number <= plan.images or fit >= number:
        return None
    return Advice(f"{number:,.0f} prototypes share {plan.images:,} images", {"method.num_prototypes": fit})


def more_outputs_than_images(plan: Plan) -> Advice | None:
    number = plan.number("out_dim")
    if number <= 4 * plan.images:
        return None
    fit = 2 ** int(math.log2(max(64, plan.images)))
    return Advice(f"{number:,.0f} outputs of the head for {plan.images:,} images", {"method.out_dim": fit})


def frozen_for_long(plan: Plan) -> Advice | None:
    frozen = plan.number("freeze_prototypes_steps")
    if 2 * frozen <= plan.steps:
        return None
    return Advice(
        f"the prototypes rest for the first {frozen:,.0f} steps, and the run has {plan.steps:,}",
        {"method.freeze_prototypes_steps": plan.steps // 20},
    )


def last_layer_frozen_for_long(plan: Plan) -> Advice | None:
    frozen = plan.number("freeze_last_layer_epochs")
    if 2 * frozen <= plan.epochs:
        return None
    return Advice(
        f"the last layer rests for the first {frozen:g} epochs, and the run has {plan.epochs:g}",
        {"method.freeze_last_layer_epochs": 0},
    )


def warms_up_for_long(plan: Plan) -> Advice | None:
    if 2 * plan.warmup_epochs <= plan.epochs:
        return None
    reason = f"the learning rate warms up for {plan.warmup_epochs:g} epochs, and the run has {plan.epochs:g}"
    return Advice(reason, {"schedule.lr.warmup_epochs": small_warmup(plan.epochs)})


def queue_beyond_the_images(plan: Plan) -> Advice | None:
    length = plan.number("queue_length")
    if length <= plan.images:
        return None
    fit = plan.images // 2 // plan.batch * plan.batch
    return Advice(
        f"a queue of {length:,.0f} keeps every one of {plan.images:,} images several times",
        {"method.queue_length": fit},
    )


def queue_never_used(plan: Plan) -> Advice | None:
    first = plan.number("queue_start_epoch")
    if not plan.number("queue_length") or first < plan.epochs:
        return None
    reason = f"the queue begins with epoch {first + 1:g} of {plan.epochs:g}"
    return Advice(reason, {"method.queue_start_epoch": int(plan.epochs) // 5})


def memory_beyond_the_images(plan: Plan) -> Advice | None:
    size = plan.number("memory")
    if size <= plan.images:
        return None
    return Advice(
        f"a memory of {size:,.0f} keeps every one of {plan.images:,} images several times",
        {"method.memory": plan.images // 2},
    )


#: in this order; the first mends the length, which the others are measured by
RULES: tuple[Callable[[Plan], Advice | None], ...] = (
    too_few_steps,
    more_prototypes_than_images_fill,
    more_outputs_than_images,
    frozen_for_long,
    last_layer_frozen_for_long,
    warms_up_for_long,
    queue_beyond_the_images,
    queue_never_used,
    memory_beyond_the_images,
)


def advise(plan: Plan) -> list[Advice]:
    """What does not fit; values of the later ones go with those of the first."""
    found: list[Advice] = []
    for rule in RULES:
        if rule(plan) is not None and (advice := rule(mended(plan, found[:1])) or rule(plan)) is not None:
            found.append(advice)
    return found


def mended(plan: Plan, advice: Sequence[Advice]) -> Plan:
    """The plan with the length that a first piece of advice gives it."""
    values = advice[0].values if advice else {}
    batch, epochs = int(values.get("batch_size", plan.batch)), values.get("trainer.max_epochs", plan.epochs)
    per_epoch = max(1, plan.images // batch) if "batch_size" in values else plan.steps_per_epoch
    steps = int(values.get("trainer.max_steps", plan.steps if plan.in_steps else round(epochs * per_epoch)))
    return replace(plan, batch=batch, epochs=steps / per_epoch, steps_per_epoch=per_epoch, steps=steps)


def lines(plan: Plan, command: Sequence[str]) -> list[str]:
    """What is said at the start of a run: at most `LINES` lines, the last one the command that would fit.

    Args:
        command: as it was typed, the program first.
    """
    found = advise(plan)
    if not found:
        return []
    reasons = [advice.reason for advice in found]
    first, rest = reasons[: LINES - 2], reasons[LINES - 2 :]
    told = [*first, *(["; ".join(rest)] if rest else [])]
    return [*(f"advice: {line}" for line in told), f"rather: {retyped(command, found)}"]


def retyped(command: Sequence[str], found: Sequence[Advice]) -> str:
    """The command with other values, those of the same keys left out; and the name, which is this run's now."""
    words = [word for advice in found for word in advice.words]
    keys = {word.partition("=")[0] for word in words} | {"name", "resume"}
    kept = [word for word in command if word.lstrip("+").partition("=")[0] not in keys]
    return shlex.join([*kept, *words])


# --- looking back ----------------------------------------------------------------------------------------------------

#: figures that a trained network is compared by, the first there is
COMPARED = {"knn_top1": "kNN", "linear_top1": "linear"}
ROWS = {"untrained": "the untrained network", "pixels": "raw pixels"}


def look_back(rows: Mapping[str, Mapping[str, object]], plan: Plan, lr: float) -> str | None:
    """A sentence where the trained network is not above the untrained one or the pixels: likely cause and next words.

    Args:
        rows: of the table, by `reporting.tables.ROWS`. lr: as it is configured.
    """
    trained = rows.get("pretrained", {})
    for key, title in COMPARED.items():
        value = trained.get(key)
        others = {name: rows[name][key] for name in ROWS if key in rows.get(name, {})}
        if not isinstance(value, float) or not others:
            continue
        name, best = max(others.items(), key=lambda one: float(str(one[1])))
        if value > float(str(best)) or value == 1:  # where all are right there is nothing above
            return None
        cause, words = likely_cause(trained, plan, lr)
        return (
            f"pretrained is not above {ROWS[name]} ({title} {value:.1%} against {float(str(best)):.1%}); likely cause: "
            f"{cause}; next: {' '.join(words)}"
        )
    return None


def likely_cause(trained: Mapping[str, object], plan: Plan, lr: float) -> tuple[str, list[str]]:
    """Why nothing was learned, and the words for the next run."""
    figures = {name: value for name, value in trained.items() if isinstance(value, float)}
    if any(name in figures and diagnostics.FIGURES[name].rings(figures[name]) for name in ("feature_std", "rank")):
        return "collapse, all images get much the same features", [f"optimizer.lr={lr / 3:.2g}"]
    if found := advise(plan):
        return "; ".join(advice.reason for advice in found), [word for advice in found for word in advice.words]
    if plan.in_steps:
        return f"too short, {plan.steps:,} steps", [f"trainer.max_steps={4 * plan.steps}"]
    return f"too short, {plan.steps:,} steps", [f"trainer.max_epochs={4 * math.ceil(plan.epochs)}"]


def one_class(
    classifiers: Mapping[str, Mapping[str, object]], classes: Sequence[str], knn: object, lr: float
) -> str | None:
    """A sentence where a trained classifier calls nearly every image by one name, though the features tell more.

    Args:
        classifiers: their figures, ``top1`` and ``per_class`` (accuracy of each class's images, None where there are
            none). knn: of the features.
        lr: as it is configured.
    """
    for name, found in classifiers.items():
        right, of_each = found.get("top1"), found.get("per_class")
        if not isinstance(right, float) or not isinstance(of_each, list) or len(of_each) != len(classes) > 2:
            continue
        best = max((share for share in of_each if share is not None), default=0.0)
        if best > 0.9 and right < 1.5 / len(classes) and isinstance(knn, float) and knn > 1.5 * right:
            return (
                f"the classifier ({name}) calls most images '{classes[of_each.index(best)]}': {right:.1%} are right, "
                f"as by guessing, and {knn:.1%} by their neighbours; likely cause: its guesses confirmed one another; "
                f"next: optimizer.lr={lr / 3:.2g}, more labels a class, or a method that balances guesses "
                "(method=comatch)"
            )
    return None


def counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"
