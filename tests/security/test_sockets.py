"""No socket is opened that nobody asked for: what a first user types, with the network taken away."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from selfsight import cli


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was asked of the network; nothing is answered."""
    found: list[str] = []

    def closed(name: str) -> Callable[..., Any]:
        def ask(*given: Any, **named: Any) -> Any:
            if given and isinstance(given[0], socket.socket) and given[0].family == socket.AF_UNIX:
                return real[name](*given, **named)  # between processes of this machine
            found.append(f"{name}{given[1:] or given}")
            raise OSError("there is no network")

        return ask

    real = {name: getattr(socket.socket, name) for name in ("connect", "connect_ex", "bind", "sendto")}
    for name in real:
        monkeypatch.setattr(socket.socket, name, closed(name))
    for name in ("getaddrinfo", "gethostbyname", "create_connection"):
        monkeypatch.setattr(socket, name, closed(name))
    return found


def test_the_network_that_is_taken_away_is_noticed(asked: list[str]) -> None:
    with pytest.raises(OSError, match="no network"):
        socket.create_connection(("localhost", 9))
    with socket.socket() as plain, pytest.raises(OSError, match="no network"):
        plain.connect(("127.0.0.1", 9))
    assert len(asked) == 2


def test_no_job_of_a_first_day_opens_a_socket(
    asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    cli.main(["pretrain", "debug=smoke", "num_workers=0"])  # with its report
    run = f"run={next((tmp_path / 'runs').iterdir())}"
    for words in (
        ["knn", run], ["linear", run], ["report", run], ["embed", run, "out=features.npz"],
        ["export", run, "format=safetensors", "out=backbone"], ["runs"], ["doctor"],
    ):  # fmt: skip
        cli.main(words)
    assert asked == []
    assert Path("backbone").is_dir()
