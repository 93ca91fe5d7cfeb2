"""`selfsight backbones`: a table of steps that were taken, in the screen's and in Markdown's form, and a page kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from selfsight import cli
from selfsight.backbones.families import FAMILIES, named
from selfsight.backbones.registry import create
from selfsight.engine import one_step
from selfsight.jobs import backbones
from selfsight.reporting.backbone_table import BEGIN, END

#: of a dozen kinds: stems of several strides, narrow ones of one pixel, tokens and maps, channels last, hybrids, wide
#: outputs of small maps
DOZEN = (
    "resnet10_slim", "lcnet_035", "mnasnet_small", "mobilenetv3_small_050", "ghostnet_050", "convnext_zepto_rms",
    "inception_next_atto", "xcit_nano_12_p8_224", "cct_2_3x2", "vit_tiny_patch16_224", "convit_tiny",
    "edgenext_xx_small", "repvgg_a0",
)  # fmt: skip


def test_the_table_of_two_families(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tick where the step went through, the reason where it did not; the page's own words stay."""
    page = tmp_path / "networks.md"
    page.write_text(f"# Networks\n\nBefore.\n\n{BEGIN}\nold\n{END}\n\nAfter.\n")
    cli.main(["backbones", "StarNet", "cct_2_3x2", "methods=[simclrv2,spark]", f"out={page}"])
    made, told = page.read_text(), capsys.readouterr().out
    assert made.startswith("# Networks\n\nBefore.\n")
    assert made.endswith("\n\nAfter.\n")
    assert "old" not in made
    rows = {line.split(" | ")[0]: line for line in made.splitlines() if line.startswith("| ")}
    assert rows["| StarNet"].endswith(" | ✓ | ✓ |")
    assert rows["| CCT"].endswith(" | ✓ | – |")
    reason = next(line for line in made.splitlines() if line.startswith("- spark"))
    assert "CCT" in reason
    assert "StarNet" not in reason
    assert "MAE" in reason
    assert all(title in told for title in ("StarNet", "CCT", "starnet_s050"))


@pytest.mark.parametrize("name", DOZEN)
def test_a_step_of_a_dozen(name: str) -> None:
    """SimCLR's loss moves each network, on the smallest images that it takes."""
    side, reason = one_step.smallest_side(name)
    assert side is not None, reason
    torch.manual_seed(0)
    assert one_step.refusal("simclrv2", create(name, image_size=side), side) == ""


def test_a_step_that_fails_is_a_reason_and_no_end() -> None:
    """Whatever a network raises stands in the table; one that no gradient reaches has learned nothing."""

    class Broken(torch.nn.Module):
        num_features = 4

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("out of shape")

    class Still(torch.nn.Module):
        num_features = 4

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean((1, 2, 3))[:, None] * self.weight.detach()

    assert one_step.refusal("simclrv2", Broken(), 32) == "fails: RuntimeError: out of shape"  # type: ignore[arg-type]
    assert one_step.refusal("simclrv2", Still(), 32) == "the network stays as it was"  # type: ignore[arg-type]


def test_families_and_methods_by_name() -> None:
    """By title, a part of it, or a member; a typo leads to the nearest."""
    assert [family.title for family in named(["vov", "starnet_s1"])] == ["VoVNet", "StarNet"]
    assert named([]) == list(FAMILIES)
    with pytest.raises(Exception, match=r"no family of networks 'StarNett'\. Did you mean"):
        named(["StarNett"])
    with pytest.raises(Exception, match=r"no method 'simclrv3'.*simclrv2"):
        backbones.methods_of(["simclrv3"])
