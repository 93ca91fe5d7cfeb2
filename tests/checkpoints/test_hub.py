"""`selfsight export format=hub`: a folder as the Hub has them, uploaded to one on the loopback and fetched again."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import selfsight
from selfsight import cli
from selfsight.backbones.registry import create, weights_line
from selfsight.checkpoints import hub
from selfsight.checkpoints.export import export_backbone
from selfsight.errors import UserError
from tests.checkpoints.hub_server import TOKEN, Hub, serving
from tests.checkpoints.published import lively

#: networks of timm, with a stem of ours, of ours alone, a transformer, one of the methods' own
NETWORKS: dict[str, dict[str, Any]] = {
    "resnet18": {"name": "resnet18"},
    "small stem": {"name": "resnet18", "stem": "cifar"},
    "ours": {"name": "resnet10_slim", "width": 8},
    "transformer": {"name": "vit_tiny_patch16_224", "image_size": 32, "patch_size": 8, "depth": 2},
    "DINO's": {"name": "vit_tiny_dino", "image_size": 32, "patch_size": 8, "depth": 2},
}


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        yield server


def exported(place: Path, arguments: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    net = lively(create(**arguments))
    spec = {"backbone": arguments, "image_size": 32, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "method": "swav"}
    place.mkdir()
    export_backbone(net, spec, place)
    return net


def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("network", NETWORKS)
def test_a_folder_of_the_hub_is_read_by_timm_and_by_us(network: str, tmp_path: Path) -> None:
    net, x = exported(tmp_path / "net", NETWORKS[network]), images()
    cli.main(["export", f"weights={tmp_path / 'net'}", "format=hub", f"out={tmp_path / 'hub'}"])
    assert sorted(path.name for path in (tmp_path / "hub").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    with torch.no_grad():
        torch.testing.assert_close(selfsight.load(tmp_path / "hub")(x), net(x), rtol=0, atol=1e-6)
    assert selfsight.load(tmp_path / "hub").spec["mean"] == [0.5, 0.4, 0.3]
    if network in ("resnet18", "transformer", "DINO's"):
        theirs = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
        with torch.no_grad():
            torch.testing.assert_close(theirs(x), net(x), rtol=0, atol=1e-6)
        config = timm.data.resolve_model_data_config(theirs)
        assert (list(config["mean"]), list(config["std"])) == ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4])


#: runs each block where there is no selfsight, and writes down the features of its network or the names of its tensors
ELSEWHERE = """
import json, sys
sys.modules["selfsight"] = None
import numpy, torch
x = torch.from_numpy(numpy.load(sys.argv[1]))
for out, code in json.load(sys.stdin).items():
    names = {}
    exec(code, names)
    with torch.no_grad():
        numpy.save(out, names["net"](x).numpy() if "net" in names else numpy.array(sorted(names["weights"])))
"""


def test_the_lines_of_a_model_card_load_it_where_selfsight_is_not(
    served: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pushed; every block of Python on a card runs, those of other libraries in a process without selfsight."""
    x, elsewhere, wanted = images(), {}, {}
    np.save(tmp_path / "x.npy", x.numpy())
    words = ["license=mit", "data=drawn shapes", "data_license=cc0-1.0", "push=ada/shapes"]
    for network in ("resnet18", "small stem", "ours"):
        words[-1] = f"push=ada/{network.replace(' ', '-')}"
        place = tmp_path / network
        net = exported(place, NETWORKS[network])
        cli.main(["export", f"weights={place}", "format=hub", f"out={place / 'hub'}", *words])
        name = words[-1].removeprefix("push=")
        assert f"selfsight.load('hf-hub:{name}') loads it" in capsys.readouterr().out
        assert sorted(served.files[name]) == ["README.md", "config.json", "model.safetensors"]
        card = served.files[name]["README.md"].decode()
        assert card == (place / "hub" / "README.md").read_text()
        for told in (
            "license: mit", "| Images | drawn shapes |", "| Licence of the images | cc0-1.0 |", "| Method | swav |",
            "## Intended use", "## Citation", "arXiv:2006.09882",
        ):  # fmt: skip
            assert told in card
        blocks = dict(re.findall(r"With (\w+):\n\n```python\n(.+?)\n```", card, flags=re.S))
        assert len(blocks) >= 3
        with torch.no_grad():
            features = net(x).numpy()
        for library, code in blocks.items():
            if library in ("selfsight", "PyTorch"):
                names: dict[str, Any] = {}
                exec(code, names)
                with torch.no_grad():
                    np.testing.assert_allclose(names["net"](x).numpy(), features, rtol=0, atol=1e-5)
            else:
                out = str(tmp_path / f"{network} by {library}.npy")
                elsewhere[out] = code
                wanted[out] = features if library != "safetensors" else np.array(sorted(net.state_dict()))
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "another cache")}
    subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(tmp_path / "x.npy")],
        input=json.dumps(elsewhere), text=True, check=True, env=environment,
    )  # fmt: skip
    assert {Path(out).stem.rpartition(" ")[2] for out in wanted} == {"timm", "torchvision", "safetensors"}
    for out, value in wanted.items():
        found = np.load(out)
        if value.dtype.kind == "U":
            assert found.tolist() == value.tolist()
        else:
            np.testing.assert_allclose(found, value, rtol=0, atol=1e-5, err_msg=out)


