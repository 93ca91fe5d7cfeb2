"""Files as other projects publish them, each with a network of torchvision or timm that was filled independently.

A builder gives the content of a file, small where the architecture allows it, and the network whose weights are in it.
Nothing here uses the converters: names are spelled out as the projects' documents and code have them.
"""

from __future__ import annotations

import argparse
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
import torchvision
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

State = dict[str, Tensor]


class Published(NamedTuple):
    """A file's content, the features of the network in it, images for it, and what else is known of it.

    ``left_out``: how many tensors have no place here. ``method``: that goes on from it. ``spec``: of the network.
    """

    content: dict[str, Any]
    features: Callable[[Tensor], Tensor]
    images: Tensor
    left_out: int = 0
    method: str | None = None
    backbone: str | None = None
    spec: Mapping[str, Any] = {}


# --- networks --------------------------------------------------------------------------------------------------------


def lively(net: nn.Module, *shape: int) -> nn.Module:
    """Every vector with some noise, BatchNorm with statistics of its own, in eval mode."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            if p.ndim <= 1 or not p.any():
                p.add_(0.2 * torch.randn(p.shape, generator=generator))
        for name, b in net.named_buffers():
            if name.endswith("running_mean"):
                b.copy_(0.3 * torch.randn(b.shape, generator=generator))
            elif name.endswith("running_var"):
                b.copy_(0.5 + torch.rand(b.shape, generator=generator))
    return net.eval()


def resnet(layers: Iterable[int] = (1, 1, 1, 1), block: Any = BasicBlock, *, cifar: int = 0) -> ResNet:
    """torchvision's, without classifier; ``cifar`` is the padding of a 3x3 stem, 0 for the usual one."""
    torch.manual_seed(0)
    net = ResNet(block, list(layers))
    net.fc = nn.Identity()
    if cifar:
        net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, padding=cifar, bias=False), nn.Identity()
    lively(net)
    return net


def vit(**options: Any) -> VisionTransformer:
    """A small transformer of timm for images of 32 pixels."""
    torch.manual_seed(0)
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 1, "num_classes": 0}
    net = VisionTransformer(**{**small, **options})
    lively(net)
    return net


def mlp(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(2)
    return lively(nn.Sequential(*layers))  # type: ignore[return-value]


def under(prefix: str, part: nn.Module | Mapping[str, Tensor]) -> State:
    state = part.state_dict() if isinstance(part, nn.Module) else part
    return {prefix + name: value for name, value in state.items()}


def images(size: int = 64) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(3))


def momentum(*networks: nn.Module) -> dict[str, Any]:
    """The state of torch's SGD after a step on all parameters, in one group."""
    parameters = [p for net in networks for p in net.parameters()]
    kept = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    for i, p in enumerate(parameters):
        kept.state[p]["momentum_buffer"] = torch.full_like(p, float(i))
    return kept.state_dict()


# --- authors ---------------------------------------------------------------------------------------------------------


def swav(optimizer: bool = False) -> Published:
    """A released file; or a training checkpoint, with the network in a part of its own, beside the optimiser."""
    net = resnet()
    head = mlp(nn.Linear(512, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 16))
    prototypes = nn.Linear(16, 30, bias=False)
    state = {**net.state_dict(), **under("projection_head.", head), **under("prototypes.", prototypes)}
    content = under("module.", state)
    if not optimizer:
        return Published(content, net, images(), method="swav")
    kept = momentum(net, head, prototypes)
    rest = {"epoch": 3, "optimizer": kept, "amp": {"loss_scaler0": {"loss_scale": 65536.0}}}
    return Published({"state_dict": content, **rest}, net, images(), len(kept["state"]), method="swav")


def deepclusterv2() -> Published:
    net = resnet()
    head = mlp(nn.Linear(512, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 16))
    heads = {f"prototypes.prototypes{i}.weight": torch.randn(30, 16) for i in range(3)}
    state = {**net.state_dict(), **under("projection_head.", head), **heads}
    return Published(under("module.", state), net, images(), method="deepclusterv2")


def pixpro() -> Published:
    net, slow = resnet(), resnet()

    def head(c_in: int, hidden: int, out: int) -> nn.Module:
        layers = {
            "linear1": nn.Conv2d(c_in, hidden, 1),
            "bn1": nn.BatchNorm2d(hidden),
            "linear2": nn.Conv2d(hidden, out, 1),
        }
        return lively(nn.ModuleDict(layers))

    state = {
        **under("encoder.", net), **under("projector.", head(512, 64, 16)),
        **under("encoder_k.", slow), **under("projector_k.", head(512, 64, 16)),
        **under("value_transform.", nn.Conv2d(16, 16, 1)),
    }  # fmt: skip
    return Published({"model": under("module.", state)}, net, images(), method="pixpro")


