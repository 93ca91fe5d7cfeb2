"""The numbers of the SparK authors' code (pretrain/ and downstream_imagenet/ of keyu-tian/SparK)."""

from __future__ import annotations

from typing import Any

import numpy as np
import timm
import torch
from timm.models.convnext import ConvNeXt, ConvNeXtBlock
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn

from selfsight.checkpoints import spark as checkpoints
from selfsight.losses import mixing
from selfsight.losses.spark import fill_hidden, masked_patch_loss, patch_statistics, patchify, unpatchify
from selfsight.methods.spark import SparK
from selfsight.nn.light_decoder import LightDecoder
from selfsight.nn.sparse.encoder import Engine
from selfsight.nn.sparse.layers import Mask, MaskedBatchNorm2d, MaskScope, convert, visible_cells, visible_count

from .harness import Case, family

TOLERANCE = 1e-9


def active_positions(case: Case, x: Tensor, name: str = "active") -> np.ndarray:
    """Where gradients of ``x`` (``[B, C, h, w]``) are defined: visible positions."""
    mask = Mask(case.tensor(name)).at(x.shape[2], x.shape[3])
    return mask.expand_as(x).numpy()


@family("spark", "mask_")
def mask(case: Case) -> None:
    noise = case.tensor("noise", None)
    side = case.number("input_size") // case.number("downsample_ratio")
    keep = visible_count(side * side, case.number("mask_ratio"))
    generator = torch.Generator().manual_seed(case.number("torch_seed"))
    assert torch.equal(torch.rand(noise.shape, generator=generator), noise)
    drawn = Mask(visible_cells(noise, (side, side), keep))
    case.compare("len_keep", keep, 0)
    case.compare("active", drawn.active, 0)
    case.compare("counts", drawn.active.sum((1, 2, 3)), 0)
    for name in case.out:
        if name.startswith("up"):
            size = side * int(name[2:])
            case.compare(name, drawn.at(size, size), 0)


@family("spark", "len_keep_table")
def len_keep(case: Case) -> None:
    sizes, ratios = case.inp["sizes"].tolist(), case.number("ratios")
    case.compare("len_keep", np.array([[visible_count(h * w, r) for r in ratios] for h, w in sizes]), 0)


def run_layer(case: Case, layer: nn.Module, *, channels_last: bool = False) -> tuple[Tensor, Tensor, nn.Module]:
    """Convert ``layer``, run it forwards and backwards; returns y, dx and the converted layer."""
    wrapper = nn.Sequential(layer).double()
    scope = MaskScope()
    convert(wrapper, scope)
    x = case.tensor("x", requires_grad=True)
    inside = x.permute(0, 2, 3, 1) if channels_last else x
    with scope.hiding(Mask(case.tensor("active"))):
        y = wrapper(inside)
    y.backward(case.tensor("g"))
    assert x.grad is not None
    return y, x.grad, wrapper[0]


@family("spark", "spconv_")
def convolution(case: Case) -> None:
    weight = case.tensor("weight")
    geometry = {k: case.number(k) for k in ("stride", "padding", "dilation", "groups")}
    c_in, bias = weight.shape[1] * geometry["groups"], "bias" in case.inp
    conv = nn.Conv2d(c_in, len(weight), tuple(weight.shape[2:]), bias=bias, **geometry)
    conv.load_state_dict({k: case.tensor(k) for k in ("weight", "bias") if k in case.inp})
    y, dx, layer = run_layer(case, conv)
    case.compare("y", y, TOLERANCE)
    case.compare("dx", dx, TOLERANCE, where=active_positions(case, dx))
    for name, parameter in layer.named_parameters():
        case.compare(f"d_{name}", parameter.grad, TOLERANCE)


@family("spark", "sppool_")
def pooling(case: Case) -> None:
    geometry = {k: case.number(k) for k in ("kernel_size", "stride", "padding", "ceil_mode")}
    if case.number("is_max"):
        pool: nn.Module = nn.MaxPool2d(**geometry)
    else:
        pool = nn.AvgPool2d(**geometry, count_include_pad=case.number("count_include_pad"))
    y, dx, _ = run_layer(case, pool)
    case.compare("y", y, TOLERANCE)
    case.compare("dx", dx, TOLERANCE, where=active_positions(case, dx))


