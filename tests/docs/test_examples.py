"""The examples of the pages run as they stand, a page after the other, each in a folder of its own."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from selfsight.runs.folder import RUN_VARIABLE

DOCS = Path(__file__).parents[2] / "docs"
#: a block that begins with ```python run
RUNNABLE = re.compile(r"^```python run\n(.*?)^```$", re.M | re.S)
PAGES = {
    str(path.relative_to(DOCS)): blocks
    for path in sorted(DOCS.rglob("*.md"))
    if (blocks := list(RUNNABLE.finditer(path.read_text())))
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the pages take for granted: ``photos``, two classes of 32 pictures, and ``holiday``, 8 more."""
    rng = np.random.default_rng(0)
    for folder, count in (("photos/sea", 32), ("photos/wood", 32), ("holiday", 8)):
        (tmp_path / folder).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 120, (5, 6, 3), dtype=np.uint8)
            pixels[..., 2 if folder.endswith("sea") else 1] += 100
            Image.fromarray(pixels).resize((48, 40), Image.Resampling.BICUBIC).save(tmp_path / folder / f"{i:02}.jpg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(RUN_VARIABLE, raising=False)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_examples_of_a_page(page: str, place: Path) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    try:
        for block in PAGES[page]:
            line = block.string.count("\n", 0, block.start(1))
            code = "\n" * line + block.group(1)  # an error names the line of the page
            exec(compile(code, str(DOCS / page), "exec"), names)
    finally:
        os.environ.pop(RUN_VARIABLE, None)


def test_there_are_examples() -> None:
    assert len(PAGES["python.md"]) >= 6