def supcon(gpus: int = 1) -> Published:
    net = resnet((2, 2, 2, 2), cifar=1)
    encoder = "encoder." if gpus == 1 else "encoder.module."
    state = {encoder + name.replace("downsample", "shortcut"): value for name, value in net.state_dict().items()}
    state |= under("head.", nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 128)))
    content = {"opt": argparse.Namespace(model="resnet18", temp=0.1), "model": state, "epoch": 1000}
    return Published(content, net, images(32), method="supcon", spec={"name": "resnet18", "stem": "cifar"})


def supce(classes: int = 10) -> Published:
    net = resnet((2, 2, 2, 2), cifar=1)
    state = under("encoder.", {n.replace("downsample", "shortcut"): v for n, v in net.state_dict().items()})
    state |= under("fc.", nn.Linear(512, classes))
    return Published({"opt": argparse.Namespace(), "model": under("module.", state)}, net, images(32), method="supce")


class Nin(nn.Module):
    """RotNet's: blocks of a large convolution and two of 1x1, pooled by 3 with stride 2 after the first two."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        widths = [(192, 160, 96), (192, 192, 192), *[(192, 192, 192)] * (blocks - 2)]
        c_in, self.units = 3, nn.ModuleList()
        for width, side in zip(widths, [5, 5, *[3] * (blocks - 2)], strict=True):
            for i, c in enumerate(width):
                kernel = side if i == 0 else 1
                conv = nn.Conv2d(c_in, c, kernel, padding=kernel // 2, bias=False)
                self.units.append(nn.ModuleDict({"Conv": conv, "BatchNorm": nn.BatchNorm2d(c)}))
                c_in = c
        self.blocks = blocks

    def forward(self, x: Tensor) -> Tensor:
        for j, unit in enumerate(self.units):
            x = F.relu(unit["BatchNorm"](unit["Conv"](x)))  # type: ignore[index]
            if j == 2:
                x = F.max_pool2d(x, 3, 2, 1)
            elif j == 5:
                x = F.avg_pool2d(x, 3, 2, 1)
        return x.mean((2, 3))


def rotnet_nin() -> Published:
    torch.manual_seed(0)
    net = lively(Nin())
    state = {}
    for j, unit in enumerate(net.units):  # type: ignore[arg-type]
        state |= under(f"_feature_blocks.{j // 3}.Block{j // 3 + 1}_ConvB{j % 3 + 1}.layers.", unit)
    state |= under("_feature_blocks.3.Classifier.", nn.Linear(192, 4))
    state = {name: value for name, value in state.items() if "num_batches" not in name}  # written by torch 0.2
    return Published({"epoch": 200, "network": state}, net, images(32), method="rotation", spec={"name": "nin3"})


class AlexNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        shapes = [(3, 64, 11, 4, 2), (64, 192, 5, 1, 2), (192, 384, 3, 1, 1), (384, 256, 3, 1, 1), (256, 256, 3, 1, 1)]
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, k, s, padding=p), nn.BatchNorm2d(b)) for a, b, k, s, p in shapes
        )

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = F.relu(layer(x))
            if i in (0, 1, 4):
                x = F.max_pool2d(x, 3, 2)
        return x.mean((2, 3))


def rotnet_alexnet() -> Published:
    torch.manual_seed(0)
    net = lively(AlexNet())
    state: State = {}
    for place, layer in zip((0, 2, 4, 5, 6), net.layers, strict=True):  # type: ignore[arg-type]
        state |= under(f"_feature_blocks.{place}.", layer)
    for place, (c_in, c_out) in ((1, (9216, 4096)), (4, (4096, 4096))):
        state |= under(f"_feature_blocks.8.{place}.", nn.Linear(c_in, c_out, bias=False))
        state |= under(f"_feature_blocks.8.{place + 1}.", nn.BatchNorm1d(c_out))
    state |= under("_feature_blocks.9.0.", nn.Linear(4096, 4))
    return Published({"network": state}, net, images(96), method="rotation", spec={"name": "alexnet_rotnet"})


def rotnet_alexnet_by_vissl() -> Published:
    found = rotnet_alexnet()
    return found._replace(content={"model_state_dict": under("trunk.base_model.", found.content["network"])})


def official_convnext(net: nn.Module) -> State:
    """A ConvNeXt of timm under the names of facebookresearch/ConvNeXt, without norm and classifier, as SparK has it."""
    pairs = [("stem.", "downsample_layers.0.")]
    pairs += [(f"stages.{i}.downsample.", f"downsample_layers.{i}.") for i in (1, 2, 3)]
    named = {}
    for name, value in net.state_dict().items():
        new = name.replace(".blocks.", ".").replace(".conv_dw.", ".dwconv.")
        new = new.replace(".mlp.fc1.", ".pwconv1.").replace(".mlp.fc2.", ".pwconv2.")
        for ours, theirs in pairs:
            if new.startswith(ours):
                new = theirs + new.removeprefix(ours)
        if not new.startswith("head."):
            named[new] = value
    return named


def convnext() -> nn.Module:
    """timm's smallest with linear layers, and a norm after pooling that is as it was made."""
    torch.manual_seed(0)
    net = lively(timm.create_model("convnext_atto", num_classes=0, conv_mlp=False))
    nn.init.ones_(net.head.norm.weight)  # type: ignore[union-attr, arg-type]
    nn.init.zeros_(net.head.norm.bias)  # type: ignore[union-attr, arg-type]
    return net


