"""The memory order of kernels: channels last, but for the layers that a CPU's library computes wrongly in it."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)
#: input channels of oneDNN's widest block of numbers (AVX-512; AVX2 has 8)
BLOCK = 16


def to_channels_last(network: Network, device: torch.device) -> Network:
    """Bring all kernels into channels-last order, in place; on a CPU, narrow strided 1x1 convolutions stay as they are.

    oneDNN's weight gradient of a 1x1 convolution that has a stride and fewer input channels than a block, on
    channels-last tensors, writes past its workspace (uxlfoundation/oneDNN, issue 6035; torch 2.15 on AVX2 with fewer
    than 8): wrong gradients without a word, or a process that ends with "double free or corruption". These few layers
    get their input in the usual order.
    """
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.dim() == 4:  # `Module.to` stumbles over kernels of three dimensions
            tensor.data = tensor.data.to(memory_format=torch.channels_last)
    for layer in network.modules() if device.type == "cpu" else ():
        if isinstance(layer, nn.Conv2d) and _is_affected(layer):
            # clone, as the order of a 1x1 kernel or image is ambiguous and `contiguous` leaves it
            layer.weight.data = layer.weight.data.clone(memory_format=torch.contiguous_format)
            layer.register_forward_pre_hook(_in_usual_order)
    return network


def _is_affected(layer: nn.Conv2d) -> bool:
    return layer.kernel_size == (1, 1) and layer.stride != (1, 1) and layer.in_channels // layer.groups < BLOCK


def _in_usual_order(layer: nn.Module, args: tuple[Any, ...]) -> Tensor:
    x: Tensor = args[0]
    return x.clone(memory_format=torch.contiguous_format)
