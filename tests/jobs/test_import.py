"""`selfsight import`: what is told, what is written, and that a run goes on as if it had never been anyone else's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from selfsight import cli
from selfsight.checkpoints.swav import official_names
from selfsight.engine.checkpointing import AtomicCheckpoints
from tests.checkpoints.published import Published, swav, tv_resnet, write

SMALL = "dataset=digits limit_images=64 batch_size=32 evaluator=knn report=false"


def imported(published: Published, folder: Path, *words: str) -> Path:
    cli.main(["import", f"source={write(published, folder)}", f"out={folder / 'out'}", *words])
    return folder / "out"


def test_what_is_found_and_what_is_left_out_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = imported(swav(optimizer=True), tmp_path)
    told = capsys.readouterr().out
    assert "SwAV (facebookresearch/swav): resnet18 (layers [1, 1, 1, 1]), 72 tensors; images of 224 pixels" in told
    assert "left out, state of the optimiser: 43 (optimizer.state.0.momentum_buffer, " in told
    assert "its projector, prototypes are in the file, too: to go on with swav from them" in told
    spec = json.loads((out / "backbone.json").read_text())
    assert spec["std"] == [0.228, 0.224, 0.225]
    assert spec["imported"] == {"format": "SwAV (facebookresearch/swav)", "file": "file"}
    assert sorted(path.name for path in out.iterdir()) == ["backbone.json", "backbone.safetensors"]


def test_images_are_described_as_one_says(tmp_path: Path) -> None:
    out = imported(tv_resnet(), tmp_path, "image_size=96", "mean=[0.1,0.2,0.3]", "std=[1.0,1.0,1.0]")
    spec = json.loads((out / "backbone.json").read_text())
    assert (spec["image_size"], spec["mean"], spec["std"]) == (96, [0.1, 0.2, 0.3], [1.0, 1.0, 1.0])


def test_an_imported_folder_serves_the_jobs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = imported(tv_resnet(), tmp_path, "image_size=32")
    cli.main(["knn", f"backbone={out}", "dataset=digits"])
    assert "kNN" in capsys.readouterr().out or "%" in capsys.readouterr().out
    cli.main(["export", f"backbone={out}", "format=torchvision", f"out={tmp_path / 'again.pth'}"])
    again = torch.load(tmp_path / "again.pth", weights_only=True)
    assert all(torch.equal(again[name], value) for name, value in tv_resnet().content.items() if name in again)
    assert len(again) == 120


@pytest.mark.slow
def test_a_run_that_comes_back_from_its_authors_form_goes_on_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three epochs of ours; the second's checkpoint in the authors' form, imported, does the third one alike."""
    words = [*SMALL.split(), "method=swav", "trainer.max_epochs=3"]
    words += ["method.num_prototypes=20", "method.freeze_prototypes_steps=3"]
    save = AtomicCheckpoints.save_checkpoint

    def keep(self: AtomicCheckpoints, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        save(self, checkpoint, path, storage_options)
        shutil.copy(path, tmp_path / f"{checkpoint['global_step']}.ckpt")

    monkeypatch.setattr(AtomicCheckpoints, "save_checkpoint", keep)
    cli.main(["pretrain", *words, f"runs={tmp_path}", "name=whole"])
    steps = sorted(int(path.stem) for path in tmp_path.glob("*.ckpt"))
    second = torch.load(tmp_path / f"{steps[1]}.ckpt", weights_only=True)
    theirs = {f"module.{name}": value for name, value in official_names(second["state_dict"]).items()}
    content = {"epoch": 2, "state_dict": theirs, "optimizer": second["optimizer_states"][0]}
    torch.save(content, tmp_path / "checkpoint.pth.tar")

    out = tmp_path / "again"
    said = f"pretrain={' '.join(words)}"
    cli.main(["import", f"source={tmp_path / 'checkpoint.pth.tar'}", f"out={out}", said])
    cli.main(["pretrain", f"resume={out}"])
    whole, again = (
        torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (tmp_path / "whole", out)
    )
    assert again["global_step"] == whole["global_step"] == steps[-1]
    differing = [k for k, v in whole["state_dict"].items() if not torch.equal(v, again["state_dict"][k])]
    assert differing == ["usage"]  # a monitor, which the authors do not keep
    kept = [checkpoint["optimizer_states"][0]["state"] for checkpoint in (whole, again)]
    assert all(torch.equal(slot["momentum_buffer"], kept[1][i]["momentum_buffer"]) for i, slot in kept[0].items())
    rows = [(run / "metrics.csv").read_text().splitlines()[-1].split(",")[:3] for run in (tmp_path / "whole", out)]
    assert rows[0] == rows[1]