def spark_encoder() -> Published:
    net = resnet((3, 4, 6, 3), Bottleneck)
    return Published({"module": dict(net.state_dict())}, net, images(), spec={"name": "resnet50"})


def spark_encoder_convnext() -> Published:
    torch.manual_seed(0)
    net = torchvision.models.convnext_tiny()
    lively(net)
    state: State = {}
    for name, value in net.features.state_dict().items():
        stage, rest = int(name.split(".")[0]), name.partition(".")[2]
        if stage == 0:
            state[f"downsample_layers.0.{rest}"] = value
        elif stage % 2 == 0:
            state[f"downsample_layers.{stage // 2}.{rest}"] = value
        else:
            for theirs, official in (
                ("block.0.", "dwconv."), ("block.2.", "norm."), ("block.3.", "pwconv1."), ("block.5.", "pwconv2."),
                ("layer_scale", "gamma"),
            ):  # fmt: skip
                rest = rest.replace(theirs, official)
            state[f"stages.{stage // 2}.{rest}"] = value.flatten() if rest.endswith("gamma") else value

    def features(x: Tensor) -> Tensor:
        return F.layer_norm(net.features(x).mean((2, 3)), (768,), eps=1e-6)

    return Published(state, features, images(), spec={"name": "convnext_tiny"})


def spark(net: nn.Module, named: State, channels: tuple[int, ...], norm: Callable[[int], nn.Module]) -> Published:
    """The whole model of SparK: encoder, decoder, densify layers, tokens, and what the authors' class keeps besides."""
    width = 32
    state = {"imn_m": torch.full((1, 3, 1, 1), torch.nan), "imn_s": torch.zeros(1, 3, 1, 1)}
    state |= {"norm_black": torch.zeros(1, 3, 64, 64), **under("sparse_encoder.sp_cnn.", named)}
    for j in range(5):
        c_in, c_out = width // 2**j, width // 2 ** (j + 1)
        state |= under(f"dense_decoder.dec.{j}.up_sample.", nn.ConvTranspose2d(c_in, c_in, 4, 2, 1))
        layers = (nn.Conv2d(c_in, c_in, 3, bias=False), nn.BatchNorm2d(c_in), nn.ReLU6())
        last = (nn.Conv2d(c_in, c_out, 3, bias=False), nn.BatchNorm2d(c_out))
        state |= under(f"dense_decoder.dec.{j}.conv.", nn.Sequential(*layers, *last))
    state |= under("dense_decoder.proj.", nn.Conv2d(1, 3, 1))
    for i, c in enumerate(reversed(channels)):
        state |= under(f"densify_norms.{i}.", norm(c))
        state |= {f"mask_tokens.{i}": torch.randn(1, c, 1, 1)}
        state |= under(f"densify_projs.{i}.", nn.Conv2d(c, width // 2**i, 1 if i == 0 else 3))
    content = {
        "module": state,
        "epoch": 5,
        "optimizer": {"state": {}, "param_groups": []},
        "arch": "x",
        "is_pretrain": True,
    }
    return Published(content, net, images(), left_out=3, method="spark")


def spark_full() -> Published:
    net = resnet((2, 2, 2, 2))
    return spark(net, dict(net.state_dict()), (64, 128, 256, 512), nn.BatchNorm2d)


def spark_full_convnext() -> Published:
    net = convnext()
    return spark(net, official_convnext(net), (40, 80, 160, 320), nn.LayerNorm)


def simmatchv2() -> Published:
    net, C, N, K, D = resnet(), 10, 20, 32, 128
    labels = F.one_hot(torch.arange(N) % C, C).float()
    state = {
        "l_bank": F.normalize(torch.randn(N, D)), "l_labels": labels, "ptr": torch.tensor([8]),
        "u_bank": F.normalize(torch.randn(K, D)), "u_labels": torch.cat([torch.rand(8, C), torch.zeros(K - 8, C)]),
        "da": torch.full((1, C), 1 / C),
    }  # fmt: skip
    for network in ("main.", "ema."):
        state |= under(f"{network}backbone.", net) | under(f"{network}fc.", nn.Linear(512, C))
        state |= under(f"{network}head.", nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, D)))
        state |= under(f"{network}norm.", nn.LayerNorm(512))
    content = {"epoch": 7, "best_acc1": torch.tensor(71.9), "arch": "resnet50", "state_dict": under("module.", state)}
    return Published(content, net, images(), left_out=1, method="simmatchv2")


def same(x: Tensor, left: int, right: int, value: float = 0.0) -> Tensor:
    return F.pad(x, (left, right, left, right), value=value)


