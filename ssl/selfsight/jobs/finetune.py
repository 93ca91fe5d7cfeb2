"""`selfsight finetune`: a pretrained network, or one from scratch, trained on the images that keep their labels."""

from __future__ import annotations

import inspect
from typing import Any

from hydra.utils import get_object
from lightning import seed_everything
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import Tensor, nn

import selfsight
from selfsight.engine import build, measure
from selfsight.engine.checkpointing import read_checkpoint
from selfsight.errors import UserError, nearest
from selfsight.jobs import report
from selfsight.jobs.pretrain import carry_away, check_sizes, check_views, fit
from selfsight.methods.base import Method
from selfsight.methods.finetune import FineTune
from selfsight.nn.simclr_head import ProjectionHead
from selfsight.reporting import classification
from selfsight.runs.console import clock_text, make_console, quiet
from selfsight.runs.folder import RunFolder


def run(cfg: DictConfig) -> None:
    """Fine-tune, measure, export. The run folder names the run it started from in its configuration."""
    quiet()
    console = make_console()
    OmegaConf.set_struct(cfg, False)
    resumed, state = None, None
    if cfg.resume is not None:
        resumed, cfg, state = reopened(cfg.resume)
    build.device(cfg.trainer.accelerator)
    seed_everything(cfg.seed, workers=True, verbose=False)
    if resumed is not None:
        backbone, projector = build.build(cfg.backbone), projector_of(state or {})
    elif cfg.run is not None:
        backbone, projector = pretrained(RunFolder.open(cfg.run), cfg)
    else:
        if not (names(cfg.get("backbone")) and names(cfg.get("dataset"))):
            raise UserError("give a run to fine-tune (run=runs/NAME), or backbone= and dataset= to start from scratch.")
        fill_views(cfg, OmegaConf.create({}))
        backbone, projector = build.build(cfg.backbone), None
    data = build.datamodule(cfg, resumed or (None if cfg.run is None else RunFolder.open(cfg.run)))
    if cfg.method.layer == "auto":
        cfg.method.layer = 1 if projector is not None else 0
    method: Method = build.build(cfg.method, backbone=backbone, projector=projector, num_classes=data.data.num_classes)
    check_views(method, data)
    check_sizes(method, data)
    folder = resumed or RunFolder.create(cfg, stem=f"finetune-{cfg.dataset.name}")
    seconds = fit("finetune", cfg, folder, method, data, console, resumed is not None)
    if seconds is not None:
        conclude(console, cfg, folder, method, data, seconds)


def reopened(path: str) -> tuple[RunFolder, DictConfig, dict[str, Tensor]]:
    """A run to go on with: its folder, its configuration with the labels it has used, its weights."""
    folder = RunFolder.open(path)
    cfg, state = folder.config(), read_checkpoint(folder.checkpoint)["state_dict"]
    cfg.datamodule.labels = {"split": str(folder.labels)}
    return folder, cfg, state


def pretrained(source: RunFolder, cfg: DictConfig) -> tuple[nn.Module, ProjectionHead | None]:
    """Backbone and projection head of a finished run; what ``cfg`` leaves open is filled in from that run.

    Open are ``dataset`` and ``backbone`` (values given for them alone stay) and, where null, the crop's scale and the
    flip of the views: what was the same image to pretraining is the same image here.
    """
    of_source = source.config()
    trained = selfsight.load(source.path)
    spec: Any = trained.spec
    if names(cfg.get("backbone")):
        raise UserError(f"the network is that of '{source.path}': leave out backbone=, or run= to start from scratch.")
    of_spec = {"_target_": "selfsight.backbones.registry.create", **spec["backbone"], "pretrained": False}
    cfg.backbone = chosen(cfg.get("backbone"), OmegaConf.create(of_spec))
    cfg.dataset = chosen(cfg.get("dataset"), of_source.dataset)
    fill_views(cfg, of_source.views)
    backbone = build.build(cfg.backbone)
    backbone.load_state_dict(trained.state_dict())
    state = read_checkpoint(source.checkpoint)["state_dict"] if source.checkpoint.is_file() else {}
    return backbone, projector_of(state)


