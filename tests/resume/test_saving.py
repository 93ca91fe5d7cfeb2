"""Checkpoints are whole or absent."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from selfsight.engine.checkpointing import (
    AtomicCheckpoints,
    GracefulInterrupt,
    Interrupted,
    TimedCheckpoints,
    read_checkpoint,
    usable_checkpoint,
)
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


def states(folder: Path, *epochs: int) -> Path:
    """Checkpoints of these epochs, one written after the other."""
    path = folder / "last.ckpt"
    for epoch in epochs:
        state = {"x": torch.arange(5000.0) + epoch}
        AtomicCheckpoints().save_checkpoint({"state_dict": state, "epoch": epoch, "global_step": 10 * epoch}, path)
    return path


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    path = states(tmp_path, 0, 1, 2)
    assert {p.name: read_checkpoint(p)["epoch"] for p in tmp_path.iterdir()} == {"last.ckpt": 2, "previous.ckpt": 1}
    assert usable_checkpoint(path) == (path, "")


@pytest.mark.parametrize("damage", ["flip", "cut", "zeros", "empty", "other"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(damage: str, tmp_path: Path) -> None:
    path = states(tmp_path, 0, 1)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    if damage == "flip":
        content[middle] ^= 1
    elif damage == "cut":
        content = content[:middle]
    elif damage == "zeros":
        content[middle : middle + 4096] = bytes(4096)
    elif damage == "empty":
        content = bytearray()
    path.unlink()  # it shares its bytes with nobody
    path.write_bytes(content)
    if damage == "other":
        torch.save({"weights": torch.ones(3)}, path)
    found, sentence = usable_checkpoint(path)
    assert found == tmp_path / "previous.ckpt"
    assert re.search(
        r"last.ckpt' cannot be read .* The one before it is used: .*previous.ckpt', of epoch 1, step 0", sentence
    )
    (tmp_path / "previous.ckpt").write_bytes(b"")
    with pytest.raises(UserError, match=r"last.ckpt' cannot be read as a checkpoint"):
        usable_checkpoint(path)


def test_weights_that_are_no_numbers_replace_no_good_ones(tmp_path: Path) -> None:
    saved: list[object] = []
    trainer: Any = SimpleNamespace(world_size=1, accumulate_grad_batches=1, save_checkpoint=saved.append)
    timed, module = TimedCheckpoints(tmp_path / "last.ckpt", 1e-9), nn.Linear(2, 2)
    timed.on_train_batch_start(trainer, module, None, 0)  # type: ignore[arg-type]
    assert saved == [tmp_path / "last.ckpt"]
    with torch.no_grad():
        module.weight[0, 0] = torch.nan
    timed.on_train_batch_start(trainer, module, None, 1)  # type: ignore[arg-type]
    assert len(saved) == 1


def test_no_checkpoint_in_the_middle_of_accumulated_batches(tmp_path: Path) -> None:
    saved: list[object] = []
    trainer: Any = SimpleNamespace(world_size=1, accumulate_grad_batches=4, save_checkpoint=saved.append)
    timed = TimedCheckpoints(tmp_path / "last.ckpt", 1e-9)
    for batch in range(9):
        timed.on_train_batch_start(trainer, nn.Linear(2, 2), None, batch)  # type: ignore[arg-type]
    assert len(saved) == 3


def test_a_signal_waits_until_the_accumulated_batches_have_made_their_step(tmp_path: Path) -> None:
    saved: list[object] = []
    trainer: Any = SimpleNamespace(world_size=1, accumulate_grad_batches=4, save_checkpoint=saved.append)
    stop = GracefulInterrupt(tmp_path / "last.ckpt")
    stop.on_train_batch_start(trainer, nn.Linear(2, 2), None, 4)  # type: ignore[arg-type]
    stop.handler(15, None)
    for batch in (5, 6, 7):
        stop.on_train_batch_start(trainer, nn.Linear(2, 2), None, batch)  # type: ignore[arg-type]
    assert saved == []
    with pytest.raises(Interrupted) as stopped:
        stop.on_train_batch_start(trainer, nn.Linear(2, 2), None, 8)  # type: ignore[arg-type]
    assert stopped.value.signal == 15
    assert saved == [tmp_path / "last.ckpt"]