class SameResNet(ResNet):
    """A basic ResNet whose first blocks all have projections, and which pads as TensorFlow does: BYOL's and SimCLR's.

    SimCLR's convolutions are padded evenly; only its pooling is not (``even``).
    """

    def __init__(self, even: bool) -> None:
        super().__init__(BasicBlock, [2, 2, 2, 2])
        self.fc, self.even = nn.Identity(), even
        self.layer1[0].downsample = nn.Sequential(nn.Conv2d(64, 64, 1, bias=False), nn.BatchNorm2d(64))

    def forward(self, x: Tensor) -> Tensor:
        if self.even:
            x = F.relu(self.bn1(self.conv1(x)))
        else:
            x = F.relu(self.bn1(F.conv2d(same(x, 2, 3), self.conv1.weight, stride=2)))
        x = F.max_pool2d(same(x, 0, 1, -torch.inf), 3, 2)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in stage:
                shortcut = x if block.downsample is None else block.downsample(x)
                conv = block.conv1
                if conv.stride == (2, 2) and not self.even:
                    out = F.conv2d(same(x, 0, 1), conv.weight, stride=2)
                else:
                    out = conv(x)
                x = F.relu(block.bn2(block.conv2(F.relu(block.bn1(out)))) + shortcut)
        return x.mean((2, 3))


def same_resnet(even: bool) -> SameResNet:
    torch.manual_seed(0)
    net = SameResNet(even)
    lively(net)
    return net


def simclr(momentum: bool = True) -> Published:
    """Variables of the authors' TensorFlow 1 code by name, with the slots of their optimiser; numbered as created."""
    net = same_resnet(even=True)
    order = ["", *(f"layer{i}.{j}." for i in (1, 2, 3, 4) for j in (0, 1))]
    convs, norms = [], []
    for place in order:
        found = dict(net.named_modules())
        for part in ("downsample.0", "conv1", "conv2"):
            if place + part in found:
                convs.append(found[place + part])
        for part in ("downsample.1", "bn1", "bn2"):
            if place + part in found:
                norms.append(found[place + part])
    variables: dict[str, np.ndarray] = {}

    def numbered(scope: str, i: int) -> str:
        return f"base_model/{scope}{f'_{i}' if i else ''}"

    def norm(scope: str, m: Any) -> None:
        for theirs, ours in (
            ("gamma", m.weight), ("beta", m.bias), ("moving_mean", m.running_mean), ("moving_variance", m.running_var)
        ):  # fmt: skip
            if ours is not None:
                variables[f"{scope}/{theirs}"] = ours.detach().numpy()

    for i, conv in enumerate(convs):
        variables[f"{numbered('conv2d', i)}/kernel"] = conv.weight.detach().permute(2, 3, 1, 0).numpy()
    for i, m in enumerate(norms):
        norm(numbered("batch_normalization", i), m)
    for j, (c_in, c_out) in enumerate([(512, 512), (512, 512), (512, 128)]):
        variables[f"head_contrastive/nl_{j}/dense/kernel"] = (
            np.random.default_rng(j).normal(size=(c_in, c_out)).astype("f4")
        )
        m: Any = lively(nn.BatchNorm1d(c_out))
        if j == 2:
            m.bias = None
        norm(f"head_contrastive/nl_{j}/batch_normalization", m)
    variables["head_supervised/linear_layer/dense/kernel"] = (
        np.random.default_rng(9).normal(size=(512, 10)).astype("f4")
    )
    variables["head_supervised/linear_layer/dense/bias"] = np.zeros(10, np.float32)
    trained = [name for name in variables if "moving" not in name]
    slots = {f"{name}/Momentum": np.ones_like(variables[name]) for name in trained} if momentum else {}
    content = {**variables, **slots, "global_step": np.array(250228, np.int64)}
    return Published(
        content, net, images(), left_out=len(slots) + 1, method="simclrv2", spec={"name": "simclr_resnet18"}
    )


class ByolState(NamedTuple):
    """Stands for the authors' class, whose module nobody here has."""

    online_params: Any
    target_params: Any
    online_state: Any
    target_state: Any
    opt_state: Any


