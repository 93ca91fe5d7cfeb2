"""The features of images in one file: a NumPy archive, or a table that tools for embeddings read."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from selfsight.contracts import Targets
from selfsight.datamodules import ImageData
from selfsight.errors import UserError
from selfsight.evaluation import Features
from selfsight.evaluation.probes import knn
from selfsight.files import replace
from selfsight.reporting import embedding

PARQUET, NUMPY = ".parquet", ".npz"
#: images that are listed as the nearest of each, in a table
NEAREST = 10
#: of a table, by their names
Columns = dict[str, list[object]]


def check(out: str | None, projection: str) -> None:
    """Refuse, before anything is computed, what cannot be written.

    Raises:
        UserError: a file of another kind, a table without the package that writes it, or see
            `embedding.check_projection`.
    """
    embedding.check_projection(projection)
    if out is not None and Path(out).suffix not in (NUMPY, PARQUET) and not Path(out).expanduser().is_dir():
        raise UserError(f"out is '{out}'; a file that ends in {NUMPY} (arrays) or {PARQUET} (a table) was expected.")
    if out is not None and str(out).endswith(PARQUET) and importlib.util.find_spec("pyarrow") is None:
        raise UserError("a table needs a package: pip install 'selfsight[parquet]'; out=features.npz does without.")


def write(path: Path, data: ImageData, parts: Mapping[str, Features], projection: str) -> None:
    """Write the features of the parts of a data set: a table where the name ends in ``.parquet``, else an archive."""
    if path.suffix == PARQUET:
        columns = rows_of(data, parts, projection)
        replace(path, lambda beside: save_table(beside, columns))
    else:
        arrays = arrays_of(data, parts)
        replace(path, lambda beside: save(beside, arrays))


def arrays_of(data: ImageData, parts: Mapping[str, Features]) -> dict[str, np.ndarray]:
    """The arrays of an archive."""
    arrays: dict[str, np.ndarray] = {}
    for part, features in parts.items():
        images = data.split(part)
        arrays[f"{part}_x"] = features.x.numpy()
        arrays[f"{part}_indices"] = features.indices.numpy()
        arrays[f"{part}_names"] = np.array([images.name(int(i)) for i in features.indices], dtype=np.str_)
        if features.labels is not None:
            arrays[f"{part}_labels"] = features.labels.numpy()
        if features.targets is not None:
            arrays[f"{part}_targets"] = features.targets.values.numpy()
    return arrays


def rows_of(data: ImageData, parts: Mapping[str, Features], projection: str) -> Columns:
    """The columns of a table of all images, as tools that show embeddings read them.

    ``split``, ``name``, ``path`` (of the file, where it is one), ``label``, ``class``, ``embedding``, its place ``x``,
    ``y`` in a map, and in ``neighbors`` the rows of the nearest images by cosine, with ``similarity``. Several labels
    or numbers of each image are in a column each, ``target NAME``.
    """
    columns: Columns = {name: [] for name in ("split", "name", "path", "label", "class")}
    for part, features in parts.items():
        images, known = data.split(part), features.labels
        labels = [-1] * len(features) if known is None else known.tolist()
        files = [images.file(int(i)) for i in features.indices]
        columns["split"] += [part] * len(features)
        columns["name"] += [images.name(int(i)) for i in features.indices]
        columns["path"] += [None if file is None else str(file.resolve()) for file in files]
        columns["label"] += [label if label >= 0 else None for label in labels]
        columns["class"] += [data.classes[label] if label >= 0 else None for label in labels]
    if data.targets is not None:
        columns |= target_columns(data.targets, list(parts.values()))
    x = torch.cat([features.x.float() for features in parts.values()])
    unit = F.normalize(x, dim=1)
    flat = embedding.project_2d(unit.numpy(), projection)
    similarity, index = knn.other_neighbours(unit, unit, min(NEAREST, len(x) - 1), torch.arange(len(x)))
    columns |= {"embedding": list(x.numpy()), "x": list(flat[:, 0]), "y": list(flat[:, 1])}
    return columns | {"neighbors": list(index.numpy()), "similarity": list(similarity.numpy())}


def target_columns(like: Targets, parts: Sequence[Features]) -> Columns:
    """A column for each label or number, by its name; None where it is not known."""
    values = Targets.joined(
        [like.unknown(len(each)) if each.targets is None else each.targets for each in parts]
    ).values
    return {
        f"target {name}": [None if value != value else value for value in column.tolist()]
        for name, column in zip(like.names, values.T, strict=True)
    }


def save_table(path: Path, columns: Columns) -> None:
    import pyarrow
    from pyarrow import parquet

    kinds = {"label": pyarrow.int64(), "class": pyarrow.string(), "path": pyarrow.string()}
    kinds["embedding"] = pyarrow.list_(pyarrow.float32(), len(np.asarray(columns["embedding"][0])))
    parquet.write_table(
        pyarrow.table({name: pyarrow.array(values, kinds.get(name)) for name, values in columns.items()}), path
    )


def save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with path.open("wb") as file:  # given a path, NumPy would change its ending
        np.savez(file, **arrays)  # type: ignore[arg-type]
