"""Sharpness-aware minimisation: the gradient of the worst point nearby, around any optimiser."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from selfsight.errors import UserError, nearest
from selfsight.optim.layerwise import norms

Scale = Literal["none", "weights", "asam"]
#: state of the generators of CPU and GPUs
RandomState = tuple[Tensor, list[Tensor]]
#: by name: (scale, size of the neighbourhood)
NAMED: dict[str, tuple[Scale, float]] = {"sam": ("none", 0.05), "asam": ("asam", 0.5)}


def sharpness_aware(
    base: Callable[..., Optimizer], *, sam: Literal["sam", "asam"] | None = None, sam_rho: float | None = None
) -> Callable[..., Optimizer]:
    """``base``, or `SAM` around it.

    Args:
        base: called as ``base(groups, lr=...)``.
        sam: ``sam`` (Foret et al. 2021), ``asam``, whose neighbourhood goes by the size of each weight (Kwon et al.
            2021), or None.
        sam_rho: size of the neighbourhood; None: 0.05 for ``sam``, 0.5 for ``asam``, the authors' for CIFAR-10.

    Raises:
        UserError: another name, or a size without a name.
    """
    if sam is None:
        if sam_rho is not None:
            raise UserError(
                f"optimizer.sam_rho={sam_rho:g} is the size of a neighbourhood that nothing looks at; add "
                "optimizer.sam=sam or asam."
            )
        return base
    if sam not in NAMED:
        raise UserError(f"optimizer.sam is '{sam}'; sam, asam or null was expected.{nearest(sam, NAMED)}")
    scale, rho = NAMED[sam]
    return partial(SAM, base=base, scale=scale, rho=rho if sam_rho is None else sam_rho)


class SAM(Optimizer):
    """Takes every step twice: up to the worst weights within ``rho``, then the optimiser's step by the gradient there.

    ``w' = w + rho s^2 g / (|s g| + eps)``, with |.| over all tensors together; the gradient at w' goes to ``base``,
    which steps from w. The scale s is

    - ``none``: 1 (Foret et al. 2021, arXiv:2010.01412);
    - ``weights``: |w| (the adaptive option of davda54/sam);
    - ``asam``: |w| + eta for kernels and 1 for tensors of one dimension (Kwon et al. 2021, arXiv:2102.11600; the
      authors go by names, so that a BatchNorm's scale counts as a weight there).

    A step needs a closure that computes loss and gradients, and calls it twice: on the same batch with the same random
    numbers. What a batch changes besides gradients must not change twice; ``around_second_pass`` gives the context for
    that. On several processes both gradients are those of all, where the paper perturbs on each device by itself.

    Args:
        base: called as ``base(groups, lr=...)``; its weight decay belongs to its own step.
        rho: size of the neighbourhood: 0.05 to 0.2, for ``asam`` 0.5 to 2.
        eta: see ``asam``. eps: added to the norm.
        max_norm: longest gradient of the second pass, over all tensors; None: any.

    Attributes:
        gradient_norm: ``|s g|`` of the last step, 0-d; None before the first.
        loss_nearby: loss of the last step's second pass; None before the first.

    Raises:
        UserError: an optimiser that wants a closure itself, an unknown scale, or a rho below 0.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        base: Callable[..., Optimizer],
        rho: float = 0.05,
        scale: Scale = "none",
        eta: float = 0.01,
        eps: float = 1e-12,
        max_norm: float | None = None,
    ) -> None:
        if scale not in get_args(Scale):
            known = get_args(Scale)
            raise UserError(f"SAM's scale is '{scale}'; one of {', '.join(known)}.{nearest(scale, known)}")
        if rho < 0:
            raise UserError(f"SAM's rho is {rho:g}; it is the size of a neighbourhood, 0 or more.")
        self.base = base(params, lr=lr)
        closure = inspect.signature(self.base.step).parameters.get("closure")
        if closure is not None and closure.default is closure.empty:
            raise UserError(
                f"SAM computes the gradient itself, and {type(self.base).__name__} wants to do so too; put it "
                "around another optimizer, such as SGD or AdamW."
            )
        super().__init__(self.base.param_groups, self.base.defaults)
        self._share()
        self.rho, self.scale, self.eta, self.eps, self.max_norm = rho, scale, eta, eps, max_norm
        self.around_second_pass: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.gradient_norm: Tensor | None = None
        self.loss_nearby: Any = None

    def _share(self) -> None:
        """Groups and state are those of the optimiser inside."""
        self.param_groups, self.state = self.base.param_groups, self.base.state

    def state_dict(self) -> dict[str, Any]:
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.base.load_state_dict(state_dict)
        self._share()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns the loss of the first pass.

        Raises:
            UserError: no closure.
        """
        if closure is None:
            raise UserError(
                "SAM needs a closure that computes the gradient a second time, and its step was called without one: "
                "optimizer.step(closure)."
            )
        closure = torch.enable_grad()(closure)
        random = random_state()
        loss = closure()
        weights = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        before = [p.detach().clone() for p in weights]
        self._climb(weights)
        after = random_state()
        set_random_state(random)
        try:
            with self.around_second_pass():
                self.loss_nearby = closure()
        finally:  # a step that breaks off leaves the weights where they were
            set_random_state(after)
            with torch.no_grad():
                torch._foreach_copy_(weights, before)
        if self.max_norm is not None:
            _clip(weights, self.max_norm)
        self.base.step()
        return loss

    @torch.no_grad()
    def _climb(self, weights: list[nn.Parameter]) -> None:
        gradients = [p.grad for p in weights if p.grad is not None]
        scales = [self._scale_of(p) for p in weights]
        scaled = [g if s is None else s * g for s, g in zip(scales, gradients, strict=True)]
        self.gradient_norm = torch.linalg.vector_norm(norms(scaled))
        reach = self.rho / (self.gradient_norm + self.eps)
        for p, s, g in zip(weights, scales, scaled, strict=True):
            p.add_((g if s is None else s * g) * reach)

    def _scale_of(self, p: Tensor) -> Tensor | None:
        if self.scale == "none" or (self.scale == "asam" and p.ndim <= 1):
            return None
        return p.abs() + (self.eta if self.scale == "asam" else 0.0)


@torch.no_grad()
def _clip(weights: list[nn.Parameter], max_norm: float) -> None:
    gradients = [p.grad for p in weights if p.grad is not None]
    length = torch.linalg.vector_norm(norms(gradients))
    torch._foreach_mul_(gradients, (max_norm / length).clamp(max=1.0))


def random_state() -> RandomState:
    """What the generators of CPU and GPUs draw from next."""
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def set_random_state(state: RandomState) -> None:
    """Let them draw what they drew from there."""
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])
