"""A finished run, back in memory: its configuration, its images, its networks as the last checkpoint has them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig
from torch import Tensor, nn

from selfsight.backbones import interface
from selfsight.checkpoints.load import described, load
from selfsight.datamodules import DataModule, ImageData, ImageDataModule
from selfsight.datamodules.views.view import View
from selfsight.engine import build, checks, nodes
from selfsight.engine.build import Description
from selfsight.engine.checkpointing import training_checkpoint
from selfsight.engine.devices import device
from selfsight.errors import UserError
from selfsight.evaluation.features import PROJECTION
from selfsight.methods.base import Method
from selfsight.methods.finetune import FineTune
from selfsight.nn.simclr_head import ProjectionHead
from selfsight.runs.folder import RunFolder

ALL = "all"  #: every stage of a network


@dataclass
class LoadedRun:
    """A run, whether it has just been trained or was read from its folder.

    Attributes:
        method: None where the folder holds no checkpoint of it.
    """

    folder: RunFolder
    description: Description
    datamodule: DataModule
    backbone: nn.Module
    method: Method | None


def loaded_run(folder: RunFolder, accelerator: str = "auto") -> LoadedRun:
    """A finished run from its folder, the backbone on the accelerator, the method on the CPU.

    Raises:
        UserError: it is not finished, or a file of it cannot be read.
    """
    cfg = folder.config()
    backbone = load(folder.path).to(device(accelerator))
    data = build.datamodule(cfg, folder)
    method = trained_method(folder, data) if folder.checkpoint.is_file() else None
    return LoadedRun(folder, build.describe(cfg, data.dataset.channels), data, backbone, method)


def trained_method(folder: RunFolder, data: DataModule) -> Method:
    """The method of a run as its last checkpoint has it, on the CPU; of a distilled student without its teacher."""
    cfg, state = folder.config(), training_checkpoint(folder.checkpoint)["state_dict"]
    if "teacher" in cfg:
        state = {name: value for name, value in state.items() if not name.startswith("teacher.")}
    return method_with(state, cfg, data, nn.Identity())


def method_with(state: dict[str, Tensor], cfg: DictConfig, data: DataModule, teacher: nn.Module) -> Method:
    """The method of a run with these weights, on the CPU.

    Args:
        teacher: of one that a distillation learns from.
    """
    parts: dict[str, nn.Module | None] = {}
    if "run" in cfg:  # a fine-tuning: it goes on from the head of another run
        parts["projector"] = projection_head(state)
    if "teacher" in cfg:
        parts["teacher"] = teacher
    method = build.method(cfg, data, **parts)
    method.load_state_dict(state)
    return method


def projection_head(state: dict[str, Tensor]) -> ProjectionHead | None:
    """SimCLR's projection head in the weights of a run; None where there is none."""
    return ProjectionHead.out_of(state, "projector.")


def projector(folder: RunFolder) -> nn.Module | None:
    """The projection head of a run with its trained weights; None where its method has none, or one of maps."""
    head = getattr(trained_method(folder, build.datamodule(folder.config(), folder)), "projector", None)
    on_maps = isinstance(head, nn.Module) and any(isinstance(part, nn.Conv2d) for part in head.modules())  # PixPro's
    return head if isinstance(head, nn.Module) and not on_maps else None


def head_of(stage: str, folder: RunFolder | None, backbone: nn.Module) -> nn.Module | None:
    """The projection head, beside the backbone, for a stage that needs one; for ``all`` the run's, where it has one.

    Raises:
        UserError: ``projection`` is asked for, and there is none.
    """
    head = projector(folder) if folder is not None and stage in (ALL, PROJECTION) else None
    if head is not None:
        head.to(next(backbone.parameters()).device)
    if stage != PROJECTION or head is not None:
        return head
    if folder is None:
        raise UserError("an exported backbone has lost its projector; give its run instead: run=runs/NAME.", status=2)
    method = build.describe(folder.config()).method_class
    raise UserError(f"{method}, the method of '{folder.path}', has no projector of features; take another stage.")


def classifier_of(folder: RunFolder) -> tuple[nn.Module, list[str]]:
    """The network a finished fine-tuning left, images to class scores, and the names of the classes.

    Raises:
        UserError: the run is none of fine-tuning or distillation, or has not come to its end.
    """
    summary = folder.read_summary()
    if not folder.classification.is_file() or "classes" not in summary:
        raise UserError(
            f"'{folder.path}' holds no finished fine-tuning to learn from: `selfsight finetune run=... labels...=...` "
            "makes one."
        )
    cfg, state = folder.config(), training_checkpoint(folder.checkpoint)["state_dict"]
    channels = interface.channels(load(folder.path))
    backbone, classes = build.network(cfg, channels), list(summary["classes"])
    if "teacher" in cfg:  # a distilled student
        network: nn.Module = nn.Sequential(backbone, nn.Linear(backbone.num_features, len(classes)))
        parts = {"0.": "backbone.", "1.": "classifier."}
        network.load_state_dict(
            {new + k.removeprefix(old): v for new, old in parts.items() for k, v in state.items() if k.startswith(old)}
        )
        return network, classes
    method = nodes.build(cfg.method, backbone=backbone, projector=projection_head(state), num_classes=len(classes))
    assert isinstance(method, FineTune)
    method.load_state_dict(state)
    return (method.network if method.average is None else method.average.module), classes


def eval_datamodule(
    images: ImageData, backbone: nn.Module, batch_size: int = 256, num_workers: int | str = "auto"
) -> ImageDataModule:
    """All images of a data set, as evaluation presents them to a backbone, on its device."""
    checks.check_channels(backbone, images)
    view = View(images.image_size, mean=described(backbone, "mean"), std=described(backbone, "std"))
    return ImageDataModule(
        images,
        [view],
        batch_size=1,
        eval_batch_size=batch_size,
        num_workers=num_workers,
        engine="auto",
        seed=0,
        device=next(backbone.parameters()).device,
    )


def feature_cache(folder: RunFolder | None, wanted: bool = True) -> Path | None:
    """Where features of a run are kept for the next time; None where they are not."""
    return folder.path / "features" if folder is not None and wanted else None
