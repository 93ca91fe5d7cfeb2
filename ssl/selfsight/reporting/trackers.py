"""What trackers get at the end of a run, beside its epochs: figures, pictures, embedding, backbone."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import torch
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from selfsight.engine.about_data import class_name
from selfsight.engine.reload import LoadedRun
from selfsight.evaluation import Features
from selfsight.evaluation.base import Figures
from selfsight.reporting import pictures
from selfsight.reporting.thumbnails import fitted

#: points in TensorBoard's projector at most, and the side of their pictures in pixels
PROJECTED, TILE = 2000, 32
WEIGHTS = ("backbone.safetensors", "backbone.json")


def conclude(
    loggers: Sequence[Logger], run: LoadedRun, figures: Figures, step: int, shown: tuple[str, Features] | None = None
) -> None:
    """Hand a finished run over, and close what stays open beyond its training.

    Args:
        figures: of the trained network, by name. step: the last one.
        shown: a part of the data set and its features, for the projector; None leaves it out.
    """
    numbers = {f"final/{name}": value for name, value in figures.items() if isinstance(value, float)}
    strips = pictures.strips(*pictures.viewed_batch(run.datamodule), run.datamodule) if loggers else []
    for logger in loggers:
        if numbers:
            logger.log_metrics(numbers, step=step)
        if isinstance(logger, TensorBoardLogger):
            for i, strip in enumerate(strips):
                logger.experiment.add_image(f"views/{i}", strip, step, dataformats="HWC")
            if shown is not None:
                project(logger, run, *shown, step)
            logger.finalize("success")
        elif isinstance(logger, WandbLogger):
            logger.log_image("views", list(strips), step=step)
            keep_backbone(logger, run)
            logger.experiment.finish()  # a further run of this process is another one there, too
        elif isinstance(logger, MLFlowLogger):
            name, client = str(logger.run_id), logger.experiment
            for i, strip in enumerate(strips):
                client.log_image(name, strip, f"views/{i}.png")
            for file in WEIGHTS:
                client.log_artifact(name, str(run.folder.path / file), "backbone")
            logger.finalize("success")


def show_features(loggers: Sequence[Logger]) -> bool:
    """Whether one of them shows features."""
    return any(isinstance(logger, TensorBoardLogger) for logger in loggers)


def project(logger: TensorBoardLogger, run: LoadedRun, part: str, features: Features, step: int) -> None:
    """The features of (at most `PROJECTED`, evenly spread) images with class, name and picture, for the projector."""
    rows = torch.linspace(0, len(features) - 1, min(PROJECTED, len(features))).long()
    some, images, data = features.take(rows).in_memory(), run.datamodule.data.split(part), run.datamodule.data
    labels = [None] * len(some) if some.labels is None else some.labels.tolist()
    about = [
        [" ".join(text.split()) for text in ("" if label is None else class_name(data, label), images.name(index))]
        for label, index in zip(labels, some.indices.tolist(), strict=True)
    ]
    tiles = [np.asarray(fitted(images.read(index), TILE)) for index in some.indices.tolist()]
    sprites = np.stack([pictures.in_square(tile, TILE) for tile in tiles])
    logger.experiment.add_embedding(
        some.x,
        metadata=about,
        metadata_header=["class", "name"],
        label_img=torch.from_numpy(sprites).permute(0, 3, 1, 2) / 255,
        global_step=step,
        tag=part,
    )


def keep_backbone(logger: WandbLogger, run: LoadedRun) -> None:
    """The exported backbone as an artifact of type ``model``, read from the run folder when it is sent."""
    import wandb

    names = run.description
    artifact = wandb.Artifact(
        re.sub(r"[^\w.-]", "-", f"{run.folder.name}-backbone"),
        type="model",
        description=f"{names.backbone}, trained by {names.method} on {names.dataset}: selfsight.load of this folder",
    )
    for file in WEIGHTS:
        artifact.add_file(str(run.folder.path / file), policy="immutable", skip_cache=True)
    logger.experiment.log_artifact(artifact)
