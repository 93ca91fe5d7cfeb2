"""What an evaluation is called: the name of its record, the settings kept in it, and where it was transferred to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from selfsight.composition.defaults import differences, stated
from selfsight.engine.subject import Subject
from selfsight.evaluation.base import Evaluator
from selfsight.evaluation.features import FINAL
from selfsight.runs import records

CACHED = "cached"  # the linear protocol that needs no augmentation


def published(cfg: DictConfig) -> DictConfig | None:
    """The settings of a published linear evaluation, where one is asked for."""
    linear: DictConfig | None = cfg.get("linear")
    return None if linear is None or linear.protocol == CACHED else linear


def transfer(of: Subject, evaluator: Evaluator) -> str:
    """What the protocol adds where a data set is given; probes with masks name theirs themselves."""
    if of.dataset is None or own_images(evaluator):
        return ""
    spec: Any = of.backbone.spec
    source = f", pretrained on {spec['dataset']}" if "dataset" in spec else ""
    return f"; on {dataset_name(of.dataset)} at {of.dataset.image_size} px{source}"


def own_images(evaluator: Evaluator) -> str:
    """The name of the images, with masks, that an evaluator brings itself; empty where it brings none."""
    return str(getattr(getattr(evaluator, "data", None), "name", ""))


def dataset_name(dataset: DictConfig) -> str:
    """``cifar10``; folders of images by the name of the folder: ``folder-flowers``."""
    name, root = records.data_name(dataset), dataset.get("root")
    own = name == "folder" and root is not None
    return f"folder-{Path(root).expanduser().resolve().name}" if own else name


def title(cfg: DictConfig, dataset: DictConfig | None, evaluator: Evaluator) -> str:
    """Name of the record: evaluator, and what differs from the run's own data, the last stage and the usual values."""
    if (linear := published(cfg)) is not None:
        changed = {str(key): value for key, value in linear.items() if key != "protocol" and value is not None}
        words = ["linear", str(linear.protocol), *records.changed_slug(changed)]
    else:
        words = slug(cfg, "evaluator", cfg.evaluator)
    if own_images(evaluator):
        words.insert(1, own_images(evaluator))
    elif dataset is not None:
        words += [dataset_name(dataset), *slug(cfg, "dataset", dataset)[1:]]
    if cfg.stage != FINAL:
        words.append(cfg.stage)
    return records.joined(words)


def slug(cfg: DictConfig, group: str, node: DictConfig) -> list[str]:
    """Words for the name of a record: the choice of a group, and what differs from it."""
    choice, changed = differences(group, str(cfg.choices.get(group) or node.get("name")), node)
    return [choice, *records.changed_slug(changed)]


def settings_of(cfg: DictConfig, dataset: DictConfig | None) -> dict[str, object]:
    """All that two records of one name may differ in."""
    how = (
        {"evaluator": records.to_json(stated(cfg.evaluator))}
        if published(cfg) is None
        else {"linear": records.to_json(cfg.linear)}
    )
    return {**how, "stage": str(cfg.stage), "dataset": records.to_json(None if dataset is None else stated(dataset))}