def byol() -> Published:
    net, C = same_resnet(even=False), 7
    rng = np.random.default_rng(0)
    parameters: dict[str, Any] = {}
    state: dict[str, Any] = {}

    def norm(module: str, m: Any, ndim: int) -> None:
        shape = (*[1] * (ndim - 1), -1)
        parameters[module] = {
            "scale": m.weight.detach().numpy().reshape(shape), "offset": m.bias.detach().numpy().reshape(shape)
        }  # fmt: skip
        for kind, value in (("mean_ema", m.running_mean), ("var_ema", m.running_var)):
            average = value.numpy().reshape(shape)
            state[f"{module}/~/{kind}"] = {"average": average, "hidden": average / 2, "counter": np.array(3, np.int32)}

    def conv(module: str, m: Any) -> None:
        parameters[module] = {"w": m.weight.detach().permute(2, 3, 1, 0).numpy()}

    conv("res_net18/~/initial_conv", net.conv1)
    norm("res_net18/~/initial_batchnorm", net.bn1, 4)
    for k in range(4):
        for j, block in enumerate(getattr(net, f"layer{k + 1}")):
            scope = f"res_net18/~/block_group_{k}/~/block_{j}/~/"
            if block.downsample is not None:
                conv(f"{scope}shortcut_conv", block.downsample[0])
                norm(f"{scope}shortcut_batchnorm", block.downsample[1], 4)
            for i in (0, 1):
                conv(f"{scope}conv_{i}", getattr(block, f"conv{i + 1}"))
                norm(f"{scope}batchnorm_{i}", getattr(block, f"bn{i + 1}"), 4)
    for head, c_in in (("projector", 512), ("predictor", 16)):
        parameters[f"{head}/linear"] = {
            "w": rng.normal(size=(c_in, 32)).astype("f4"), "b": rng.normal(size=32).astype("f4")
        }  # fmt: skip
        norm(f"{head}/batch_norm", lively(nn.BatchNorm1d(32)), 2)
        parameters[f"{head}/linear_1"] = {"w": rng.normal(size=(32, 16)).astype("f4")}
    parameters["classifier"] = {"w": rng.normal(size=(512, C)).astype("f4"), "b": np.zeros(C, np.float32)}
    experiment = ByolState(parameters, parameters, state, state, ({"trace": {"classifier": {"b": np.zeros(C)}}},))
    content = {"experiment_state": experiment, "step": np.int64(5), "rng": np.zeros(2, np.uint32)}
    # classifiers, the target's predictor with its averages, what averages are made of, optimiser, generator
    left_out = 4 + 5 + 2 * 2 * 2 * 22 + 2 + 1 + 1
    return Published(content, net, images(), left_out, method="byol", spec={"name": "byol_resnet18"})


def mocov3() -> Published:
    net = resnet()
    head = mlp(nn.Linear(512, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 16, bias=False))
    head.append(nn.BatchNorm1d(16, affine=False))
    predictor = mlp(nn.Linear(16, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 16, bias=False))
    state = {**under("base_encoder.", net), **under("base_encoder.fc.", head)}
    state |= {
        **under("momentum_encoder.", net),
        **under("momentum_encoder.fc.", head),
        **under("predictor.", predictor),
    }
    content = {"epoch": 300, "arch": "resnet50", "state_dict": under("module.", state), "scaler": {"scale": 65536.0}}
    return Published(content, net, images(), method="mocov3")


def mocov3_vit() -> Published:
    """The small transformer, whose twelve heads no shape tells."""
    net = vit(patch_size=16, embed_dim=384, depth=12, num_heads=12)

    def batch_norm(last: bool) -> nn.Module:
        return nn.BatchNorm1d(16, affine=False) if last else nn.BatchNorm1d(16)

    def head(dims: list[int]) -> nn.Sequential:
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(pairwise(dims)):
            last = i == len(dims) - 2
            layers += [nn.Linear(a, b, bias=False), batch_norm(last), *([] if last else [nn.ReLU()])]
        return nn.Sequential(*layers)

    state = {**under("base_encoder.", net), **under("base_encoder.head.", head([384, 16, 16, 16]))}
    state |= {**under("momentum_encoder.", net), **under("momentum_encoder.head.", head([384, 16, 16, 16]))}
    state |= under("predictor.", head([16, 16, 16]))
    return Published({"epoch": 300, "state_dict": under("module.", state)}, net, images(32), method="mocov3")


def simsiam() -> Published:
    net, d = resnet(), 512
    projector = mlp(
        nn.Linear(d, d, bias=False), nn.BatchNorm1d(d), nn.ReLU(), nn.Linear(d, d, bias=False), nn.BatchNorm1d(d),
        nn.ReLU(), nn.Linear(d, 64), nn.BatchNorm1d(64, affine=False),
    )  # fmt: skip
    predictor = mlp(nn.Linear(64, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 64))
    state = {**under("encoder.", net), **under("encoder.fc.", projector), **under("predictor.", predictor)}
    kept = momentum(net, projector, predictor)
    content = {"epoch": 100, "arch": "resnet50", "state_dict": under("module.", state), "optimizer": kept}
    return Published(content, net, images(), left_out=len(kept["state"]), method="simsiam")


def expander(bias: bool) -> nn.Sequential:
    return mlp(
        nn.Linear(512, 32, bias=bias), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32, bias=bias), nn.BatchNorm1d(32),
        nn.ReLU(), nn.Linear(32, 32, bias=False),
    )  # fmt: skip


def vicreg() -> Published:
    net = resnet()
    state = {**under("backbone.", net), **under("projector.", expander(bias=True))}
    return Published({"epoch": 9, "model": under("module.", state)}, net, images(), method="vicreg")


def barlow() -> Published:
    net = resnet()
    state = {**under("backbone.", net), **under("projector.", expander(bias=False))}
    state |= under("bn.", nn.BatchNorm1d(32, affine=False))
    return Published({"epoch": 9, "model": under("module.", state)}, net, images(), method="barlow")


