"""What is refused once the parts of a run are made: what a method or network cannot learn from."""

from __future__ import annotations

from torch import nn

from selfsight.backbones import interface
from selfsight.datamodules import DataModule, ImageData, SemiDataModule
from selfsight.engine.options import TrainerOptions
from selfsight.errors import UserError
from selfsight.methods.base import Method


def check_views(learner: Method, data: DataModule) -> None:
    """Refuse views the method cannot learn from.

    Raises:
        UserError: too few or too many views.
    """
    fewest, most = learner.n_views
    given = sum(view.count for view in data.views)
    if given < fewest or (most is not None and given > most):
        wanted = f"{fewest}" if most == fewest else f"{fewest} or more" if most is None else f"{fewest} to {most}"
        raise UserError(
            f"{type(learner).__name__} learns from {wanted} views of an image and the views chosen give {given}; "
            "set views.<name>.count or choose other views."
        )


def check_channels(backbone: nn.Module, data: ImageData) -> None:
    """Refuse images of another number of channels than a network takes.

    Raises:
        UserError: they have.
    """
    if (taken := interface.channels(backbone)) != data.channels:
        raise UserError(
            f"the images of '{data.name}' have {data.bands.kind if data.bands else 'the 3 channels of RGB'} and the "
            f"network takes {taken}: choose channels with dataset.channels, or leave backbone.in_chans out to have a "
            "network made for the images."
        )


def check_sizes(learner: Method, data: DataModule) -> None:
    """Refuse images that the backbone cannot take.

    Raises:
        UserError: of another number of channels; or see `interface.check_sizes`.
    """
    check_channels(learner.backbone, data.dataset)
    interface.check_sizes(learner.backbone, {view.size for view in data.views})


def check_batch(learner: Method, data: DataModule, processes: int) -> None:
    """Refuse batches of one for what learns by comparing the images of a batch.

    Args:
        processes: among which a batch is shared out.

    Raises:
        UserError: there is one image a step, or one a process where BatchNorm is over the images of a process.
    """
    kind, images = type(learner).__name__, data.batch_size
    if isinstance(data, SemiDataModule):  # BatchNorm sees the unlabelled images as well
        return
    if images == 1 and learner.across_images:
        raise UserError(
            f"batch_size is 1, and of {kind} {learner.across_images}: one image alone teaches it nothing; choose "
            "batch_size=2 or more, the larger the better."
        )
    if images == processes and any(type(module) is nn.BatchNorm1d for module in learner.modules()):
        raise UserError(
            f"batch_size is {images} for {processes} process{'es' * (processes > 1)}, and the heads of {kind} "
            f"normalise over the images of a process, which are one; choose batch_size={2 * processes} or more."
        )


def check_twice(asked: str, options: TrainerOptions) -> None:
    """Refuse steps that are taken twice with what computes a gradient once.

    Args:
        asked: the word that wants them.

    Raises:
        UserError: a precision whose gradients are scaled, or kernels that are replayed.
    """
    if str(options.precision) in ("16-mixed", "16"):
        raise UserError(
            f"{asked} computes every gradient twice, and trainer.precision={options.precision} scales it once; take "
            "bf16-mixed or 32-true."
        )
    if options.cuda_graphs:
        raise UserError(
            f"{asked} computes every gradient twice, and trainer.cuda_graphs=true replays it once; leave it false."
        )


def check_kind(kind: type[Method], data: DataModule) -> None:
    """Refuse batches of all images for a method that learns from few labels, and the other way round.

    Raises:
        UserError: with the words that bring the others.
    """
    if kind.few_labels == isinstance(data, SemiDataModule):
        return
    if kind.few_labels:
        raise UserError(
            f"{kind.__name__} learns from labelled and unlabelled images side by side, "
            f"which {type(data).__name__} does not give; take datamodule=semi views=fixmatch and say how many stay: "
            "labels.per_class=4."
        )
    raise UserError(
        f"{kind.__name__} learns from images of one kind, and {type(data).__name__} gives labelled and unlabelled ones "
        "side by side; take datamodule=images."
    )


def check_classes(kind: type[Method], data: DataModule) -> None:
    """Refuse labels that are no classes, or all of one, for a method that learns to tell classes apart.

    Raises:
        UserError: says what they are, or names the class.
    """
    if (targets := data.dataset.targets) is not None and "num_classes" in kind.needs and "targets" not in kind.needs:
        raise UserError(
            f"{kind.__name__} learns one class an image, and the images of '{data.dataset.name}' have {targets}: "
            "choose a method that needs no labels and fine-tune its network (selfsight finetune), or another "
            "dataset.labels."
        )
    labels = data.facts.get("labels")
    if "num_classes" not in kind.needs or labels is None:
        return
    there = labels[labels >= 0].unique().tolist()
    if len(there) == 1:
        raise UserError(
            f"all labels are of one class, '{data.dataset.classes[there[0]]}', and {kind.__name__} learns to tell "
            "classes apart; give images of at least two, or choose a method that needs no labels."
        )
