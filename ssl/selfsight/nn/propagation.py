"""The pixel propagation module of PixPro."""

from __future__ import annotations

from torch import Tensor, nn

from selfsight.errors import UserError
from selfsight.nn.heads import mlp, pointwise_conv
from selfsight.nn.precision import full_precision
from selfsight.nn.sphere import normalise


class PixelPropagation(nn.Module):
    """Every pixel becomes a sum over all pixels of its map, weighted by similarity.

    ``y_i = sum_j s_ij g_j``,  ``s_ij = max(u_i . u_j, clamp)^exponent``,  u the unit vectors of x, g those of its
    transform. The pixel itself is among the j; there is no softmax and no residual (Xie et al. 2021, equation 3;
    authors' contrast/models/PixPro.py, which also normalises g).

    Args:
        dim: C, channels of x and y.
        exponent, clamp: p and the smallest similarity; below an exponent of 1, 1e-6 is added to keep the slope finite.
        layers: of the value transform: 0 is none, 1 a 1x1 convolution, 2 two with BatchNorm and ReLU between.
        normalise_value: False takes g as the transform gives it, as the paper's equation reads.
    """

    def __init__(self, dim: int, *, exponent: float, clamp: float, layers: int, normalise_value: bool = True) -> None:
        super().__init__()
        if layers not in (0, 1, 2):
            raise UserError(f"PixPro's transform_layers is {layers}; it is 0, 1 or 2 (the authors' recipe takes 1).")
        if clamp < 0 and exponent % 1:
            raise UserError(
                f"PixPro was given clamp {clamp} and exponent {exponent}: negative similarities have no such power; "
                "set clamp to 0 or a whole exponent."
            )
        transforms = (nn.Identity, lambda: pointwise_conv(dim, dim), lambda: _two_layers(dim))
        self.value_transform: nn.Module = transforms[layers]()
        self.exponent, self.clamp, self.normalise_value = exponent, clamp, normalise_value

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to the same, not normalised."""
        return self.propagate(x, self.value_transform(x))

    @full_precision
    def propagate(self, x: Tensor, g: Tensor) -> Tensor:
        """``g`` summed with the similarities of ``x``, in float32: small similarities vanish in half precision."""
        u, value = normalise(x.flatten(2)), g.flatten(2)  # [B, C, HW]
        if self.normalise_value:
            value = normalise(value)
        s = (u.transpose(1, 2) @ u).clamp(min=self.clamp)  # [B, HW, HW]
        s = (s + 1e-6 if self.exponent < 1 else s) ** self.exponent
        return (value @ s.transpose(1, 2)).unflatten(2, x.shape[2:])


def _two_layers(dim: int) -> nn.Sequential:
    return mlp([dim, dim, dim], norm=nn.BatchNorm2d, linear=pointwise_conv)