def lejepa() -> Published:
    net = vit(num_classes=24)
    head = net.head
    layers = [nn.Linear(24, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.0)]
    layers += [nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.0), nn.Linear(32, 16), nn.Dropout(0.0)]
    state = {**under("backbone.", net), **under("proj.", mlp(*layers))}

    def features(x: Tensor) -> Tensor:
        return net.forward_head(net.forward_features(x), pre_logits=True)

    assert isinstance(head, nn.Linear)
    return Published(state, features, images(32), method="lejepa")


def dino_backbone() -> Published:
    net = vit()
    return Published(dict(net.state_dict()), net, images(32))


def dino() -> Published:
    """Student and teacher; the backbone that counts is the teacher's."""
    student, teacher = vit(), vit()
    with torch.no_grad():
        student.cls_token.add_(1.0)
    layers = [nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 16)]

    def head() -> State:
        return {
            **under("mlp.", mlp(*layers)),
            "last_layer.weight_g": torch.ones(40, 1), "last_layer.weight_v": torch.randn(40, 16),
        }  # fmt: skip

    content = {
        "student": {**under("module.backbone.", student), **under("module.head.", head())},
        "teacher": {**under("backbone.", teacher), **under("head.", head())},
        "epoch": 100, "args": argparse.Namespace(arch="vit_small"), "dino_loss": OrderedDict(center=torch.randn(1, 40)),
        "fp16_scaler": {"scale": 65536.0},
    }  # fmt: skip
    return Published(content, teacher, images(32), method="dino")


def mae_encoder() -> Published:
    net = vit()
    return Published({"model": dict(net.state_dict())}, net, images(32))


def mae() -> Published:
    net, decoder = vit(), vit(embed_dim=32, depth=1, num_heads=2)
    state = {**net.state_dict(), "mask_token": torch.randn(1, 1, 32), "decoder_pos_embed": torch.randn(1, 17, 32)}
    state |= under("decoder_blocks.", decoder.blocks) | under("decoder_norm.", decoder.norm)
    state |= under("decoder_embed.", nn.Linear(64, 32)) | under("decoder_pred.", nn.Linear(32, 8 * 8 * 3))
    content = {"model": state, "epoch": 799, "args": argparse.Namespace(model="mae"), "scaler": {}}
    return Published(content, net, images(32), method="mae")


def mae_finetuned() -> Published:
    net = vit(global_pool="avg")
    return Published({"model": {**net.state_dict(), **under("head.", nn.Linear(64, 10))}}, net, images(32), left_out=2)


# --- libraries -------------------------------------------------------------------------------------------------------


def lightly_sequential() -> Published:
    """As its tutorials have it: the children of torchvision's network in a row."""
    net = resnet()
    backbone = nn.Sequential(*list(net.children())[:-1])
    head = {f"projection_head.layers.{i}.weight": torch.randn(4, 4) for i in (0, 3)}
    return Published({"state_dict": {**under("backbone.", backbone), **head}}, net, images(), left_out=2)


def lightly_dino() -> Published:
    """As its benchmarks have it: ``backbone`` is the teacher."""
    net, other = resnet(), resnet()
    state = {**under("backbone.", net), **under("student_backbone.", other)}
    state |= {f"{who}projection_head.layers.0.weight": torch.randn(4, 4) for who in ("", "student_")}
    state |= {"criterion.center.center": torch.zeros(1, 4), **under("online_classifier.linear.", nn.Linear(512, 10))}
    content = {"state_dict": state, "epoch": 9, "pytorch-lightning_version": "2.5.0", "optimizer_states": []}
    return Published(content, net, images(), left_out=len(other.state_dict()) + 2 + 1 + 2)


def solo_learn(cifar: bool = False) -> Published:
    net = resnet((2, 2, 2, 2), cifar=2 if cifar else 0)
    state = {**under("backbone.", net), **under("classifier.", nn.Linear(512, 10))}
    state |= under("projector.", nn.Sequential(nn.Linear(512, 32), nn.ReLU(), nn.Linear(32, 16)))
    state |= {**under("momentum_backbone.", net), "queue": torch.randn(2, 16, 8), "queue_ptr": torch.zeros(1)}
    left = 2 + 4 + len(net.state_dict()) + 2
    spec = {"name": "resnet18", "stem": "cifar_pad2"} if cifar else {"name": "resnet18"}
    content = {"state_dict": state, "epoch": 400, "optimizer_states": [], "lr_schedulers": []}
    return Published(content, net, images(32 if cifar else 64), left, spec=spec)


def vissl() -> Published:
    net = resnet()
    model = {"trunk": under("_feature_blocks.", net), "heads": under("0.clf.0.", nn.Linear(512, 4))}
    inner = {"base_model": {"model": model, "meta": {}}, "loss": {"info": 1}, "optimizer": {"optim": {}}}
    content = {"phase_idx": 9, "iteration": 100, "classy_state_dict": inner, "type": "consolidated"}
    return Published(content, net, images(), left_out=2)


def vissl_vit() -> Published:
    net = vit()
    inner = {"base_model": {"model": {"trunk": dict(net.state_dict()), "heads": under("0.clf.0.", nn.Linear(64, 4))}}}
    return Published({"classy_state_dict": inner}, net, images(32), left_out=2)


