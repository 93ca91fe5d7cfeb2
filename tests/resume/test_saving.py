"""Checkpoints are whole or absent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from selfsight.engine.checkpointing import AtomicCheckpoints, read_checkpoint
from selfsight.errors import UserError


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 64 vs 0")])
def test_a_full_disk_leaves_the_last_checkpoint_and_nothing_else(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "checkpoints" / "last.ckpt"
    AtomicCheckpoints().save_checkpoint({"step": 1}, target)

    def full(content: Any, file: Any) -> None:
        file.write(b"half of it")
        raise error

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=r"cannot be written .* needs space there"):
        AtomicCheckpoints().save_checkpoint({"step": 2}, target)
    assert [path.name for path in target.parent.iterdir()] == ["last.ckpt"]
    assert read_checkpoint(target) == {"step": 1}


def test_half_a_file_and_a_file_with_code_are_refused(tmp_path: Path) -> None:
    half, code = tmp_path / "half.ckpt", tmp_path / "code.ckpt"
    torch.save({"x": torch.ones(100)}, half)
    half.write_bytes(half.read_bytes()[:200])
    torch.save({"x": Path("anything")}, code)
    for path in (half, code):
        with pytest.raises(UserError, match="cannot be read as a checkpoint"):
            read_checkpoint(path)
