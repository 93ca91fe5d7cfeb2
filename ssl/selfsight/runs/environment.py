"""What has to be known to run the same thing again: command, versions, machine, commit."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

REPORTED_PACKAGES = (
    "selfsight",
    "torch",
    "torchvision",
    "lightning",
    "timm",
    "hydra-core",
    "numpy",
    "faiss-cpu",
    "scikit-learn",
)


def command() -> list[str]:
    """The words that started this process, as a user types them."""
    return ["selfsight", *sys.argv[1:]]


def environment() -> dict[str, object]:
    """What has to be known to run the same thing again: command, versions, machine, commit."""
    import torch

    def version(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    def commit() -> str | None:
        here = Path(__file__).parent
        try:
            done = subprocess.run(
                ["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() or None

    return {
        "command": command(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "cuda": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "threads": torch.get_num_threads(),
        "commit": commit(),
        "packages": {package: version(package) for package in REPORTED_PACKAGES},
    }
