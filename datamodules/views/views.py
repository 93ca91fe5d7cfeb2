"""The views of ``conf/views`` by name, for whoever composes no configuration."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files

from omegaconf import DictConfig, OmegaConf

from selfsight.datamodules.views.view import View
from selfsight.errors import UserError, nearest


def names() -> list[str]:
    """What `views` knows: the files of ``conf/views``."""
    folder = files("selfsight.conf") / "views"
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def views(
    name: str,
    image_size: int = 224,
    mean: Sequence[float] = (0.485, 0.456, 0.406),
    std: Sequence[float] = (0.229, 0.224, 0.225),
) -> dict[str, View]:
    """The views called ``name``, by their names, in the order of ``Batch.views``.

    ``ImageDataModule(data, views("swav"))``; what a file leaves to the run (null) stays as `View` has it.

    Args:
        name: of a file in ``conf/views``, such as ``simclr``, ``swav`` or ``fixmatch``.
        image_size: pixels, what the sizes of the views refer to.
        mean, std: of the RGB channels, images in [0, 1]. Some recipes have their own.

    Raises:
        UserError: no such views.
    """
    if name not in (known := names()):
        raise UserError(f"there are no views '{name}'; choose from {', '.join(known)}.{nearest(name, known)}")
    text = (files("selfsight.conf") / "views" / f"{name}.yaml").read_text(encoding="utf-8")
    dataset = {"image_size": image_size, "mean": list(mean), "std": list(std)}
    content = OmegaConf.create({"dataset": dataset, "views": OmegaConf.create(text)})
    nodes = {str(key): node for key, node in content.views.items() if isinstance(node, DictConfig)}
    return {
        key: View(**{str(k): v for k, v in node.items() if k != "_target_" and v is not None})
        for key, node in nodes.items()
    }