def test_published_weights_without_a_network_are_those_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_ENDPOINT", "http://nowhere.invalid")
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"waited for {seconds} s"))
    words = ["debug=smoke", "backbone=resnet10t", "backbone.pretrained=true", f"runs={tmp_path}"]
    with pytest.raises(SystemExit):
        cli.main(["pretrain", *words])
    told = "The weights of 'resnet10t' are not on this machine and the Hub cannot be reached (its name is not known"
    assert told in capsys.readouterr().err

    kept = tmp_path / "models--timm--resnet10t.c3_in1k"
    for folder in ("refs", "snapshots/1"):
        (kept / folder).mkdir(parents=True)
    (kept / "refs" / "main").write_text("1")
    net = lively(timm.create_model("resnet10t"))
    save_file(net.state_dict(), kept / "snapshots" / "1" / "model.safetensors")
    found = create("resnet10t", pretrained=True)
    torch.testing.assert_close(found.state_dict()["conv1.0.weight"], net.state_dict()["conv1.0.weight"])
    assert weights_line(found).startswith("resnet10t.c3_in1k of timm")


def test_loading_from_the_hub(served: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = exported(tmp_path / "net", NETWORKS["ours"]), images()
    cli.main(["export", f"weights={tmp_path / 'net'}", "format=hub", f"out={tmp_path / 'hub'}", "push=shapes"])
    with torch.no_grad():
        torch.testing.assert_close(selfsight.load("hf-hub:ada/shapes")(x), net(x))
    served.asked.clear()
    selfsight.load("hf-hub:ada/shapes")
    assert not [asked for asked in served.asked if asked.startswith("GET") and "safetensors" in asked]  # the cache's
    monkeypatch.setenv("HF_ENDPOINT", "http://nowhere.invalid")  # where names are not found nobody is waited for
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"waited for {seconds} s"))
    selfsight.load("hf-hub:ada/shapes")
    with pytest.raises(UserError, match=r"cannot be reached \(its name is not known here\)"):
        selfsight.load("hf-hub:ada/elsewhere")


def test_a_model_of_the_hub_is_taken_by_jobs(served: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exported(tmp_path / "net", NETWORKS["ours"])
    cli.main(["export", f"weights={tmp_path / 'net'}", "format=hub", f"out={tmp_path / 'hub'}", "push=shapes"])
    out = tmp_path / "again"
    cli.main(["export", "weights=hf-hub:ada/shapes", "format=safetensors", f"out={out}"])
    wanted = load_file(tmp_path / "net" / "backbone.safetensors")
    torch.testing.assert_close(load_file(out / "backbone.safetensors"), wanted)
    capsys.readouterr()
    words = ["debug=smoke", "backbone=resnet_digits", "report=false", f"runs={tmp_path}"]
    with pytest.raises(SystemExit):
        cli.main(["pretrain", "init_from=hf-hub:ada/nothing", *words])
    assert "the Hub has no repository 'ada/nothing'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("ada/nothing", "the Hub has no repository 'ada/nothing'"),
        ("ada/empty", "'ada/empty' has no config.json and model.safetensors"),
        ("ada/other", r"config\.json' does not describe a backbone of selfsight: .* under 'selfsight'"),
        ("a b/c", "is no name of a repository"),
    ],
)
def test_what_the_hub_does_not_have_is_one_sentence(name: str, told: str, served: Hub) -> None:
    served.files |= {
        "ada/empty": {"README.md": b"nothing"},
        "ada/other": {"config.json": json.dumps({"architecture": "resnet18"}).encode(), "model.safetensors": b"x"},
    }
    with pytest.raises(UserError, match=told) as error:
        selfsight.load(f"hf-hub:{name}")
    assert "\n" not in str(error.value)


def test_a_hub_that_cannot_be_reached_or_written_to(
    served: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the tries of huggingface-hub
    exported(tmp_path / "net", NETWORKS["ours"])
    words = ["export", f"weights={tmp_path / 'net'}", "format=hub", f"out={tmp_path / 'hub'}"]
    for name, token, url, told in (
        ("ada/shapes", "hf_another", served.url, "does not let this account write to 'ada/shapes'"),
        ("ada/a b", TOKEN, served.url, "is no name of a repository"),
        ("ada/shapes", TOKEN, "http://127.0.0.1:9", "the Hub cannot be reached"),
    ):
        monkeypatch.setenv("HF_TOKEN", token)
        monkeypatch.setenv("HF_ENDPOINT", url)
        with pytest.raises(SystemExit):
            cli.main([*words, f"push={name}"])
        error = capsys.readouterr().err
        assert told in error
        assert error.count("\n") == 1
    assert (tmp_path / "hub" / "model.safetensors").is_file()
    with pytest.raises(UserError, match="the Hub cannot be reached"):
        hub.fetch("ada/elsewhere")
    with pytest.raises(SystemExit):
        cli.main(["export", f"weights={tmp_path / 'net'}", "format=timm", "push=ada/x", f"out={tmp_path / 'x'}"])
    assert "push= is for format=hub" in capsys.readouterr().err
