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

from selfsight.nn.distributed import sum_over_ranks, world_size


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
        n = len(x) * world_size()
        mean = sum_over_ranks(x.sum(0)) / n  # [C]
        variance = sum_over_ranks((x - mean).square().sum(0)) / n
        if self.track_running_stats:
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)  # type: ignore[union-attr, arg-type]
                self.running_var.lerp_(variance * n / (n - 1), self.momentum)  # type: ignore[union-attr, arg-type]
                self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        y = (x - mean) * (variance + self.eps).rsqrt()
        return y * self.weight + self.bias if self.affine else y


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
