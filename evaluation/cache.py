"""Features on disk: extracted once for given weights, images and view, and never taken from a damaged file."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from selfsight.contracts import Targets
from selfsight.datamodules.images.decode import Unreadable
from selfsight.evaluation.features import FINAL, PROJECTION, Device, Features, extract

#: of features in a file, that are looked at in one piece
ROWS = 100_000

log = logging.getLogger("selfsight")


class FeatureCache:
    """A folder of ``<key>.safetensors``, one a stage; the key is a hash of everything the features depend on.

    A file whose content does not match its own checksum is named in a warning and made again. Files appear whole or not
    at all, so two runs may share a folder. Where nothing can be written, a warning says so, and nothing is kept.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def extract(
        self,
        backbone: nn.Module,
        datamodule: Any,
        split: str,
        device: Device = None,
        stages: Sequence[str] = (FINAL,),
        *,
        head: nn.Module | None = None,
    ) -> dict[str, Features]:
        """As `features.extract` on ``datamodule.eval_dataloader(split)``, from disk where it is there."""
        weights = weights_digest(backbone)
        about = {"data": data_digest(datamodule.data.split(split)), "view": view_description(datamodule)}
        # only what the head gives depends on it
        keys = {
            stage: {**about, "weights": weights_digest(backbone, head) if stage == PROJECTION else weights}
            for stage in stages
        }
        paths = {
            stage: self.folder / f"{_digest([json.dumps({**key, 'stage': stage}).encode()])}.safetensors"
            for stage, key in keys.items()
        }
        found = {stage: features for stage, path in paths.items() if (features := _read(path)) is not None}
        missing = [stage for stage in stages if stage not in found]
        if missing:
            files = {stage: paths[stage].with_suffix(f".{os.getpid()}.npy") for stage in missing}
            made = extract(
                backbone, datamodule.eval_dataloader(split), device, missing, head=head,
                images=len(datamodule.data.split(split)), files=files,
            )  # fmt: skip
            self._keep(made, {paths[stage]: {**keys[stage], "stage": stage} for stage in made})
            found |= made
        return {stage: found[stage] for stage in stages}

    def _keep(self, made: Mapping[str, Features], about: Mapping[Path, Mapping[str, str]]) -> None:
        try:
            for features, (path, key) in zip(made.values(), about.items(), strict=True):
                _write(path, features, key)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            log.warning(
                "The features cannot be kept in %s (%s); they are made again the next time.", self.folder, reason
            )


def weights_digest(*modules: nn.Module | None) -> str:
    """Hash of architecture and weights: two networks with equal tensors but other strides differ."""
    pieces: list[bytes] = []
    for module in modules:
        if module is not None:
            pieces.append(repr(module).encode())
            for name, value in sorted(module.state_dict().items()):
                pieces += [f"{name} {value.dtype} {tuple(value.shape)}".encode(), _bytes(value)]
    return _digest(pieces)


def data_digest(images: Any) -> str:
    """Hash of an `ImageSet`: pixels when in memory, else names, sizes and times of the files; labels in both cases."""
    pieces = [b"" if images.labels is None else _bytes(images.labels)]
    if (targets := images.targets) is not None:
        pieces += [_bytes(targets.values), _description(targets).encode()]
    if images.pixels is not None:
        pieces += [str(tuple(images.pixels.shape)).encode(), _bytes(images.pixels)]
    else:
        pieces += [_of_image(images, index) for index in range(len(images))]
    return _digest(pieces)


def _of_image(images: Any, index: int) -> bytes:
    file = images.file(index)
    if file is None:
        try:
            digest: bytes = images.digest(index)
        except Unreadable as error:  # gone since the run began: it gives no feature
            return os.fsencode(f"{images.name(index)} {error}")
        return digest
    stat = file.stat()
    return os.fsencode(images.name(index)) + f" {stat.st_size} {stat.st_mtime_ns}".encode()


def view_description(datamodule: Any) -> str:
    """What evaluation does to an image before the network sees it."""
    data, like = datamodule.data, datamodule.views[0]
    size = {"image_size": data.image_size, "eval_resize": data.eval_resize}
    scale = {name: None if value is None else list(value) for name, value in (("mean", like.mean), ("std", like.std))}
    return json.dumps({**size, **scale}, default=float)


def _read(path: Path) -> Features | None:
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            metadata = file.metadata() or {}
        if metadata.get("checksum") != _checksum(tensors):
            raise ValueError("the checksum does not match")
        x = tensors["x"] if "x" in tensors else _mapped(path, metadata)
        targets = None
        if "targets" in tensors:
            names, kind = json.loads(metadata["targets"])
            targets = Targets(tensors["targets"], tuple(names), kind)
        return Features(x, tensors.get("labels"), tensors["indices"], targets=targets)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        log.warning("The cached features %s are damaged (%s); they are made again.", path, error)
        return None


def _write(path: Path, features: Features, about: Mapping[str, str]) -> None:
    tensors = {"indices": features.indices.contiguous()}
    if features.file is None:
        tensors["x"] = features.x.contiguous()
    else:  # it lies in a file of its own
        about = {
            **about,
            "rows": str(len(features)),
            "digest": _digest(_bytes(part) for part in features.x.split(ROWS)),
        }
    if features.labels is not None:
        tensors["labels"] = features.labels.contiguous()
    if features.targets is not None:
        tensors["targets"] = features.targets.values.contiguous()
        about = {**about, "targets": _description(features.targets)}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.part")
    try:
        save_file(tensors, unfinished, metadata={**about, "checksum": _checksum(tensors)})
        if features.file is not None:
            features.file.replace(path.with_suffix(".npy"))
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _mapped(path: Path, about: Mapping[str, str]) -> Tensor:
    """The features that lie in a file beside ``path``, mapped."""
    x = torch.from_numpy(np.load(path.with_suffix(".npy"), mmap_mode="c")[: int(about["rows"])])
    if _digest(_bytes(part) for part in x.split(ROWS)) != about["digest"]:
        raise ValueError("the checksum does not match")
    return x


def _description(targets: Targets) -> str:
    return json.dumps([targets.names, targets.kind])


def _checksum(tensors: dict[str, Tensor]) -> str:
    return _digest([piece for name in sorted(tensors) for piece in (name.encode(), _bytes(tensors[name]))])


def _digest(pieces: Iterable[bytes]) -> str:
    """Hash of the pieces; their lengths are hashed too, so that ``ab, c`` is not ``a, bc``."""
    digest = hashlib.blake2b(digest_size=16)
    for piece in pieces:
        digest.update(len(piece).to_bytes(8, "little"))
        digest.update(piece)
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
