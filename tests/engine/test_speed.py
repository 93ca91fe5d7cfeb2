"""Switches that make a run faster leave what it learns alone."""

from __future__ import annotations

import copy
import functools
import logging
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from selfsight import cli
from selfsight.contracts import Batch
from selfsight.engine import build, devices, performance, sizes
from selfsight.engine.options import TrainerOptions
from selfsight.errors import UserError
from selfsight.methods.base import Method
from selfsight.optim.recipe import OptimizationRecipe
from selfsight.optim.schedule import Clock


class Small(Method):
    uncompiled = ("aside",)

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()))
        self.head = nn.Linear(4 * 36, 2)
        self.aside = nn.Identity()

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, torch.Tensor]:
        return {"loss": self.aside(self.head(self.backbone(batch.views[0]))).square().mean()}


def gradients(method: Method) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    method.training_step(Batch([torch.randn(4, 3, 8, 8)], torch.arange(4)), 0)["loss"].backward()
    return {name: p.grad for name, p in method.named_parameters()}


def trainer(*words: str) -> TrainerOptions:
    return TrainerOptions.read(cli.compose("pretrain", list(words)).trainer)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """torch.compile traces but generates no code, which would take a minute; what it was asked for is listed."""
    asked: list[object] = []
    real = functools.partial(torch.compile, backend="eager")

    def compile(function: object, **options: object) -> object:
        asked.append(function)
        return real(function, **options)

    monkeypatch.setattr(torch, "compile", compile)
    return asked


def test_compiled_and_channels_last_give_the_same_gradients(eager: list[object]) -> None:
    plain = Small()
    fast = copy.deepcopy(plain)
    performance.apply_performance_options(
        fast, trainer("trainer.compile=true", "trainer.channels_last=true"), torch.device("cpu")
    )
    assert fast.backbone[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert len(eager) == 2, "backbone and head, and not what the method wants left alone"
    assert fast.state_dict().keys() == plain.state_dict().keys()
    expected, got = gradients(plain), gradients(fast)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, msg=name)
    copy.deepcopy(fast).backbone(torch.randn(1, 3, 8, 8))  # an average network is made by copying


def test_compiling_that_fails_is_told_once_and_gone_round(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(function: object, **options: object) -> object:
        def call(*args: object) -> object:
            raise RuntimeError("no C compiler found")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    plain = Small()
    fast = performance.apply_performance_options(
        copy.deepcopy(plain), trainer("trainer.compile=true"), torch.device("cpu")
    )
    with caplog.at_level(logging.WARNING, "selfsight"):
        got = gradients(fast)
        fast.zero_grad()
        gradients(fast)
    assert len([r for r in caplog.records if "no C compiler found" in r.getMessage()]) == 1
    torch.testing.assert_close(got, gradients(plain))


def test_both_entries_of_a_backbone_are_compiled_and_a_copy_is_its_own(eager: list[object]) -> None:
    """Dense methods call ``forward_features``; the call goes through it, too, in one graph."""
    from selfsight.backbones.registry import create

    method = Small()
    method.backbone = create("resnet18", stem="cifar").eval()
    plain = copy.deepcopy(method.backbone)
    performance.compile_networks(method)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(method.backbone.forward_features(x), plain.forward_features(x))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(method.backbone(x), plain(x))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not torch._dynamo.utils.counters["graph_break"]
    copied = copy.deepcopy(method.backbone)
    with torch.no_grad():
        for p in method.backbone.parameters():
            p.zero_()
    torch.testing.assert_close(copied.forward_features(x), plain.forward_features(x))
    torch.testing.assert_close(copied(x), plain(x))


def test_every_stage_of_a_compiled_backbone_is_seen(eager: list[object]) -> None:
    """Compiled code does not call hooks that were registered behind its back."""
    from selfsight.backbones.registry import create
    from selfsight.evaluation import extract

    method = Small()
    method.backbone = create("resnet18", stem="cifar").eval()
    plain = copy.deepcopy(method.backbone)
    performance.compile_networks(method)
    batches = [Batch([torch.randn(2, 3, 8, 8)], torch.arange(2))]
    extract(method.backbone, batches)
    got, expected = (extract(each, batches, stages=("layer1", "final")) for each in (method.backbone, plain))
    for stage in ("layer1", "final"):
        torch.testing.assert_close(got[stage].x, expected[stage].x)


def test_training_steps_replay_and_evaluations_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def compile(function: Any, mode: str = "default") -> Any:
        return lambda *args: (ran.append(mode), function(*args))[1]

    monkeypatch.setattr(torch, "compile", compile)
    began: list[None] = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: began.append(None))
    plain = Small()
    method = copy.deepcopy(plain)
    performance.compile_networks(method, graphs=True)
    steps: Any = performance.GraphSteps()
    for _ in range(2):
        steps.on_train_batch_start(None, method, None, 0)
        torch.testing.assert_close(gradients(method), gradients(plain))
        steps.on_train_batch_end(None, method, None, None, 0)
        method.zero_grad()
        plain.zero_grad()
        method.backbone(torch.zeros(1, 3, 8, 8))
    assert ran == ["reduce-overhead", "reduce-overhead", "default"] * 2, "backbone and head in the step, then outside"
    assert len(began) == 2


