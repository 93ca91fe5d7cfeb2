"""Reading the files that the methods' authors have published."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch


def read(path: str | Path) -> dict[str, Any]:
    """The file without running code from it; the options of the run that may lie beside the weights are let in."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)