def mmpretrain() -> Published:
    net = resnet()
    neck = under("neck.", {"fc0.weight": torch.randn(4, 4), "bn0.running_mean": torch.zeros(4)})
    state = {**under("backbone.", net), **neck, "data_preprocessor.mean": torch.zeros(3, 1, 1)}
    return Published({"meta": {"epoch": 9}, "state_dict": state, "message_hub": {}}, net, images(), left_out=3)


def mmpretrain_vit() -> Published:
    net, state = vit(), {}
    for name, value in net.state_dict().items():
        for ours, theirs in (
            ("patch_embed.proj.", "patch_embed.projection."), ("blocks.", "layers."), (".norm1.", ".ln1."),
            (".norm2.", ".ln2."), (".mlp.fc1.", ".ffn.layers.0.0."), (".mlp.fc2.", ".ffn.layers.1."),
        ):  # fmt: skip
            name = name.replace(ours, theirs)
        state["ln1." + name.removeprefix("norm.") if name.startswith("norm.") else name] = value
    state = {**under("backbone.", state), **under("head.layers.head.", nn.Linear(64, 10))}
    return Published({"state_dict": state}, net, images(32), left_out=2)


def mmpretrain_convnext() -> Published:
    net, state = convnext(), {}
    for name, value in official_convnext(net).items():
        state[name.replace(".dwconv.", ".depthwise_conv.").replace(".pwconv", ".pointwise_conv")] = value
    state |= under("norm3.", net.head.norm)  # type: ignore[union-attr, arg-type]
    state = {**under("backbone.", state), **under("head.fc.", nn.Linear(320, 10))}
    return Published({"state_dict": state}, net, images(), left_out=2)


# --- weights alone ---------------------------------------------------------------------------------------------------


def without(net: nn.Module, classifier: str) -> Callable[[Tensor], Tensor]:
    """Features of a network of torchvision: what its classifier is given."""
    setattr(net, classifier, nn.Identity())
    return net


def tv_resnet() -> Published:
    torch.manual_seed(0)
    net = torchvision.models.resnet18()
    lively(net)
    content = dict(net.state_dict())
    return Published(content, without(net, "fc"), images(), left_out=2, spec={"name": "resnet18"})


def tv_resnext() -> Published:
    torch.manual_seed(0)
    net = torchvision.models.resnext50_32x4d()
    lively(net)
    content = dict(net.state_dict())
    return Published(content, without(net, "fc"), images(), left_out=2, spec={"name": "resnext50_32x4d"})


def tv_convnext() -> Published:
    torch.manual_seed(0)
    net = torchvision.models.convnext_tiny()
    lively(net)
    content = dict(net.state_dict())
    net.classifier[2] = nn.Identity()
    return Published(content, net, images(), left_out=2, spec={"name": "convnext_tiny"})


def tv_vit() -> Published:
    torch.manual_seed(0)
    net = torchvision.models.VisionTransformer(32, 8, 2, 1, 64, 256, num_classes=10)
    lively(net)
    content = dict(net.state_dict())
    return Published(content, without(net, "heads"), images(32), left_out=2)


def timm_vit() -> Published:
    net = vit(num_classes=10)
    content = dict(net.state_dict())
    return Published(content, without(net, "head"), images(32), left_out=2)


def timm_efficientnet() -> Published:
    """A network of a family that names do not tell: it has to be named."""
    torch.manual_seed(0)
    net = timm.create_model("efficientnet_b0")
    lively(net)
    content = {"arch": "efficientnet_b0", "epoch": 9, "state_dict": dict(net.state_dict())}
    content["state_dict_ema"] = dict(net.state_dict())
    left = 2 + len(net.state_dict())
    return Published(content, without(net, "classifier"), images(), left, backbone="efficientnet_b0")


def wrapped(prefix: str) -> Callable[[], Published]:
    def build() -> Published:
        found = tv_resnet()
        return found._replace(content={"state_dict": under(prefix, found.content), "best": 0.7})

    return build


def moco() -> Published:
    """MoCo's first versions: query, key, queue."""
    found = tv_resnet()
    state = {**under("encoder_q.", found.content), **under("encoder_k.", found.content)}
    state |= {"queue": torch.randn(128, 64), "queue_ptr": torch.zeros(1, dtype=torch.long)}
    content = {"epoch": 200, "arch": "resnet18", "state_dict": under("module.", state)}
    return found._replace(content=content, left_out=2 + len(found.content) + 2)


