"""`selfsight doctor`: what works on this machine, and what to install for the rest."""

from __future__ import annotations

import importlib.util
import os
import platform
from collections.abc import Callable
from importlib import metadata

from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape
from rich.table import Table

PACKAGES = (
    "torch", "torchvision", "lightning", "hydra-core", "timm", "numpy", "opencv-python-headless", "pillow",
    "faiss-cpu", "torchmetrics", "scikit-learn", "safetensors", "wandb",
)  # fmt: skip

#: module to look for, what it brings, what to type
OPTIONAL = (
    ("simplejpeg", "faster JPEG decoding", "pip install 'selfsight[jpeg]'"),
    ("tifffile", "TIFF of any channels and depth", "pip install 'selfsight[tiff]'"),
    ("pydicom", "DICOM images", "pip install 'selfsight[dicom]'"),
    ("h5py", "images in HDF5 files", "pip install 'selfsight[hdf5]'"),
    ("fsspec", "tar files at http(s)://, s3://, gs://", "pip install 'selfsight[remote]'"),
    (
        "pyarrow",
        "images in parquet files; features as a table, embed out=….parquet",
        "pip install 'selfsight[parquet]'",
    ),
    ("umap", "UMAP embedding maps", "pip install 'selfsight[umap]'"),
    ("bokeh", "the embedding explorer", "pip install 'selfsight[web]'"),
    ("pycocotools", "detection", "pip install 'selfsight[detection]'"),
    ("tensorboard", "logger=tensorboard", "pip install 'selfsight[tensorboard]'"),
    ("mlflow", "logger=mlflow", "pip install 'selfsight[mlflow]'"),
    ("onnx", "ONNX export", "pip install 'selfsight[onnx]'"),
    ("hydra_plugins.hydra_submitit_launcher", "SLURM sweeps", "pip install 'selfsight[slurm]'"),
)


def run(cfg: DictConfig) -> None:
    console = Console(highlight=False)
    console.print(f"Python {platform.python_version()} on {platform.platform()}, {os.cpu_count()} cores")
    versions = Table("package", "version", title="packages", title_justify="left")
    for package in PACKAGES:
        try:
            versions.add_row(package, metadata.version(package))
        except metadata.PackageNotFoundError:
            versions.add_row(package, f"[red]missing[/red]: pip install {package}")
    console.print(versions)

    works = Table("part", "state", title="what works here", title_justify="left")
    for part, check in CHECKS.items():
        try:
            works.add_row(part, check())
        except Exception as error:  # the point of this job is to say what fails
            works.add_row(
                part, f"[red]fails[/red]: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
            )
    for module, brings, command in OPTIONAL:
        found = _installed(module)
        works.add_row(brings, "ok" if found else escape(f"not installed: {command}"))
    console.print(works)


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _devices() -> str:
    import torch

    if torch.cuda.is_available():
        return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return f"CPU only ({torch.get_num_threads()} threads); a CUDA build of PyTorch and a driver bring the GPU"


def _bf16() -> str:
    import torch

    from selfsight.engine.precision import WORTH_IT, bf16_gain, bf16_told

    if torch.cuda.is_available():
        return (
            "ok on the GPU" if torch.cuda.is_bf16_supported() else "the GPU does not compute in bf16; float32 is used"
        )
    gain = bf16_gain()
    told = bf16_told(gain)
    return f"{told}: trainer.precision=bf16-mixed" if gain >= WORTH_IT else f"{told}; float32 is the default"


def _compile() -> str:
    import torch

    compiled = torch.compile(lambda x: torch.relu(x * 2 + 1), fullgraph=True)
    x = torch.randn(64)
    assert torch.equal(compiled(x), torch.relu(x * 2 + 1))
    return "ok"


def _decoders() -> str:
    import io

    import cv2
    import numpy as np
    from PIL import Image

    image = np.tile(np.arange(64, dtype=np.uint8), (64, 1))
    ok, jpeg = cv2.imencode(".jpg", image)
    assert ok
    assert cv2.imdecode(jpeg, cv2.IMREAD_COLOR) is not None
    Image.open(io.BytesIO(jpeg.tobytes())).load()
    return "OpenCV, Pillow" + (", simplejpeg" if _installed("simplejpeg") else "")


def _faiss() -> str:
    import faiss
    import numpy as np

    index = faiss.IndexFlatIP(4)
    index.add(np.eye(4, dtype=np.float32))
    assert index.search(np.eye(4, dtype=np.float32), 1)[1].ravel().tolist() == [0, 1, 2, 3]
    return f"ok, {faiss.omp_get_max_threads()} threads"


def _distributed() -> str:
    import torch.distributed as dist

    backends = [name for name in ("gloo", "nccl") if dist.is_backend_available(name)]
    return ", ".join(backends)


CHECKS: dict[str, Callable[[], str]] = {
    "devices": _devices,
    "bf16": _bf16,
    "torch.compile": _compile,
    "image decoders": _decoders,
    "faiss": _faiss,
    "several processes": _distributed,
}
