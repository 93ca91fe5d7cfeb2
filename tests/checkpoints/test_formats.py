"""Checkpoints of others: whose they are, and the features of the network in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import selfsight
from selfsight.checkpoints import formats
from selfsight.checkpoints.load import start_from
from tests.checkpoints.published import PROJECTS, write


@pytest.mark.parametrize("project", PROJECTS)
def test_features_are_those_of_the_network_that_was_published(project: str, tmp_path: Path) -> None:
    published = PROJECTS[project]()
    source = write(published, tmp_path)
    imported = formats.read(source, backbone=published.backbone)
    assert imported.format.name == project.partition(":")[0] or project.startswith(imported.format.name)
    assert sum(map(len, imported.unused.values())) == published.left_out, imported.unused
    assert imported.format.method == published.method
    assert published.spec.items() <= imported.spec.items()

    net = selfsight.import_weights(source, tmp_path / "out", backbone=published.backbone)
    loaded = selfsight.load(tmp_path / "out")
    reference: Any = published.features
    x = published.images.double()
    for module in (net, loaded, *([reference] if isinstance(reference, nn.Module) else [])):
        module.double()
    with torch.no_grad():
        if not isinstance(reference, nn.Module):  # a function around a network: single precision
            net.float()
            loaded.float()
            x = x.float()
        wanted = reference(x)
        torch.testing.assert_close(net(x), wanted, rtol=0, atol=1e-6)
        torch.testing.assert_close(loaded(x), wanted, rtol=0, atol=1e-6)
