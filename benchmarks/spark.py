"""SparK: time of a training step, hidden cells skipped against computed and erased.

The peer is the way of the authors' code (keyu-tian/SparK, pretrain/encoder.py), written anew here: each layer enlarges
the mask for itself and multiplies by it, and each norm collects the visible positions by index, normalises them as rows
and writes them back. Both sides share weights, images and masks; their losses are compared before anything is timed.

    python benchmarks/spark.py --backbone resnet50 --batch 8 --size 224
"""

from __future__ import annotations

import argparse
import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from turns import Comparison, compare

from selfsight.backbones.registry import create
from selfsight.losses.spark import masked_patch_loss
from selfsight.methods.spark import SparK


class Holder:
    """Where the peer keeps its current mask."""

    active: Tensor

    def at(self, h: int, w: int) -> Tensor:
        f_h, f_w = self.active.shape[2:]
        return self.active.repeat_interleave(h // f_h, dim=2).repeat_interleave(w // f_w, dim=3)


class PeerConv(nn.Conv2d):
    holder: Holder

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x * self.holder.at(x.shape[2], x.shape[3])


class PeerPool(nn.MaxPool2d):
    holder: Holder

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x * self.holder.at(x.shape[2], x.shape[3])


class PeerBatchNorm(nn.BatchNorm1d):
    holder: Holder

    def forward(self, x: Tensor) -> Tensor:
        where = self.holder.at(x.shape[2], x.shape[3]).squeeze(1).nonzero(as_tuple=True)
        last = x.permute(0, 2, 3, 1)
        rows = super().forward(last[where])
        out = torch.zeros_like(last)
        out[where] = rows
        return out.permute(0, 3, 1, 2)


class PeerLayerNorm(nn.LayerNorm):
    holder: Holder
    first: bool

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4:
            return super().forward(x)
        last = x.permute(0, 2, 3, 1) if self.first else x
        where = self.holder.at(last.shape[1], last.shape[2]).squeeze(1).nonzero(as_tuple=True)
        rows = super().forward(last[where])
        out = torch.zeros_like(last)
        out[where] = rows
        return out.permute(0, 3, 1, 2) if self.first else out


def as_peer(model: nn.Module, holder: Holder) -> None:
    kinds: list[tuple[type, type]] = [
        (nn.Conv2d, PeerConv),
        (nn.MaxPool2d, PeerPool),
        (nn.BatchNorm2d, PeerBatchNorm),
        (nn.LayerNorm, PeerLayerNorm),
    ]
    for module in model.modules():
        for dense, peer in kinds:
            if isinstance(module, dense):
                module.first = "2d" in type(module).__name__
                module.__class__ = peer
                module.holder = holder


class Peer(nn.Module):
    """The authors' way through the same parts as ``method``."""

    def __init__(self, backbone: nn.Module, method: SparK) -> None:
        super().__init__()
        self.backbone, self.holder = backbone, Holder()
        self.levels = method.encoder.levels
        self.tokens, self.projections = copy.deepcopy(method.mask_tokens), copy.deepcopy(method.densify_projs)
        self.decoder = copy.deepcopy(method.dense_decoder).to(memory_format=torch.contiguous_format)
        for module in self.decoder.modules():
            if type(module).__name__ == "MaskedBatchNorm2d":
                module.__class__ = nn.BatchNorm2d
        norms = []
        for norm, level in zip(method.densify_norms, self.levels, strict=True):
            if type(norm).__name__ == "ChannelNorm":
                peer: Any = PeerLayerNorm(level.channels, eps=1e-6)
                peer.first = True
            else:
                peer = PeerBatchNorm(level.channels)
            peer.holder = self.holder
            norms.append(peer)
        self.norms = nn.ModuleList(norms)
        self.maps: dict[str, Tensor] = {}
        for level in self.levels:
            if level.module is not None:
                name = level.module
                backbone.get_submodule(name).register_forward_hook(
                    lambda m, a, output, name=name: self.maps.__setitem__(name, output)
                )
        as_peer(backbone, self.holder)

    def encode(self, x: Tensor, active: Tensor) -> list[Tensor]:
        self.holder.active = active
        deepest = self.backbone.forward_features(x * self.holder.at(*x.shape[2:]))
        return [deepest if level.module is None else self.maps[level.module] for level in self.levels]

    def decode(self, maps: list[Tensor]) -> Tensor:
        inputs = []
        for z, norm, token, projection in zip(maps, self.norms, self.tokens, self.projections, strict=True):
            z = torch.where(self.holder.at(*z.shape[2:]), norm(z), token.expand_as(z))
            inputs.append(projection(z))
        return self.decoder(inputs)


def spark(backbone: nn.Module, ratio: float, width: int, engine: Any, decoder_precision: Any = "auto") -> SparK:
    return SparK(
        backbone,
        mask_ratio=ratio,
        decoder_width=width,
        densify_norm="auto",
        levels=4,
        normalise_pixels=True,
        decoder_precision=decoder_precision,
        engine=engine,
        sync_batchnorm=False,
    ).train()


def losses_of_both(name: str, batch: int, size: int, ratio: float, width: int) -> tuple[Tensor, Tensor]:
    """The loss of random images, packed and in the authors' way, with the same weights and masks."""
    plain = create(name)
    method = spark(copy.deepcopy(plain), ratio, width, "packed")
    peer = Peer(plain, method).train()
    x = torch.randn(batch, method.encoder.in_channels, size, size)
    active = method.draw_mask(x).active
    ours = masked_patch_loss(method.reconstruct(x, active).image, x, active)
    return ours, masked_patch_loss(peer.decode(peer.encode(x, active)), x, active)


def run(name: str, stem: str, batch: int, size: int, ratio: float, width: int, rounds: int) -> list[Comparison]:
    """Encoder and whole step, both ways: ours packed and dense; the step with decoder or all of it in bfloat16, too."""
    torch.manual_seed(0)
    plain = create(name, stem=stem)
    with torch.no_grad():  # zero-initialised branches would cost less
        for p in plain.parameters():
            if p.ndim == 1 and not p.any():
                p.fill_(0.2)
    dense = spark(copy.deepcopy(plain), ratio, width, "dense")
    packed = spark(copy.deepcopy(plain), ratio, width, "packed")
    half = spark(copy.deepcopy(plain), ratio, width, "packed", "bf16")
    for method in (dense, half):
        method.load_state_dict(packed.state_dict())
    peer = Peer(plain, packed).train()
    x = torch.randn(batch, packed.encoder.in_channels, size, size)
    active = packed.draw_mask(x).active

    def encode(method: SparK) -> None:
        maps = method.encoder(x, method.encoder.mask(active))
        sum(m.square().sum() for m in maps).backward()
        method.zero_grad()

    def encode_peer() -> None:
        sum(m.square().sum() for m in peer.encode(x, active)).backward()
        peer.zero_grad()

    def step(method: SparK, autocast: bool = False) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = masked_patch_loss(method.reconstruct(x, active).image, x, active)
        loss.backward()
        method.zero_grad()
        return loss.detach()

    def step_peer() -> Tensor:
        loss = masked_patch_loss(peer.decode(peer.encode(x, active)), x, active)
        loss.backward()
        peer.zero_grad()
        return loss.detach()

    def losses_differ(method: SparK, by: float, autocast: bool = False) -> str:
        ours, theirs = step(method, autocast).item(), step_peer().item()
        assert abs(ours / theirs - 1) < by, f"the loss is {ours}, not {theirs}"
        return f"losses {ours:.6f} and {theirs:.6f}; {name}, {batch} images of {size} pixels, mask ratio {ratio:g}"

    exact = losses_differ(packed, 1e-4)
    options: dict[str, Any] = {"items": 1, "unit": "s", "rounds": rounds}
    return [
        compare("spark_encoder", partial(encode, packed), encode_peer, check=exact, target=2.5, **options),
        compare(
            "spark_encoder_dense", partial(encode, dense), encode_peer, check=losses_differ(dense, 1e-4), **options
        ),
        compare("spark_step", partial(step, packed), step_peer, check=exact, target=1.4, **options),
        compare(
            "spark_step_bf16_decoder", partial(step, half), step_peer, check=losses_differ(half, 1e-2), target=3.0,
            **options,
        ),
        compare(
            "spark_step_bf16", partial(step, packed, autocast=True), step_peer, target=3.0,
            check=losses_differ(packed, 1e-2, autocast=True), **options,
        ),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--stem", default="imagenet")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--ratio", type=float, default=0.6)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    for one in run(a.backbone, a.stem, a.batch, a.size, a.ratio, a.width, a.rounds):
        print(f"{one.name:<24} {one.ours:.3f} s, peer {one.peer:.3f} s, {one.ratio:.2f} x   {one.check}")


if __name__ == "__main__":
    main()
