"""What method tests share: a network of milliseconds, batches of noise, and the loop a trainer would run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from selfsight.contracts import Batch
from selfsight.methods.base import Method
from selfsight.optim.recipe import OptimizationRecipe
from selfsight.optim.schedule import Clock, Cosine, Schedule


class SmallNet(nn.Module):
    """Two convolutions of stride 2 in timm's interface; ``norm`` may be `nn.Identity` to keep samples independent."""

    def __init__(self, num_features: int = 8, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.num_features = num_features
        self.stages = nn.Sequential(
            nn.Conv2d(3, 6, 3, stride=2, padding=1), norm(6), nn.ReLU(),
            nn.Conv2d(6, num_features, 3, stride=2, padding=1), norm(num_features), nn.ReLU(),
        )  # fmt: skip

    def forward_features(self, x: Tensor) -> Tensor:
        return self.stages(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_features(x).mean((2, 3))


def boxes_of(B: int, generator: torch.Generator) -> Tensor:
    """``[B, 8]`` random crops of images of 40 x 50, at least half as long as these, half of them mirrored."""
    H, W = 40.0, 50.0
    h, w = (torch.randint(int(n) // 2, int(n), (B,), generator=generator).float() for n in (H, W))
    top, left = (((n - side + 1) * torch.rand(B, generator=generator)).floor() for n, side in ((H, h), (W, w)))
    hflip = torch.randint(0, 2, (B,), generator=generator).float()
    rest = torch.full((B,), H), torch.full((B,), W), hflip, torch.zeros(B)
    return torch.stack([top, left, h, w, *rest], dim=1)


def batches(
    sizes: Sequence[int], B: int, count: int, *, images: int | None = None, dtype: torch.dtype | None = None
) -> list[Batch]:
    """``count`` batches of noise with one view of each of ``sizes``; indices run through ``images``, then anew."""
    g = torch.Generator().manual_seed(0)
    images = images or B * count
    return [
        Batch(
            [torch.randn(B, 3, size, size, generator=g).to(dtype or torch.get_default_dtype()) for size in sizes],
            torch.arange(j * B, (j + 1) * B) % images,
            boxes=[boxes_of(B, g) for _ in sizes],
        )
        for j in range(count)
    ]


def prepare(
    method: Method,
    optimizer: Callable[..., torch.optim.Optimizer],
    lr: float,
    steps_per_epoch: int,
    epochs: int,
    **schedules: Schedule,
) -> Method:
    """Give the method optimiser, a cosine for the learning rate, and the length of the run."""
    recipe = OptimizationRecipe(optimizer, lr, {"lr": Cosine(1.0, 0.1), **schedules})
    return method.configure(recipe, Clock(1, 1, epochs, steps_per_epoch))


def train(
    method: Method, optimizer: torch.optim.Optimizer, data: Sequence[Batch], steps: Iterable[int]
) -> list[dict[str, Tensor]]:
    """What a trainer does; returns what each step returned, detached."""
    found = []
    for step in steps:
        method.begin_step(step)
        optimizer.zero_grad()
        result = method.training_step(data[step % len(data)], step % len(data))
        result["loss"].backward()
        method.on_before_optimizer_step(optimizer)
        optimizer.step()
        method.end_step()
        found.append({name: value.detach().clone() for name, value in result.items()})
    return found


def assert_resumes(make: Callable[[], Method], data: Sequence[Batch], stop: int, steps: int) -> None:
    """A run stopped before step ``stop`` and loaded into a new method and optimiser ends like one that went through."""
    torch.manual_seed(0)
    through = make()
    losses = train(through, through.configure_optimizers(), data, range(steps))

    torch.manual_seed(0)
    first = make()
    optimizer = first.configure_optimizers()
    before = train(first, optimizer, data, range(stop))
    torch.manual_seed(1)
    second = make()
    resumed = second.configure_optimizers()
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    before += train(second, resumed, data, range(stop, steps))

    for step, (a, b) in enumerate(zip(losses, before, strict=True)):
        for name in a:
            assert torch.equal(a[name], b[name]), f"{name} differs at step {step}"
    ends = zip(through.state_dict().items(), second.state_dict().values(), strict=True)
    for (name, a), b in ends:
        assert torch.equal(a, b), f"{name} differs at the end"