#: format (as `Format.name` begins): builders of its files
PROJECTS: dict[str, Callable[[], Published]] = {
    "SimCLR": simclr,
    "SwAV": swav,
    "SwAV training": lambda: swav(optimizer=True),
    "DeepCluster-v2": deepclusterv2,
    "PixPro": pixpro,
    "SupCon": supcon,
    "SupCon on several GPUs": lambda: supcon(2),
    "SupCE": supce,
    "RotNet's NIN": rotnet_nin,
    "RotNet's AlexNet": rotnet_alexnet,
    "RotNet's AlexNet by VISSL": rotnet_alexnet_by_vissl,
    "SparK": spark_full,
    "SparK ConvNeXt": spark_full_convnext,
    "SimMatchV2": simmatchv2,
    "BYOL": byol,
    "MoCo v3": mocov3,
    "MoCo v3 ViT": mocov3_vit,
    "SimSiam": simsiam,
    "VICReg": vicreg,
    "Barlow Twins": barlow,
    "LeJEPA": lejepa,
    "DINO": dino,
    "MAE": mae,
    "lightly": lightly_sequential,
    "lightly DINO": lightly_dino,
    "solo-learn": solo_learn,
    "solo-learn CIFAR": lambda: solo_learn(True),
    "VISSL": vissl,
    "VISSL ViT": vissl_vit,
    "mmpretrain": mmpretrain,
    "mmpretrain ViT": mmpretrain_vit,
    "mmpretrain ConvNeXt": mmpretrain_convnext,
    "weights alone": tv_resnet,
    "weights alone: ResNeXt": tv_resnext,
    "weights alone: torchvision's ConvNeXt": tv_convnext,
    "weights alone: torchvision's ViT": tv_vit,
    "weights alone: timm's ViT": timm_vit,
    "weights alone: timm, named": timm_efficientnet,
    "weights alone: SparK's encoder": spark_encoder,
    "weights alone: SparK's ConvNeXt": spark_encoder_convnext,
    "weights alone: DINO's backbone": dino_backbone,
    "weights alone: MAE's encoder": mae_encoder,
    "weights alone: MAE's fine-tuned": mae_finetuned,
    "weights alone: DDP": wrapped("module."),
    "weights alone: compiled": wrapped("_orig_mod."),
    "weights alone: both": wrapped("module._orig_mod."),
    "weights alone: model.": wrapped("model."),
    "weights alone under 'encoder.'": wrapped("encoder."),
    "weights alone under 'backbone.'": wrapped("module.backbone."),
    "weights alone under 'encoder_q.'": moco,
}


# --- writing ---------------------------------------------------------------------------------------------------------


def write(published: Published, folder: Path) -> Path:
    """The content as its project writes it: TensorFlow's files, a pickle, or PyTorch's."""
    if all(isinstance(value, np.ndarray) for value in published.content.values()):
        return write_bundle(published.content, folder / "model.ckpt-250228")
    path = folder / "file"
    if published.method == "byol":
        write_foreign_pickle(published.content, path)
    else:
        torch.save(published.content, path)
    return path


def write_foreign_pickle(content: Mapping[str, Any], path: Path) -> None:
    """A pickle whose named tuple is of a module that is not here when it is read."""
    import pickle

    text = pickle.dumps(content, protocol=2)
    here = ByolState.__module__.encode()
    assert here in text
    path.write_bytes(text.replace(b"c" + here + b"\n", b"cbyol.byol_experiment\n"))


def varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
    return out + bytes([value])


def write_bundle(variables: Mapping[str, np.ndarray], prefix: Path) -> Path:
    """A TensorFlow checkpoint: data in one file, and a sorted table of protocol buffers as index."""
    kinds = {"float32": 1, "float64": 2, "int32": 3, "int64": 9, "bool": 10, "float16": 19}
    data, entries = b"", [(b"", b"\x08\x01\x1a\x02\x08\x01")]
    for name, value in sorted(variables.items()):
        raw = np.ascontiguousarray(value).tobytes()
        dims = b"".join(b"\x12" + varint(len(d)) + d for d in (b"\x08" + varint(n) for n in value.shape))
        entry = b"\x08" + varint(kinds[value.dtype.name]) + b"\x12" + varint(len(dims)) + dims
        entry += b"\x20" + varint(len(data)) + b"\x28" + varint(len(raw)) + b"\x35" + b"\0\0\0\0"
        entries.append((name.encode(), entry))
        data += raw
    content, places = b"", []

    def block(items: list[tuple[bytes, bytes]]) -> bytes:
        body = b"".join(b"\0" + varint(len(k)) + varint(len(v)) + k + v for k, v in items)
        return body + struct.pack("<II", 0, 1)

    for start in range(0, len(entries), 50):
        part = block(entries[start : start + 50])
        places.append((entries[min(start + 49, len(entries) - 1)][0], varint(len(content)) + varint(len(part))))
        content += part + b"\0\0\0\0\0"
    meta, empty = len(content), block([])
    content += empty + b"\0\0\0\0\0"
    index, at = block(places), len(content)
    content += index + b"\0\0\0\0\0"
    footer = varint(meta) + varint(len(empty)) + varint(at) + varint(len(index))
    prefix.with_name(f"{prefix.name}.index").write_bytes(
        content + footer.ljust(40, b"\0") + bytes.fromhex("57fb808b247547db")
    )
    prefix.with_name(f"{prefix.name}.data-00000-of-00001").write_bytes(data)
    return prefix
