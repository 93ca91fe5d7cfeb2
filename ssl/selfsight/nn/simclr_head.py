"""The projection head of SimCLR and SimCLRv2 (google-research/simclr, model_util.py)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from selfsight.errors import UserError
from selfsight.nn.batchnorm import BiasedBatchNorm1d
from selfsight.nn.matryoshka import PrefixLinear


class ProjectionLayer(nn.Module):
    """Linear without bias, BatchNorm, ReLU; the last layer's BatchNorm has no shift, and no ReLU follows."""

    def __init__(self, fan_in: int, fan_out: int, *, first: bool, last: bool) -> None:
        super().__init__()
        self.linear = (PrefixLinear if first else nn.Linear)(fan_in, fan_out, bias=False)
        nn.init.normal_(self.linear.weight, std=0.01)
        self.bn = BiasedBatchNorm1d(fan_out)
        if last:
            self.bn.register_parameter("bias", None)
        self.act = nn.Identity() if last else nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.linear(x)))


class ProjectionHead(nn.Sequential):
    """``[B, dim] -> [B, out_dim]`` in ``num_layers`` layers (SimCLRv2 3, SimCLR 2), hidden ones as wide as dim.

    Attributes:
        widths: of the input and of every layer's output.
    """

    def __init__(self, dim: int, out_dim: int, num_layers: int) -> None:
        if num_layers < 1:
            raise UserError(f"The projection head was given {num_layers} layers; it needs at least 1 (SimCLRv2 has 3).")
        widths = [dim] * num_layers + [out_dim]
        last = num_layers - 1
        super().__init__(
            *(ProjectionLayer(widths[j], widths[j + 1], first=j == 0, last=j == last) for j in range(num_layers))
        )
        self.widths = widths

    @classmethod
    def out_of(cls, state: Mapping[str, Tensor], prefix: str) -> ProjectionHead | None:
        """The head whose tensors a state dict holds under ``prefix``; None where it holds no such head."""
        weights = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        layers = sum(key.endswith(".linear.weight") for key in weights)
        if not layers or f"{layers - 1}.bn.weight" not in weights:
            return None
        head = cls(weights["0.linear.weight"].shape[1], len(weights[f"{layers - 1}.bn.weight"]), layers)
        # of one that has learned nested dimensions, the layer that takes whole features
        head.load_state_dict({key: value for key, value in weights.items() if ".prefixes." not in key})
        return head

    def outputs(self, x: Tensor) -> list[Tensor]:
        """The input, then the output of every layer."""
        xs = [x]
        for layer in self:
            xs.append(layer(xs[-1]))
        return xs
