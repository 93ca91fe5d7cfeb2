"""BatchNorm as PyTorch does not have it: another running variance, statistics of all processes, statistics that rest.

PyTorch multiplies the batch variance by n / (n - 1) before averaging it; google-research/simclr (resnet.py, its
cross-replica layer) and other code written for TPUs does not. Outputs in training agree; running statistics differ
where n is small. With ``trainer.sync_batchnorm`` PyTorch's synchronised layer takes their place, whose n is the count
over all devices.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from selfsight.nn.distributed import all_reduce_sum, sum_over_ranks, world_size


class _BiasedRunningVariance(_BatchNorm):
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        n = x.numel() // x.shape[1]
        biased, m = (n - 1) / n, self.momentum
        averaged = self.running_var.clone()  # autograd keeps this one, so that the buffer may change before backward
        cudnn = torch.backends.cudnn.enabled
        # not F.batch_norm, which refuses a single value per channel: its variance is 0 and the output the shift
        y = torch.batch_norm(x, self.weight, self.bias, self.running_mean, averaged, True, m, self.eps, cudnn)
        with torch.no_grad():
            self.running_var.mul_((1 - biased) * (1 - m))
            if n > 1:
                self.running_var.add_(averaged, alpha=biased)
            self.num_batches_tracked.add_(1)
        return y


class BiasedBatchNorm1d(_BiasedRunningVariance, nn.BatchNorm1d):
    """`nn.BatchNorm1d`, ``[B, C]`` or ``[B, C, L]``, with the biased variance in its running statistics."""


class BiasedBatchNorm2d(_BiasedRunningVariance, nn.BatchNorm2d):
    """`nn.BatchNorm2d`, ``[B, C, H, W]``, with the biased variance in its running statistics."""


class SharedBatchNorm1d(nn.BatchNorm1d):
    """`nn.BatchNorm1d` on ``[B, C]`` whose statistics are those of the rows of all processes, on every device.

    For layers that belong to a loss, where statistics of one process would make another loss of it. Each process holds
    equally many rows. With ``trainer.sync_batchnorm`` PyTorch's layer for GPUs takes its place.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(x)
        self._check_input_dim(x)
        return normalized_over_all(self, x)


class ReducedBatchNorm(_BatchNorm):
    """BatchNorm over the images of all processes by ``all_reduce``: for CPUs, where PyTorch has no synchronised one.

    Outputs, gradients and running statistics are those of one process that holds the whole batch; processes may hold
    different numbers of images.
    """

    def __init__(self, norm: _BatchNorm) -> None:
        """In the place of ``norm``, whose parameters and statistics it uses; timm's norms bring an activation."""
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        for name in (*norm._parameters, *norm._buffers):
            setattr(self, name, getattr(norm, name))
        self.biased = isinstance(norm, _BiasedRunningVariance)
        self.drop, self.act = getattr(norm, "drop", nn.Identity()), getattr(norm, "act", nn.Identity())
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        if self.training or self.running_mean is None:
            y = normalized_over_all(self, x, biased=self.biased)
        else:
            y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        activated: Tensor = self.act(self.drop(y))
        return activated


def normalized_over_all(norm: _BatchNorm, x: Tensor, *, biased: bool = False) -> Tensor:
    """``x [B, C, ...]`` normalised by the statistics of all processes, which go into the running ones of ``norm``.

    Args:
        biased: the running variance gets the variance of the batch as it is, not times n / (n - 1).
    """
    wide = x if x.dtype == torch.float64 else x.float()
    places, shape = [0, *range(2, x.dim())], [1, -1, *[1] * (x.dim() - 2)]
    n = all_reduce_sum(torch.tensor(float(x.numel() // x.shape[1]), dtype=wide.dtype, device=x.device))
    mean = sum_over_ranks(wide.sum(places)) / n  # [C]
    centred = wide - mean.view(shape)
    variance = sum_over_ranks(centred.square().sum(places)) / n
    if norm.training and norm.running_mean is not None and norm.running_var is not None:
        with torch.no_grad():
            assert norm.num_batches_tracked is not None
            norm.num_batches_tracked.add_(1)
            share = norm.momentum if norm.momentum is not None else 1 / float(norm.num_batches_tracked)
            norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), share)
            spread = variance if biased else variance * n / (n - 1).clamp(min=1)
            norm.running_var.lerp_(spread.to(norm.running_var.dtype), share)
    y = centred * (variance + norm.eps).rsqrt().view(shape)
    if norm.affine:
        y = y * norm.weight.view(shape) + norm.bias.view(shape)
    return y.to(x.dtype)


@contextmanager
def frozen_statistics(network: nn.Module) -> Iterator[None]:
    """BatchNorm normalises by the batch, but its running statistics stay as they are."""
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def moved_by_layers(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What PyTorch's layers move when they are called: running statistics and their counter."""
    names = ("running_mean", "running_var", "num_batches_tracked")
    return ((name, value) for name, value in network.named_buffers() if name.rpartition(".")[2] in names)


@contextmanager
def restored_statistics(network: nn.Module) -> Iterator[None]:
    """Running statistics are afterwards what they were before, and so is their counter."""
    before = [(value, value.clone()) for _, value in moved_by_layers(network)]
    try:
        yield
    finally:
        with torch.no_grad():
            for value, kept in before:
                value.copy_(kept)
