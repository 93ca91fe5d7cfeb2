"""Processes that torchrun has started are those of one run, and a run goes on with another number of them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from selfsight import cli
from selfsight.engine import build
from selfsight.engine.devices import spread
from selfsight.engine.options import TrainerOptions
from selfsight.errors import UserError
from selfsight.runs.folder import RunFolder
from selfsight.trust import Trust, trusting

CPU = torch.device("cpu")

#: a method that notes the images of every step, and is told to stop while it takes one
NOTING = """
import json, os, pathlib, signal
from selfsight.methods.simsiam import SimSiam
from selfsight.nn.distributed import rank, world_size

class Noting(SimSiam):
    def training_step(self, batch, batch_idx):
        place = pathlib.Path(f"{self.step}-{world_size()}-{rank()}.json")
        place.write_text(json.dumps(batch.indices.tolist()))
        if self.step == int(os.environ["STOP_AT"]):
            os.kill(os.getpid(), signal.SIGTERM)
        return super().training_step(batch, batch_idx)
"""


@pytest.mark.slow
def test_two_processes_one_and_two_again_see_what_one_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first stop is at the end of an epoch, where two processes ask each other; the second one within an epoch."""
    (tmp_path / "noting.py").write_text(NOTING)
    words = ["pretrain", "method=simsiam", "method._target_=noting.Noting", "limit_images=64", "batch_size=16"]
    words += ["num_workers=0", "trainer.max_epochs=3", "trainer.accelerator=cpu", "report=false", "evaluator.final={}"]
    words += ["runs=.", "name=run", "resume=auto"]

    def on_two(stop_at: int) -> int:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
        environment = {**os.environ, "STOP_AT": str(stop_at), "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [*command, "selfsight.cli", *words], cwd=tmp_path, env=environment, timeout=300
        ).returncode

    assert on_two(stop_at=0) == 1
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("STOP_AT", "5")
    with pytest.raises(SystemExit, match="143"):
        cli.main(words)
    assert on_two(stop_at=-1) == 0

    folder = RunFolder(tmp_path / "run")
    rows = [(row["epoch"], row["step"]) for row in folder.read_metrics()]
    assert rows == [("1", "4"), ("2", "8"), ("3", "12")]
    seen = []
    for step in range(12):
        parts = sorted(tmp_path.glob(f"{step}-*.json"))
        by_one = step in (4, 5)
        assert [path.stem for path in parts] == ([f"{step}-1-0"] if by_one else [f"{step}-2-0", f"{step}-2-1"])
        seen.append([index for path in parts for index in json.loads(path.read_text())])
    with trusting(Trust(everything=True)):
        loader = build.datamodule(folder.config(), folder).train_dataloader()
    assert seen == [batch.indices.tolist() for _ in range(3) for batch in loader]
    assert folder.summary.is_file()


def listens(port: int) -> bool:
    with socket.socket() as caller:
        return caller.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
def test_one_of_two_agents_is_killed_and_the_other_goes_on(tmp_path: Path) -> None:
    """As on two machines that share a folder, of which one dies: torchrun begins again with the one that is left."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rendezvous = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=photos"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=1"]
    command += [*rendezvous, "--rdzv-conf=last_call_timeout=5", "-m", "selfsight.cli"]
    words = ["pretrain", "method=simsiam", "limit_images=64", "batch_size=16", "num_workers=0", "trainer.max_epochs=30"]
    words += ["trainer.accelerator=cpu", "report=false", "evaluator.final={}", "evaluator.online.every=30", "runs=."]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    logs = [tmp_path / "first.txt", tmp_path / "second.txt"]
    agents = []
    for log in logs:
        while agents and not listens(port):  # the first one holds the rendezvous, and outlives the other
            time.sleep(0.1)
        with log.open("w") as file:
            agents.append(
                subprocess.Popen(
                    [*command, *words, "name=run", "resume=auto"], cwd=tmp_path, env=environment, stdout=file,
                    stderr=subprocess.STDOUT, start_new_session=True,
                )
            )  # fmt: skip
    folder, patience = RunFolder(tmp_path / "run"), time.monotonic() + 240
    try:
        while not folder.metrics.is_file() or len(folder.read_metrics()) < 3:
            assert time.monotonic() < patience, [log.read_text()[-2000:] for log in logs]
            assert [agent.poll() for agent in agents] == [None, None], [log.read_text()[-2000:] for log in logs]
            time.sleep(0.1)
        for child in (Path("/proc") / str(agents[1].pid) / "task").glob("*/children"):
            for pid in child.read_text().split():  # in sessions of their own
                os.kill(int(pid), signal.SIGKILL)
        os.killpg(agents[1].pid, signal.SIGKILL)
        assert agents[0].wait(240) == 0, logs[0].read_text()[-3000:]
    finally:
        for agent in agents:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(agent.pid, signal.SIGKILL)
    told = logs[0].read_text() + logs[1].read_text()
    assert "batch 16 (2 × 8)" in told
    assert "batch 16 (1 × 16)" in told
    assert [row["epoch"] for row in folder.read_metrics()] == [str(epoch) for epoch in range(1, 31)]


def test_what_torchrun_started_is_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "6"}
    assert spread(TrainerOptions(), CPU, 12)[:3] == (1, 1, "auto")
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert spread(TrainerOptions(), CPU, 12)[:3] == (2, 3, "ddp")
    assert spread(TrainerOptions(devices=2), CPU, 12)[:3] == (2, 3, "ddp")
    with pytest.raises(UserError, match=r"started 2 processes on this machine, and trainer.devices asks for 4"):
        spread(TrainerOptions(devices=4), CPU, 12)
    with pytest.raises(UserError, match=r"batch_size is 8 over all devices and there are 6"):
        spread(TrainerOptions(), CPU, 8)
