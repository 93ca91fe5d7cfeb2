"""Checkpoints of others: whose they are, the features of the network in them, and what is no such file."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet

import selfsight
from selfsight.backbones.registry import create
from selfsight.checkpoints import formats
from selfsight.checkpoints.export import check_timm, to_detectron2, to_torchvision
from selfsight.checkpoints.libraries import Plain
from selfsight.checkpoints.load import start_from
from selfsight.checkpoints.tensorflow import prefix_of, read_bundle
from selfsight.contracts import Backbone
from selfsight.errors import UserError
from tests.checkpoints.published import PROJECTS, Published, State, resnet, swav, tv_resnet, under, write

PAGE = Path(__file__).parents[2] / "docs" / "weights.md"
REAL = Path(__file__).parent / "tensorflow" / "model.ckpt-250228"


@pytest.mark.parametrize("project", PROJECTS)
def test_features_are_those_of_the_network_that_was_published(project: str, tmp_path: Path) -> None:
    published = PROJECTS[project]()
    source = write(published, tmp_path)
    imported = formats.read(source, backbone=published.backbone)
    assert project.startswith(imported.format.name)
    assert sum(map(len, imported.unused.values())) == published.left_out, imported.unused
    assert imported.format.method == published.method
    assert published.spec.items() <= imported.spec.items()

    net = selfsight.import_weights(source, tmp_path / "out", backbone=published.backbone)
    loaded = selfsight.load(tmp_path / "out")
    reference, x = published.features, published.images
    if isinstance(reference, nn.Module):
        x = x.double()
        for module in (net, loaded, reference):
            module.double()
    with torch.no_grad():
        for module in (net, loaded):
            torch.testing.assert_close(module(x), reference(x), rtol=0, atol=1e-6)
    assert row(imported, loaded) in PAGE.read_text().splitlines()


def row(imported: formats.Imported, net: Backbone) -> str:
    """What the table of docs/weights.md says of a file: whose, which network, what goes on, where it goes out to."""
    stem = imported.spec.get("stem", "imagenet")
    kind = type(net).__name__ + ("" if stem == "imagenet" else f", {stem} stem")
    onward = f"`method={imported.format.method}`" if imported.format.method else "its backbone"
    forms = {
        "timm": lambda: check_timm(net, imported.spec),
        "torchvision": lambda: to_torchvision(net),
        "detectron2": lambda: to_detectron2(net),
    }
    out = ", ".join(form for form, export in forms.items() if succeeds(export)) or "–"
    title = formats.PLAIN.title if isinstance(imported.format, Plain) else imported.format.title
    return f"| {title} | {kind} | yes | {onward} | {out} | to 1e-6 |"


def succeeds(export: Callable[[], object]) -> bool:
    try:
        export()
    except UserError:
        return False
    return True


def test_the_table_of_weights_names_every_format_and_no_other() -> None:
    told = set(re.findall(r"^\| ([^|]+ \([^|]+\)) \|.+\| to 1e-6 \|$", PAGE.read_text(), re.M))
    assert told == {format.title for format in (*formats.FORMATS, formats.PLAIN)} - {formats.SIMCLR_SUPERVISED.title}


# --- names as published, at their true sizes -------------------------------------------------------------------------


def blank(net: nn.Module, prefix: str = "") -> State:
    return under(prefix, net.state_dict())


def resnet50() -> ResNet:
    net = ResNet(Bottleneck, [3, 4, 6, 3])
    net.fc = nn.Identity()
    return net


def swav_head(c_in: int, hidden: int, dim: int) -> State:
    head = nn.Sequential(nn.Linear(c_in, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, dim))
    return under("projection_head.", head)


def pixpro_head(c_in: int, hidden: int, out: int) -> nn.ModuleDict:
    layers = {
        "linear1": nn.Conv2d(c_in, hidden, 1),
        "bn1": nn.BatchNorm2d(hidden),
        "linear2": nn.Conv2d(hidden, out, 1),
    }
    return nn.ModuleDict(layers)


def full_size(project: str) -> dict[str, Any]:
    net = resnet50()
    if project == "SwAV":
        return {**blank(net), **swav_head(2048, 2048, 128), "prototypes.weight": torch.empty(3000, 128)}
    if project == "PixPro":
        state = {
            **blank(net, "encoder."),
            **blank(net, "encoder_k."),
            **under("value_transform.", nn.Conv2d(256, 256, 1)),
        }
        return state | {
            name: value
            for part in ("projector.", "projector_k.")
            for name, value in under(part, pixpro_head(2048, 4096, 256)).items()
        }
    if project == "SparK":
        state = blank(net, "sparse_encoder.sp_cnn.")
        state |= {"imn_m": torch.empty(1, 3, 1, 1), "imn_s": torch.empty(1, 3, 1, 1)}
        state["norm_black"] = torch.empty(1, 3, 224, 224)
        for j in range(5):
            c, d = 512 // 2**j, 512 // 2 ** (j + 1)
            layers = (nn.Conv2d(c, c, 3, bias=False), nn.BatchNorm2d(c), nn.ReLU6())
            state |= under(f"dense_decoder.dec.{j}.up_sample.", nn.ConvTranspose2d(c, c, 4, 2, 1))
            last = nn.Sequential(*layers, nn.Conv2d(c, d, 3, bias=False), nn.BatchNorm2d(d))
            state |= under(f"dense_decoder.dec.{j}.conv.", last)
        state |= under("dense_decoder.proj.", nn.Conv2d(16, 3, 1))
        for i, c in enumerate((2048, 1024, 512, 256)):
            state |= under(f"densify_norms.{i}.", nn.BatchNorm2d(c)) | {f"mask_tokens.{i}": torch.empty(1, c, 1, 1)}
            state |= under(f"densify_projs.{i}.", nn.Conv2d(c, 512 // 2**i, 1 if i == 0 else 3))
        return state
    if project == "MAE":
        encoder = timm.create_model("vit_base_patch16_224", num_classes=0)
        decoder = timm.create_model("vit_base_patch16_224", embed_dim=512, depth=8, num_heads=16)
        state = {**blank(encoder), "mask_token": torch.empty(1, 1, 512), "decoder_pos_embed": torch.empty(1, 197, 512)}
        state |= blank(decoder.blocks, "decoder_blocks.") | blank(decoder.norm, "decoder_norm.")
        return state | under("decoder_embed.", nn.Linear(768, 512)) | under("decoder_pred.", nn.Linear(512, 768))
    if project == "DINO's ViT-S/8":
        return blank(timm.create_model("vit_small_patch8_224", num_classes=0))
    assert project == "MAE's ViT-H"
    return blank(timm.create_model("vit_huge_patch14_224", num_classes=0))


@pytest.mark.parametrize(
    ("project", "tensors", "backbone", "network"),
    [
        ("SwAV", 328, 318, "resnet50"),
        ("PixPro", 656, 318, "resnet50"),
        ("SparK", 425, 318, "resnet50"),
        ("MAE", 254, 150, "vit_base"),
        ("DINO's ViT-S/8", 150, 150, "vit_small_patch8_224"),
        ("MAE's ViT-H", 390, 390, "vit_huge_patch14_224"),
    ],
)
def test_published_sizes(project: str, tensors: int, backbone: int, network: str) -> None:
    with torch.device("meta"):
        state = full_size(project)
    assert len(state) == tensors
    found = formats.of(state)
    assert len(found.backbone) == backbone
    assert found.spec["name"].startswith(network)
    assert not found.told


# --- the optimiser ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["one group", "kernels first", "vectors first"])
def test_what_an_optimiser_keeps_is_told_by_its_shapes(order: str) -> None:
    net = resnet()
    head = nn.Linear(512, 16)
    prototypes = nn.Linear(16, 30, bias=False)
    state = {**net.state_dict(), **under("projection_head.", head), **under("prototypes.", prototypes)}
    names = [n for n, _ in net.named_parameters()] + [
        "projection_head.weight",
        "projection_head.bias",
        "prototypes.weight",
    ]
    parameters = [*net.parameters(), *head.parameters(), *prototypes.parameters()]
    pairs = list(zip(names, parameters, strict=True))
    kernels, vectors = [p for _, p in pairs if p.ndim > 1], [p for _, p in pairs if p.ndim == 1]
    groups = {"one group": [parameters], "kernels first": [kernels, vectors], "vectors first": [vectors, kernels]}
    kept = torch.optim.AdamW([{"params": group} for group in groups[order]])
    for i, p in enumerate(parameters):
        p.grad = torch.full_like(p, float(i + 1))
    kept.step()
    found = formats.of({"state_dict": state, "optimizer": kept.state_dict()}).slots
    assert len(found) == len(parameters)
    for i, name in enumerate(names):
        ours = f"backbone.{name}" if name in net.state_dict() else name.replace("projection_head.", "projector.0.")
        torch.testing.assert_close(found[ours]["exp_avg"], torch.full_like(parameters[i], 0.1 * (i + 1)))
    torn = kept.state_dict()
    del torn["param_groups"][0]["params"][0]
    assert formats.of({"state_dict": state, "optimizer": torn}).slots == {}


# --- files -----------------------------------------------------------------------------------------------------------


def test_tensorflow_wrote_it() -> None:
    """A checkpoint that TensorFlow 2.21 wrote, with names that share beginnings, and types of all kinds."""
    for path in (
        REAL,
        REAL.with_name(f"{REAL.name}.index"),
        REAL.with_name(f"{REAL.name}.data-00000-of-00001"),
        REAL.parent,
    ):
        assert prefix_of(path) == REAL
    found = read_bundle(REAL)
    assert len(found) == 46
    for i in range(40):
        np.testing.assert_array_equal(found[f"base_model/batch_normalization_{i}/gamma"], np.full(2, i, np.float32))
    np.testing.assert_array_equal(found["base_model/conv2d/kernel"], np.arange(36, dtype="f4").reshape(3, 3, 2, 2))
    assert (found["global_step"].dtype, int(found["global_step"])) == (np.int64, 250228)
    assert found["half"].dtype == np.float16
    np.testing.assert_array_equal(found["brain"], np.array([1.5, -2.25], np.float32))
    assert found["none"].shape == (0, 3)
    assert found["flags"].tolist() == [True, False]


def test_half_a_tensorflow_checkpoint(tmp_path: Path) -> None:
    index, data = (REAL.with_name(REAL.name + end).read_bytes() for end in (".index", ".data-00000-of-00001"))
    place, beside = tmp_path / "ckpt.index", tmp_path / "ckpt.data-00000-of-00001"
    place.write_bytes(index)
    with pytest.raises(UserError, match=r"needs 'ckpt\.data-00000-of-00001' beside it"):
        formats.read(tmp_path / "ckpt")
    beside.write_bytes(data[:-100])
    with pytest.raises(UserError, match="is cut off; copy it again"):
        formats.read(tmp_path / "ckpt")
    place.write_bytes(index[:-9])
    with pytest.raises(UserError, match="no index of a TensorFlow checkpoint, or it is cut off"):
        formats.read(tmp_path / "ckpt")
    place.write_bytes(index[:100] + b"\xff" * 60 + index[160:])
    with pytest.raises(UserError):
        formats.read(place)


class Code:
    """An object whose pickle runs code when it is read."""

    ran = False

    def __reduce__(self) -> Any:
        return (run, ())


def run() -> str:
    Code.ran = True
    return "made"


def test_code_in_a_file_runs_on_ones_word_alone(tmp_path: Path) -> None:
    state = tv_resnet().content
    torch.save({"state_dict": state, "hook": Code()}, tmp_path / "new.pth")
    torch.save({"state_dict": state, "hook": Code()}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps({"a": np.ones(3), "hook": Code()}))
    for file in ("new.pth", "old.pth"):
        with pytest.raises(
            UserError, match=r"more than tensors and numbers \(.*run\).* add trust=true if you know who"
        ):
            formats.read(tmp_path / file)
    with pytest.raises(UserError, match="no project known here"):
        formats.read(tmp_path / "plain.pkl")  # an array, and something that is not looked into
    assert not Code.ran
    for file in ("new.pth", "old.pth"):
        assert formats.read(tmp_path / file, trust=True).spec == {"name": "resnet18"}
    assert Code.ran


def test_safetensors_and_npz_are_read_by_what_they_are(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    published = tv_resnet()
    save_file(published.content, tmp_path / "a.bin")
    np.savez(tmp_path / "b.npz", **{name: value.numpy() for name, value in published.content.items()})
    (tmp_path / "b.npz").rename(tmp_path / "b.pth")
    for file in ("a.bin", "b.pth"):
        found = formats.read(tmp_path / file)
        assert all(
            torch.equal(found.backbone[name], value) for name, value in published.content.items() if "fc" not in name
        )


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_float32_and_is_told(kind: torch.dtype) -> None:
    half = {name: v.to(kind) if v.is_floating_point() else v for name, v in tv_resnet().content.items()}
    found = formats.of(half)
    assert found.told == [f"weights are stored in {str(kind).removeprefix('torch.')}; they become float32"]
    assert {v.dtype for v in found.backbone.values()} == {torch.float32, torch.int64}
    torch.testing.assert_close(found.backbone["conv1.weight"], half["conv1.weight"].float())


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "is empty; download it again"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 102400\n",
            "is the pointer that Git LFS leaves in place of a file of 102400 bytes; run `git lfs pull`",
        ),
        (b"\n  <!DOCTYPE html>\n<html><body>404", "is a web page and holds no weights"),
        (b"\xef\xbb\xbf<HTML>", "is a web page and holds no weights"),
        (b"\x89PNG\r\n\x1a\n", "as no file of weights does that is read here"),
        (b"PK\x03\x04rest", "is cut off or damaged"),
        (b"\x80\x02]", "cannot be read as a pickle of arrays"),
        ((1000).to_bytes(8, "little") + b'{"a":' + b" " * 1000, "cannot be read as safetensors"),
    ],
)
def test_what_is_no_file_of_weights(content: bytes, told: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        formats.read(path)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_half_a_file(tmp_path: Path) -> None:
    torch.save(tv_resnet().content, tmp_path / "whole.pth")
    text = (tmp_path / "whole.pth").read_bytes()
    for part in (len(text) // 2, len(text) - 10):
        (tmp_path / "half.pth").write_bytes(text[:part])
        with pytest.raises(UserError, match="is cut off or damaged"):
            formats.read(tmp_path / "half.pth")
    with pytest.raises(UserError, match=r"'.*none\.pth' does not exist; give safetensors"):
        formats.read(tmp_path / "none.pth")
    with pytest.raises(UserError, match="is a folder and no file of weights"):
        formats.read(tmp_path)


def half_of(published: Published, *without: str) -> dict[str, Any]:
    return {name: v for name, v in published.content.items() if not any(part in name for part in without)}


@pytest.mark.parametrize(
    ("content", "backbone", "told"),
    [
        (
            {"model.0.conv.weight": torch.ones(3), "model.1.bn.bias": torch.ones(3)}, None,
            "are those of no project known here; the nearest is weights alone .*layer1.0.conv1.weight is missing",
        ),
        (half_of(swav(), "layer1.0.conv1"), None, "the nearest is SwAV .*, of which layer1.0.conv1.weight is missing"),
        (half_of(swav(), "layer4"), None, "not hold a whole resnet18.* of 120 tensors"),
        (half_of(tv_resnet(), "layer3", "layer4"), None, "whole resnet18: of 120 tensors 60 are missing"),
        ({**swav().content, "module.x.weight": torch.ones(2)}, None, "holds 1 tensors that this network does not"),
        ({**PROJECTS["PixPro"]().content["model"], "module.x": torch.ones(2)}, None, "looks like PixPro .* 1 of its"),
        (tv_resnet().content, "resnet34", "not hold a whole resnet34: of 216 tensors 96 are missing"),
        (tv_resnet().content, "resnet43", "no backbone 'resnet43'.* Did you mean"),
        (timm.create_model("mobilenetv3_small_050").state_dict(), None, "name it as timm does: backbone=NAME"),
        ({"epoch": 3}, None, "there are no weights in it"),
    ],
)  # fmt: skip
def test_checkpoints_that_are_nobodys_or_not_whole(content: dict[str, Any], backbone: str | None, told: str) -> None:
    with pytest.raises(UserError, match=told) as error:
        formats.of(content, backbone=backbone)
    assert "\n" not in str(error.value)


# --- to begin from ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", ["", "authors:"])
def test_a_run_begins_from_a_file_of_others(words: str, tmp_path: Path) -> None:
    published = swav()
    source = write(published, tmp_path)
    net = create("resnet18", layers=[1, 1, 1, 1])
    start_from(net, f"{words}{source}")
    with torch.no_grad():
        torch.testing.assert_close(
            net.eval()(published.images), published.features(published.images), rtol=0, atol=1e-6
        )
    with pytest.raises(UserError, match="not hold a whole backbone as this run has it"):
        start_from(create("resnet18"), f"{words}{source}")


def test_a_run_begins_from_weights_whose_names_do_not_tell_the_network(tmp_path: Path) -> None:
    theirs = timm.create_model("mobilenetv3_small_050")
    torch.save({"state_dict": under("module.", theirs)}, tmp_path / "file")
    net = create("mobilenetv3_small_050")
    start_from(net, tmp_path / "file")
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in net.state_dict().items())