@pytest.mark.parametrize(
    ("words", "device", "sentence"),
    [
        ([], "cpu", "needs a GPU and this run computes on cpu"),
        (["trainer.compile=false"], "cuda", "replays compiled networks and trainer.compile is false"),
        (["trainer.accumulate=2"], "cuda", "overwrites gradients that trainer.accumulate wants to add up"),
    ],
)
def test_graphs_that_cannot_be_are_refused(words: list[str], device: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        performance.apply_performance_options(
            Small(), trainer("trainer.cuda_graphs=true", *words), torch.device(device)
        )


def test_auto_means_on_a_gpu(eager: list[object]) -> None:
    method = performance.apply_performance_options(Small(), trainer(), torch.device("cpu"))
    assert not eager
    assert method.backbone[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert devices.resolve_auto("auto", torch.device("cuda"))
    assert not devices.resolve_auto("auto", torch.device("cpu"))


def test_the_switches_reach_the_views(eager: list[object]) -> None:
    cfg = cli.compose("pretrain", ["trainer.compile=true", "trainer.channels_last=true", "trainer.accelerator=cpu"])
    data = build.datamodule(cfg)
    assert eager, "views are compiled"
    assert data.channels_last


def test_activations_are_recomputed_where_the_backbone_can(tmp_path: Path) -> None:
    from selfsight.backbones.registry import create

    method = Small()
    with pytest.raises(UserError, match="cannot recompute"):
        performance.apply_performance_options(
            method, trainer("trainer.checkpoint_activations=true"), torch.device("cpu")
        )
    method.backbone = create("resnet18", stem="cifar")
    method.head = nn.Linear(512, 2)
    plain = copy.deepcopy(method)
    performance.apply_performance_options(method, trainer("trainer.checkpoint_activations=true"), torch.device("cpu"))
    assert method.backbone.grad_checkpointing
    torch.testing.assert_close(gradients(method), gradients(plain))


def test_batches_that_add_up_count_as_one_step() -> None:
    """Schedules run in optimiser steps, and rates that follow the batch follow the whole of it."""
    words = ["trainer.accumulate=2", "trainer.max_epochs=1", "batch_size=32", "limit_images=192"]
    cfg = cli.compose("pretrain", [*words, "trainer.accelerator=cpu"])
    data = build.datamodule(cfg)
    clock = sizes.length(cfg, data)
    assert clock.batch_size == 64
    assert clock.steps_per_epoch == data.steps_per_epoch // 2
    assert clock.epochs == 1


@pytest.mark.parametrize(("batches", "accumulate"), [(3, 2), (4, 2), (2, 5)])
def test_the_clock_counts_the_steps_that_the_trainer_takes(batches: int, accumulate: int, tmp_path: Path) -> None:
    words = [
        f"trainer.accumulate={accumulate}",
        "trainer.max_epochs=2",
        "batch_size=16",
        f"limit_images={batches * 16}",
    ]
    words += ["trainer.accelerator=cpu", f"runs={tmp_path}", "name=run", "report=false"]
    cli.run(["pretrain", *words])
    clock = sizes.length(cli.compose("pretrain", words), build.datamodule(cli.compose("pretrain", words)))
    taken = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert taken == clock.total_steps


def test_what_is_clipped_is_not_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning refuses to clip gradients for a fused optimiser, in every mixed precision."""
    monkeypatch.setattr(build, "device", lambda *args, **options: torch.device("cuda"))
    words = ["optimizer=sgd", "trainer.precision=bf16-mixed"]
    assert build.recipe(cli.compose("pretrain", words)).fused
    assert not build.recipe(cli.compose("pretrain", [*words, "trainer.clip_norm=1"])).fused


def test_fused_only_where_the_optimiser_knows_it() -> None:
    from selfsight.optim import LARS

    clock = Clock(examples=4, batch_size=4, epochs=1, steps_per_epoch=1)
    groups = [{"params": [nn.Parameter(torch.ones(2))]}]
    for optimizer in (torch.optim.SGD, functools.partial(torch.optim.AdamW, eps=1e-6)):
        assert OptimizationRecipe(optimizer, lr=0.1, fused=True).build(groups, clock).defaults["fused"]
    OptimizationRecipe(functools.partial(LARS, momentum=0.9, weight_decay=0.0), lr=0.1, fused=True).build(groups, clock)


@pytest.mark.parametrize(
    ("said", "count"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "active"}, None)],
    ids=["nothing", "a count", "a policy"],
)
def test_waiting_threads_leave_the_cores_to_others_unless_a_person_says_how_they_wait(
    said: dict[str, str], count: str | None
) -> None:
    code = "import os, sys, selfsight; assert 'torch' not in sys.modules; print(os.environ.get('GOMP_SPINCOUNT'))"
    environment = {**os.environ, **said}
    for key in {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} - {*said}:
        environment.pop(key, None)
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == str(count)


def test_freed_memory_is_used_again() -> None:
    code = """
import resource, torch
from selfsight.cpu_memory import keep_freed_memory
kept = keep_freed_memory()
for step in range(10):
    if step == 5:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    activations = [torch.ones(2**20) for _ in range(50)]
    del activations
print(int(kept), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    kept, faults = map(int, done.stdout.split())
    assert bool(kept) == (platform.libc_ver()[0] == "glibc")
    written = 5 * 50 * 2**22 // resource.getpagesize()
    assert not kept or faults < written / 10
