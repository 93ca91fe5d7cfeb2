"""No version that the project lets in has a hole that is on the list."""

from __future__ import annotations

from packaging.version import Version

from .audit import Hole, declared, found, known


def test_no_version_that_is_let_in_has_a_known_hole() -> None:
    assert found(declared(), known()) == []


def test_what_lets_one_in_is_told() -> None:
    holes = [Hole("pillow", Version("10.3"), "A"), Hole("huggingface-hub", Version("2"), "B")]
    assert found(["pillow>=10.3", "huggingface_hub==2.1", "torch"], holes) == []
    assert found(["Pillow>=10.2,<13", "huggingface_hub"], holes) == [
        "Pillow<13,>=10.2 lets in A, which 10.3 has mended",
        "huggingface_hub lets in B, which 2 has mended",
    ]
