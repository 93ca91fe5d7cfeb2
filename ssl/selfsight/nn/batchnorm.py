"""BatchNorm whose running variance is the batch's own, as in code written for TPUs.

PyTorch multiplies the batch variance by n / (n - 1) before averaging it; google-research/simclr (resnet.py, its
cross-replica layer) and others do not. Outputs in training agree; running statistics differ where n is small. With
``trainer.sync_batchnorm`` PyTorch's synchronised layer takes their place, whose n is the count over all devices.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


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
