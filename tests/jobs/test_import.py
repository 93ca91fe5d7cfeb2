"""`selfsight import`: what is told, what is written, and that a run goes on as if it had never been anyone else's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import selfsight
from selfsight import cli
from selfsight.checkpoints import formats
from selfsight.checkpoints.swav import official_names
from selfsight.engine.checkpointing import AtomicCheckpoints
from selfsight.runs.folder import RunFolder
from tests.checkpoints.published import PROJECTS, Published, supce, swav, tv_resnet, write

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


METHODS = {
    "SimCLR": "", "DeepCluster-v2": "", "PixPro": "", "SupCon": "", "SupCE": "", "RotNet's NIN": "", "SparK": "",
    "SimMatchV2": "labels.per_class=2",
}  # fmt: skip


@pytest.mark.parametrize("project", METHODS)
def test_the_state_of_each_method_becomes_a_run(project: str, tmp_path: Path) -> None:
    published = PROJECTS[project]()
    source = write(published, tmp_path)
    out = tmp_path / "out"
    cli.main(["import", f"source={source}", f"out={out}", f"pretrain={SMALL} {METHODS[project]}"])
    checkpoint = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)
    state = formats.read(source).state
    assert state.keys() <= checkpoint["state_dict"].keys()
    assert all(torch.equal(checkpoint["state_dict"][name], value) for name, value in state.items())
    assert (checkpoint["epoch"], checkpoint["global_step"]) == (0, 0)
    assert RunFolder.open(out).config().method._target_.startswith("selfsight.methods")
    assert selfsight.load(out).spec["method"] == published.method  # type: ignore[index]


@pytest.mark.slow
def test_a_run_with_a_state_of_others_trains_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SimMatchV2: banks, teacher and heads are there, and the first step uses them."""
    out = imported(PROJECTS["SimMatchV2"](), tmp_path, f"pretrain={SMALL} labels.per_class=2 trainer.max_epochs=1")
    before = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    cli.main(["pretrain", f"resume={out}"])
    after = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert (int(before["u_bank.filled"]), int(after["u_bank.filled"])) == (8, 32)
    assert not torch.equal(after["da"], before["da"])
    moved = after["teacher.module.heads.fc.weight"] - before["teacher.module.heads.fc.weight"]
    assert 0 < float(moved.abs().max()) < 0.1  # a slow average of what was in the file, not of something new
    assert (RunFolder.open(out).path / "summary.json").is_file()


@pytest.mark.parametrize(
    ("published", "words", "told"),
    [
        (lambda: supce(5), [f"pretrain={SMALL}"], "the file is of 5 classes ('classifier.weight') and these images have"),
        (
            PROJECTS["SimMatchV2"], [f"pretrain={SMALL} labels.per_class=1"],
            "the file is of 20 labelled images ('l_bank') and here are 10",
        ),
        (swav, [f"pretrain={SMALL} method.dim=8"], "is [16, 64] in the file and [8, 64] here; leave out the word"),
        (swav, [f"pretrain={SMALL} method.hidden_dim=0"], "other tensors than the file"),
        (tv_resnet, [f"pretrain={SMALL}"], "the file holds no state of a method"),
        (swav, ["pretrain=dataset=digitz"], "Did you mean 'digits'?"),
        (swav, ["pretrain=dataset='digits"], "cannot be told apart"),
        (swav, [f"pretrain={SMALL}", "epoch=999"], "none is left; add trainer.max_epochs"),
        (swav, ["backbone=resnet50"], "does not hold a whole resnet50"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_sentence(
    published: Callable[[], Published], words: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        imported(published(), tmp_path, *words)
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_words_that_cannot_be_meant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(swav(), tmp_path)
    for words, told in (
        ([f"out={tmp_path / 'out'}"], "source has to be given"),
        ([f"source={source}"], "out has to be given"),
        ([f"source={source}", f"out={tmp_path}"], "exists already and is not empty"),
        ([f"source={source}", f"out={tmp_path / 'out'}", "backbon=resnet18"], "Did you mean 'backbone'?"),
        ([f"source={tmp_path / 'fil'}", f"out={tmp_path / 'out'}"], "Did you mean"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["import", *words])
        error = capsys.readouterr().err
        assert told in error
        assert error.count("\n") == 1


def test_python_imports_without_a_folder(tmp_path: Path) -> None:
    published = swav()
    net = selfsight.import_weights(write(published, tmp_path), mean=[0.0] * 3)
    assert net.spec["mean"] == [0.0, 0.0, 0.0]  # type: ignore[index]
    assert not net.training
    assert not any(p.requires_grad for p in net.parameters())
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