def names(node: DictConfig | None) -> bool:
    """Whether a node says what it describes, and not only with which values."""
    return node is not None and "_target_" in node


def chosen(node: DictConfig | None, otherwise: DictConfig) -> DictConfig:
    """A node that names a data set or network as it is; else ``otherwise``, with the node's values in place of its own.

    So ``dataset.eval_resize`` or ``backbone.drop_path`` alone change what the run before had.

    Raises:
        UserError: a value that this data set or network does not take.
    """
    if node is None or names(node):
        return node or otherwise
    taken = inspect.signature(get_object(otherwise._target_)).parameters
    if not any(argument.kind is argument.VAR_KEYWORD for argument in taken.values()):
        for key in (str(key) for key in node if key not in taken and key not in otherwise):
            raise UserError(
                f"{key}={node[key]} was given for '{otherwise.get('name')}', which takes no such value; it takes "
                f"{', '.join(taken)}.{nearest(key, taken)}"
            )
    both = OmegaConf.merge(otherwise, node)
    assert isinstance(both, DictConfig)
    return both


def fill_views(cfg: DictConfig, pretrained_with: DictConfig) -> None:
    """Fill the places the views leave open (null) as the first view of pretraining has them."""
    first = next((view for view in pretrained_with.values() if isinstance(view, DictConfig)), OmegaConf.create({}))
    for view in (view for view in cfg.views.values() if isinstance(view, DictConfig)):
        for key, otherwise in (("scale", [0.08, 1.0]), ("hflip", 0.5)):
            if key in view and view[key] is None:
                view[key] = first.get(key, otherwise)


def projector_of(state: dict[str, Tensor]) -> ProjectionHead | None:
    """SimCLR's projection head in the weights of a run; None where there is none."""
    return ProjectionHead.out_of(state, "projector.")


def classifier_of(folder: RunFolder) -> tuple[nn.Module, list[str]]:
    """The network a finished fine-tuning left, images to class scores, and the names of the classes.

    Raises:
        UserError: the run is none of fine-tuning or distillation, or has not come to its end.
    """
    path = folder.path / classification.FILE
    summary = folder.read_summary()
    if not path.is_file() or "classes" not in summary:
        raise UserError(
            f"'{folder.path}' holds no finished fine-tuning to learn from: `selfsight finetune run=... labels...=...` "
            "makes one."
        )
    cfg, state = folder.config(), read_checkpoint(folder.checkpoint)["state_dict"]
    backbone, classes = build.build(cfg.backbone), list(summary["classes"])
    if "teacher" in cfg:  # a distilled student
        network: nn.Module = nn.Sequential(backbone, nn.Linear(backbone.num_features, len(classes)))
        parts = {"0.": "backbone.", "1.": "classifier."}
        network.load_state_dict(
            {new + k.removeprefix(old): v for new, old in parts.items() for k, v in state.items() if k.startswith(old)}
        )
        return network, classes
    method = build.build(cfg.method, backbone=backbone, projector=projector_of(state), num_classes=len(classes))
    assert isinstance(method, FineTune)
    method.load_state_dict(state)
    return (method.network if method.average is None else method.average.module), classes


def conclude(console: Console, cfg: DictConfig, folder: RunFolder, method: Method, data: Any, seconds: float) -> None:
    """Export the backbone, measure the classifiers, write summary and report."""
    carry_away(cfg, folder, method, data)
    found = classification.record(console, folder, method, data)
    folder.write_summary(
        {
            "classifiers": found,
            "classes": list(data.data.classes),
            "labels": len(data.split),
            "train_seconds": seconds,
        }
    )
    kept = folder.path / (classification.FILE if found else "backbone.safetensors")  # nothing to classify, no such file
    console.print(f"{len(data.split)} labels, trained in {clock_text(seconds)}; {kept}")
    if cfg.report:
        pair = measure.features(method.backbone, data)
        console.print(f"report: {report.write(folder, cfg, data, *pair)}")