@family("spark", "spbn_")
def batch_norm(case: Case) -> None:
    momentum = case.number("momentum")
    norm = nn.BatchNorm2d(
        len(case.inp["weight"]), eps=case.number("eps"), momentum=None if momentum < 0 else momentum
    ).double()
    state = {k: case.tensor(k) for k in ("weight", "bias", "running_mean", "running_var")}
    norm.load_state_dict({**state, "num_batches_tracked": torch.tensor(0)})
    norm.train(case.number("train"))
    MaskedBatchNorm2d.convert(norm, None, False)
    for step in range(case.number("steps")):
        norm.zero_grad()
        x = case.tensor(f"x{step}", requires_grad=True)
        y = norm(x, Mask(case.tensor(f"active{step}")))
        y.backward(case.tensor(f"g{step}"))
        assert x.grad is not None
        got = {"y": y, "d_weight": norm.weight.grad, "d_bias": norm.bias.grad}
        got |= {k: getattr(norm, k) for k in ("running_mean", "running_var", "num_batches_tracked")}
        for name, value in got.items():
            case.compare(f"{name}{step}", value, TOLERANCE)
        # hidden positions included: garbage there has no influence, so no gradient
        case.compare(f"dx{step}", x.grad, TOLERANCE)


@family("spark", "spln_")
def layer_norm(case: Case) -> None:
    from timm.layers import LayerNorm2d

    channels, eps = len(case.inp["weight"]), case.number("eps")
    last = "_last_" in case.name
    norm: nn.Module = nn.LayerNorm(channels, eps=eps) if last else LayerNorm2d(channels, eps=eps)
    norm.load_state_dict({k: case.tensor(k) for k in ("weight", "bias")})
    if case.name.endswith("_dense"):
        x = case.tensor("x", requires_grad=True)
        y = norm.double()(x)
        y.backward(case.tensor("g"))
        assert x.grad is not None
        dx = x.grad
    else:
        wrapper, scope = nn.Sequential(norm).double(), MaskScope()
        convert(wrapper, scope)
        x = case.tensor("x", requires_grad=True)
        with scope.hiding(Mask(case.tensor("active"))):
            y = wrapper(x)
        y.backward(case.tensor("g"))
        assert x.grad is not None
        dx = x.grad
    case.compare("y", y, TOLERANCE)
    case.compare("dx", dx, TOLERANCE)
    for name, parameter in norm.named_parameters():
        case.compare(f"d_{name}", parameter.grad, TOLERANCE)


@family("spark", "spcnxblock_")
def convnext_block(case: Case) -> None:
    names = {n: checkpoints.convnext_to_timm(f"stages.0.0.{n}").removeprefix("stages.0.blocks.0.") for n in case.inp}
    parameters = {n: case.tensor(n) for n in case.inp if n not in ("x", "active", "g")}
    block = ConvNeXtBlock(case.inp["x"].shape[1], ls_init_value=1e-6 if "gamma" in parameters else None)
    block.load_state_dict({names[n]: v for n, v in parameters.items()})
    y, dx, layer = run_layer(case, block)
    case.compare("y", y, TOLERANCE)
    case.compare("dx", dx, TOLERANCE, where=active_positions(case, dx))
    for name in parameters:
        case.compare(f"d_{name}", layer.get_parameter(names[name]).grad, TOLERANCE)


@family("spark", "patchify_")
def patches(case: Case) -> None:
    x, p = case.tensor("x"), case.number("p")
    vectors = patchify(x, p)
    case.compare("patches", vectors, 0)
    assert torch.equal(unpatchify(vectors, (case.number("h"), case.number("w")), p), x)


@family("spark", "loss_")
def loss(case: Case) -> None:
    x, active, p = case.tensor("x"), case.tensor("active"), case.number("p")
    reconstruction = case.tensor("rec", requires_grad=True)
    value = masked_patch_loss(reconstruction, x, active)
    (gradient,) = torch.autograd.grad(value, reconstruction)
    case.compare("loss", value, TOLERANCE)
    case.compare("d_rec", gradient, TOLERANCE)
    vectors = patchify(x, p)
    mean, std = patch_statistics(vectors)
    case.compare("patch_mean", mean, TOLERANCE)
    case.compare("patch_std", std, TOLERANCE)
    case.compare("target_patches", (vectors - mean) / std, TOLERANCE)
    masked = x * Mask(active).at(*x.shape[2:], x.dtype)
    case.compare("masked_input", masked, TOLERANCE)
    case.compare("vis_masked", masked, TOLERANCE)
    case.compare("vis_rec_or_inp", fill_hidden(reconstruction, x, active), TOLERANCE)


