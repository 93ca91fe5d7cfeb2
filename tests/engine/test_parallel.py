"""Runs on several devices, as far as one process can tell."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from selfsight import cli
from selfsight.backbones.registry import create
from selfsight.engine.checkpointing import GracefulInterrupt, Interrupted, StepSeeds
from selfsight.engine.devices import SyncNorms, processes, spread
from selfsight.engine.options import TrainerOptions
from selfsight.errors import UserError
from selfsight.methods.finetune import FineTune
from selfsight.runs.processes import on_first_process


def options(*words: str) -> Any:
    return TrainerOptions.read(cli.compose("pretrain", [*words, "trainer.num_nodes=1"]).trainer)


def test_synchronised_norms_keep_their_activations_there_and_back() -> None:
    """timm's BatchNorm holds the activation; a plain conversion would drop it."""
    torch.manual_seed(0)
    net, x = create("regnety_002").eval(), torch.randn(2, 3, 64, 64)
    kinds = [type(module) for module in net.modules()]
    before = net(x)
    norms = SyncNorms()
    synced = norms.apply(net)
    assert any(isinstance(module, nn.SyncBatchNorm) for module in synced.modules())
    torch.testing.assert_close(synced(x), before)
    for module in synced.modules():  # as a move to another device does: new tensors in the place of the old ones
        if isinstance(module, nn.SyncBatchNorm):
            module.running_mean = module.running_mean + 0.1
            with torch.no_grad():
                module.weight.mul_(1.5)
    learned = synced(x)
    assert not torch.allclose(learned, before)
    plain = norms.revert(synced)
    assert [type(module) for module in plain.modules()] == kinds
    torch.testing.assert_close(plain(x), learned)


def test_frozen_norms_stay_frozen_when_synchronised() -> None:
    method = FineTune(
        create("resnet18"), projector=None, layer=0, num_classes=2, freeze_projector=False, freeze_after=1,
        frozen_statistics=True, classifier_decay=0.0,
    )  # fmt: skip
    SyncNorms().apply(method)
    method.train()
    assert isinstance(method.backbone.bn1, nn.SyncBatchNorm)
    assert not method.backbone.bn1.training
    assert not method.backbone.layer1[0].bn1.training
    assert method.backbone.layer2[0].bn1.training


def test_how_a_run_is_spread() -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert spread(options("trainer.devices=2"), cpu, 8)[:3] == (2, 1, "ddp")
    assert not spread(options("trainer.devices=2"), cpu, 8).plugins
    assert spread(options("trainer.devices=1"), gpu, 8)[1:] == (1, "auto", [])
    assert len(spread(options("trainer.devices=2"), gpu, 8).plugins) == 1
    assert not spread(options("trainer.devices=2", "trainer.sync_batchnorm=false"), gpu, 8).plugins
    with pytest.raises(UserError, match="8 devices were asked for and batch_size is 4"):
        spread(options("trainer.devices=8"), gpu, 4)
    with pytest.raises(UserError, match="batch_size is 5 over all devices and there are 2; choose a multiple of 2"):
        spread(options("trainer.devices=2"), cpu, 5)
    with pytest.raises(UserError, match="fsdp cuts parameters into pieces"):
        spread(options("trainer.strategy=fsdp", "trainer.devices=2"), gpu, 8)
    with pytest.raises(UserError, match=r"one of auto, ddp, .* Did you mean 'ddp'"):
        spread(options("trainer.strategy=dpp", "trainer.devices=1"), gpu, 8)


def test_gpus_by_number() -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    chosen = options("trainer.devices=[1,3]")
    assert processes(chosen, gpu) == 2
    assert spread(chosen, gpu, 8)[:3] == ([1, 3], 1, "ddp")
    with pytest.raises(UserError, match="names GPUs and this run computes on the CPU"):
        spread(chosen, cpu, 8)


def drawn(epoch: int, batch: int, rank: int) -> torch.Tensor:
    trainer, module = (
        SimpleNamespace(current_epoch=epoch, global_rank=rank),
        SimpleNamespace(device=torch.device("cpu")),
    )
    StepSeeds(3).on_train_batch_start(trainer, module, None, batch)  # type: ignore[arg-type]
    return torch.rand(4)


def test_a_step_draws_by_its_place_and_its_process() -> None:
    first = drawn(1, 2, 0)
    others = [drawn(1, 2, 1), drawn(1, 3, 0), drawn(2, 2, 0)]
    assert not any(torch.equal(first, other) for other in others)
    assert torch.equal(drawn(1, 2, 0), first)


def test_processes_stop_at_the_same_step() -> None:
    """One of them was asked to; the others learn of it where all ask each other."""
    asked: list[bool] = []
    saved: list[object] = []

    def reduce(decision: bool, all: bool) -> bool:
        asked.append(decision)
        return len(asked) == 2

    trainer: Any = SimpleNamespace(
        world_size=2,
        accumulate_grad_batches=1,
        strategy=SimpleNamespace(reduce_boolean_decision=reduce),
        save_checkpoint=saved.append,
    )
    stop: Any = GracefulInterrupt("there")  # type: ignore[arg-type]
    for batch in range(GracefulInterrupt.ASKED_EVERY):
        stop.on_train_batch_start(trainer, None, None, batch)
    assert asked == [False]
    with pytest.raises(Interrupted):
        stop.on_train_batch_start(trainer, None, None, GracefulInterrupt.ASKED_EVERY)
    assert saved == ["there"]


def test_a_rank_of_slurms_counts_among_several_tasks_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_PROCID", "3")
    monkeypatch.delenv("SLURM_NTASKS", raising=False)
    assert on_first_process()
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert not on_first_process()
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert on_first_process()