def load(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Strictly, but for BatchNorm's counters, which the recorded states leave out."""
    missing, unexpected = module.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert all(name.endswith("num_batches_tracked") for name in missing), missing


def compare_norms(case: Case, parameters: dict[str, Tensor], tolerance: float) -> None:
    names = case.out["gradnorm_names"].tolist()
    assert set(names) == set(parameters)
    case.compare("gradnorm_names", np.array(names), 0)
    case.compare("gradnorm_values", torch.stack([parameters[n].norm() for n in names]), tolerance, scale="each")


@family("spark", "decoder_")
def decoder(case: Case) -> None:
    ratio = case.number("up_sample_ratio")
    model = LightDecoder(case.number("width"), ratio).double()
    load(model, case.tensors("state."))
    model.train(case.number("train"))
    inputs = {int(k): v.requires_grad_() for k, v in case.tensors("to_dec").items()}
    image = model([inputs.get(i) for i in range(max(inputs) + 1)])
    image.backward(case.tensor("g"))
    case.compare("rec", image, TOLERANCE)
    for i, x in inputs.items():
        case.compare(f"d_to_dec{i}", x.grad, TOLERANCE)
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    compare_norms(case, gradients, TOLERANCE)
    buffers = dict(model.named_buffers())
    for name in case.out:
        if name.startswith("buf."):
            case.compare(name, buffers[name[4:]], TOLERANCE)


class SmallResNet(nn.Module):
    """A ResNet with the sizes of a recorded state dict and timm's interface; one stride-2 stage after another."""

    def __init__(self, state: dict[str, Tensor], image_stride: int) -> None:
        super().__init__()
        c, _, k, _ = state["conv1.weight"].shape
        stem_stride = 2 if k == 7 else 1
        self.conv1 = nn.Conv2d(3, c, k, stem_stride, k // 2, bias=False)
        self.bn1, self.act1 = nn.BatchNorm2d(c), nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if k == 7 else nn.Identity()
        stages = sorted({n.split(".")[0] for n in state if n.startswith("layer")})
        block: Any = Bottleneck if "layer1.0.conv3.weight" in state else BasicBlock
        total = 4 if k == 7 else 1
        self.feature_info = []
        for i, name in enumerate(stages):
            depth = len({n.split(".")[1] for n in state if n.startswith(f"{name}.")})
            planes = len(state[f"{name}.0.conv1.weight"])
            stride = 1 if i == 0 or total == image_stride else 2
            blocks = []
            for j in range(depth):
                shortcut = None
                if f"{name}.{j}.downsample.0.weight" in state:
                    out = planes * block.expansion
                    shortcut = nn.Sequential(nn.Conv2d(c, out, 1, stride, bias=False), nn.BatchNorm2d(out))
                blocks.append(block(c, planes, stride if j == 0 else 1, shortcut))
                c = planes * block.expansion
            total *= stride
            setattr(self, name, nn.Sequential(*blocks))
            self.feature_info.append({"num_chs": c, "reduction": total, "module": name})
        self.stages, self.num_features = stages, c

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.act1(self.bn1(self.conv1(x))))
        for name in self.stages:
            x = self.get_submodule(name)(x)
        return x


def small_convnext(state: dict[str, Tensor]) -> nn.Module:
    depths = [len({n.split(".")[2] for n in state if n.startswith(f"stages.{i}.")}) for i in range(4)]
    dims = [len(state[f"stages.{i}.0.dwconv.bias"]) for i in range(4)]
    scale = 1e-6 if "stages.0.0.gamma" in state else None
    return ConvNeXt(depths=depths, dims=dims, ls_init_value=scale, num_classes=0)


def small_model(case: Case, engine: Engine) -> SparK:
    """The recorded model, its state loaded through the public converter."""
    state = case.tensors("state.")
    encoder = {n.removeprefix(checkpoints.ENCODER): v for n, v in state.items() if n.startswith(checkpoints.ENCODER)}
    ratio = case.number("downsample_ratio")
    backbone = small_convnext(encoder) if "stages.0.0.dwconv.weight" in encoder else SmallResNet(encoder, ratio)
    method = SparK(
        backbone,
        mask_ratio=case.number("mask_ratio"),
        decoder_width=case.number("decoder_width"),
        densify_norm=case.number("densify_norm"),
        levels=sum(n.startswith("mask_tokens.") for n in state),
        normalise_pixels=True,
        decoder_precision="auto",
        engine=engine,
        sync_batchnorm=True,
    ).double()
    converted = checkpoints.method_state(state)
    missing, unexpected = method.load_state_dict(converted, strict=False)
    assert not unexpected, unexpected
    assert all("num_batches_tracked" in n or n.startswith("backbone.head.") for n in missing), missing
    return method.train(case.number("train"))


def check_model(case: Case, engine: Engine) -> None:
    method = small_model(case, engine)
    assert method.encoder.packs == (engine == "packed")
    x, active = case.tensor("x"), case.tensor("active")
    result = method.reconstruct(x, active)
    value = masked_patch_loss(result.image, x, active)
    value.backward()
    case.compare("loss", value, 1e-10)
    case.compare("rec", result.image, 2e-6)
    maps = [result.mask.dense(m) for m in result.maps if m is not None]
    inputs = [d for d in result.decoder_inputs if d is not None]
    for i, (feature, to_decoder) in enumerate(zip(reversed(maps), inputs, strict=True)):
        for name, tensor in ((f"feat{i}", feature), (f"to_dec{i}", to_decoder)):
            if name in case.out:
                case.compare(name, tensor, TOLERANCE)
            else:
                case.compare(name[:-1] + f"norm{i}", tensor.norm(), TOLERANCE)
    if "vis_rec_or_inp" in case.out:
        case.compare("vis_rec_or_inp", fill_hidden(result.image, x, active), 2e-6)

    ours = {n: p.grad for n, p in method.named_parameters() if p.grad is not None}
    gradients = checkpoints.official_state(ours, x.shape[-1])
    gradients = {n: g for n, g in gradients.items() if n not in checkpoints.DEAD}
    compare_norms(case, gradients, 1e-8)
    buffers = checkpoints.official_state(dict(method.named_buffers()), x.shape[-1])
    for name in case.out:
        if name.startswith("grad."):
            case.compare(name, gradients[name[5:]], 1e-8)
        elif name.startswith("buf."):
            case.compare(name, buffers[name[4:]], TOLERANCE)


@family("spark", "spark_")
def whole_model(case: Case) -> None:
    check_model(case, "dense")
    check_model(case, "packed")


@family("spark", "ftmix_")
def mixed(case: Case) -> None:
    smoothing, classes = case.number("label_smoothing"), case.number("num_classes")
    images, labels = mixing.even_batch(case.tensor("x"), case.tensor("y"))
    case.compare("raw_target", labels, 0)
    weight = case.number("lam")
    if "bbox_yl_yh_xl_xh" in case.inp:
        images, weight = mixing.cutmix(images, tuple(case.inp["bbox_yl_yh_xl_xh"].tolist()))
        case.compare("lam_corrected", weight, TOLERANCE)
    else:
        images = mixing.mixup(images, weight)
    case.compare("x", images, TOLERANCE)
    targets = mixing.mixed_targets(labels, classes, weight, smoothing, torch.float64)
    logits = case.tensor("logits")
    case.compare("target", targets, 1e-6)
    case.compare("bce", mixing.soft_binary_cross_entropy(logits, targets), 1e-6)
    case.compare("soft_ce", mixing.soft_cross_entropy(logits, targets), 1e-6)


@family("spark", "map_convnext")
def names(case: Case) -> None:
    official = case.inp["official"].tolist()
    shapes = [tuple(map(int, s.split("x"))) for s in case.inp["official_shape"].tolist()]
    state = {n: torch.empty(s, device="meta") for n, s in zip(official, shapes, strict=True)}
    case.compare("timm", np.array([checkpoints.convnext_to_timm(n) for n in official]), 0)
    there = checkpoints.convnext_state_to_torchvision(state)
    case.compare("torchvision", np.array(list(there)), 0)
    case.compare("torchvision_shape", np.array([shape_of(v) for v in there.values()]), 0)


def shape_of(x: Tensor) -> str:
    return "x".join(str(n) for n in x.shape)


@family("spark", "ckpt_", slow=True)
def checkpoint(case: Case) -> None:
    with torch.device("meta"):
        backbone = timm.create_model(case.name.removeprefix("ckpt_"), num_classes=0)
        method = SparK(
            backbone,
            mask_ratio=0.6,
            decoder_width=768,
            densify_norm="auto",
            levels=4,
            normalise_pixels=True,
            decoder_precision="auto",
            engine="dense",
            sync_batchnorm=True,
        )
    for prefix, state in (
        ("encoder", checkpoints.official_encoder_state(backbone.state_dict())),
        ("spark", checkpoints.official_state(method.state_dict(), image_size=224)),
    ):
        case.compare(f"{prefix}_keys", np.array(list(state)), 0)
        case.compare(f"{prefix}_shapes", np.array([shape_of(v) for v in state.values()]), 0)
    # and back: everything the file holds finds its place
    method.load_state_dict(checkpoints.method_state(state))

    decay = {id(p): 0.0 if group["plain"] else 1.0 for group in method.param_groups() for p in group["params"]}
    trained = {n: p for n, p in method.named_parameters() if not n.startswith("backbone.head.")}
    parameters = {n: p for n, p in checkpoints.official_state(trained, 224).items() if n not in checkpoints.DEAD}
    case.compare("param_names", np.array(list(parameters)), 0)
    case.compare("param_wd_mult", np.array([decay[id(p)] for p in parameters.values()]), 0)
    parts = [
        sum(p.numel() for n, p in parameters.items() if n.startswith(prefix))
        for prefix in (checkpoints.ENCODER, "dense_decoder.", "densify_projs.", "mask_tokens.")
    ]
    case.compare("num_params_encoder_decoder_densify_tokens", np.array(parts), 0)
