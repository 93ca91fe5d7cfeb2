"""What VICReg, Barlow Twins and LeJEPA have to do whatever the numbers are."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from selfsight.errors import UserError
from selfsight.losses.barlow import barlow_twins
from selfsight.losses.lejepa import epps_pulley, lejepa, random_directions, sigreg, unit_columns
from selfsight.losses.vicreg import vicreg
from selfsight.methods.barlow import BarlowTwins
from selfsight.methods.base import Method
from selfsight.methods.lejepa import LeJEPA
from selfsight.methods.vicreg import VICReg

from ..small import SmallNet, assert_resumes, batches, prepare, train

ADAMW = partial(torch.optim.AdamW, weight_decay=0.05)
METHODS: dict[str, Callable[[], Method]] = {
    "vicreg": lambda: VICReg(SmallNet(), expander=[9, 6]),
    "barlow": lambda: BarlowTwins(SmallNet(), projector=[9, 6], bias_lr=0.1),
    "lejepa": lambda: LeJEPA(SmallNet(), embedding_dim=7, projector=[9, 4], slices=16),
}


def prepared(name: str) -> Method:
    return prepare(METHODS[name](), ADAMW, 0.01, 3, 2)


def rows(n: int = 7, D: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def standardised(z: Tensor) -> Tensor:
    return (z - z.mean(0)) / z.std(0, correction=0)


# --- VICReg ----------------------------------------------------------------------------------------------------------


def test_vicreg_is_the_equation() -> None:
    x, y = rows(), rows(seed=1)
    N, D = x.shape
    invariance, variance, covariance = (float(term) for term in vicreg(x, y))
    assert invariance == pytest.approx(sum(float((x[b, d] - y[b, d]) ** 2) for b in range(N) for d in range(D)) / N / D)
    hinge, off = 0.0, 0.0
    for e in (x, y):
        c = [[float(((e[:, i] - e[:, i].mean()) * (e[:, j] - e[:, j].mean())).sum()) / (N - 1) for j in range(D)]
             for i in range(D)]  # fmt: skip
        hinge += sum(max(0.0, 1 - math.sqrt(c[d][d] + 1e-4)) for d in range(D)) / D / 2
        off += sum(c[i][j] ** 2 for i in range(D) for j in range(D) if i != j) / D
    assert variance == pytest.approx(hinge)
    assert covariance == pytest.approx(off)


def test_vicreg_of_one_point_costs_what_its_chance_level_says() -> None:
    z = torch.ones(8, 5, dtype=torch.float64)
    invariance, variance, covariance = vicreg(z, z)
    method = VICReg(SmallNet(), expander=[5])
    total = method.sim_coeff * invariance + method.std_coeff * variance + method.cov_coeff * covariance
    assert float(total) == pytest.approx(method.chance_loss())


def test_vicreg_does_not_push_what_varies_enough() -> None:
    x = (rows() * 10).requires_grad_()
    _, variance, _ = vicreg(x, x)
    variance.backward()
    assert float(variance) == 0
    assert not x.grad.any()  # type: ignore[union-attr]


# --- Barlow Twins ----------------------------------------------------------------------------------------------------


def test_barlow_is_the_equation_and_d_for_constant_embeddings() -> None:
    z1, z2 = standardised(rows()), standardised(rows(seed=1))
    C = [[float((z1[:, i] * z2[:, j]).mean()) for j in range(4)] for i in range(4)]
    found = barlow_twins(z1, z2)
    assert float(found.on_diagonal) == pytest.approx(sum((C[i][i] - 1) ** 2 for i in range(4)))
    assert float(found.off_diagonal) == pytest.approx(sum(C[i][j] ** 2 for i in range(4) for j in range(4) if i != j))
    method = BarlowTwins(SmallNet(), projector=[4])
    constant = method.bn(torch.ones(8, 4))
    assert float(barlow_twins(constant, constant).on_diagonal) == pytest.approx(method.chance_loss())
    assert float(barlow_twins(z1, z1).on_diagonal) == pytest.approx(0, abs=1e-12)


def test_barlow_biases_have_their_own_rate() -> None:
    method = prepared("barlow")
    train(method, method.configure_optimizers(), batches([16, 16], 5, 1), range(2))
    assert method._optimizer is not None
    kernels, rest = method._optimizer.param_groups
    assert rest["lr"] == pytest.approx(0.1 * kernels["lr"])
    assert all(p.ndim == 1 for p in rest["params"])


@pytest.mark.parametrize("name", ["vicreg", "barlow"])
def test_a_batch_of_one_image_is_refused(name: str) -> None:
    method = prepared(name).eval()
    (batch,) = batches([16, 16], 1, 1)
    with pytest.raises(UserError, match="batch of one image"):
        method.training_step(batch, 0)


@pytest.mark.parametrize("name", ["vicreg", "barlow"])
def test_exchanged_views_give_the_same_loss(name: str) -> None:
    method, (batch,) = prepared(name).double(), batches([16, 16], 6, 1, dtype=torch.float64)
    loss = method.training_step(batch, 0)["loss"]
    batch.views.reverse()
    torch.testing.assert_close(method.training_step(batch, 0)["loss"], loss)


# --- LeJEPA ----------------------------------------------------------------------------------------------------------


def test_a_gaussian_scores_about_one_and_a_point_grows_with_the_batch() -> None:
    expected = 0.0  # integral of (1 - phi^2) phi over [-3, 3]: the noise of the empirical characteristic function
    for k in range(-3000, 3000):
        t = (k + 0.5) / 1000
        phi = math.exp(-(t**2) / 2)
        expected += (1 - phi**2) * phi / 1000
    scores = epps_pulley(rows(64, 3000))
    assert float(scores.mean()) == pytest.approx(expected, rel=0.05)
    for N in (8, 80):
        assert float(epps_pulley(torch.zeros(N, 1))) == pytest.approx(0.402 * N, rel=1e-2)


def test_sigreg_does_not_depend_on_the_order_of_images_or_a_common_rotation() -> None:
    z, A = rows(12, 5), unit_columns(rows(5, 9, seed=1))
    torch.testing.assert_close(sigreg(z[torch.randperm(12)], A), sigreg(z, A))
    Q = torch.linalg.qr(rows(5, 5, seed=2)).Q
    torch.testing.assert_close(sigreg(z @ Q, Q.T @ A), sigreg(z, A))
    assert sigreg(z, A, clip=1e9) == 0
    with pytest.raises(UserError, match="points"):
        epps_pulley(z, points=1)


def test_directions_follow_from_the_step_alone() -> None:
    torch.manual_seed(1)
    first = random_directions(5, 4, 7)
    torch.manual_seed(2)
    assert torch.equal(random_directions(5, 4, 7), first)
    assert not torch.equal(random_directions(6, 4, 7), first)
    torch.testing.assert_close(first.norm(dim=0), torch.ones(7))


def test_agreement_is_with_the_global_views() -> None:
    z, A = torch.stack([rows(seed=s) for s in range(4)]), unit_columns(rows(4, 6, seed=9))
    terms = lejepa(z, A, lambd=0.3, n_global=2)
    mean = (z[0] + z[1]) / 2
    assert float(terms.invariance) == pytest.approx(float((z - mean).square().mean()))
    assert float(terms.sigreg) == pytest.approx(float(torch.stack([sigreg(v, A) for v in z]).mean()))
    assert float(terms.loss) == pytest.approx(0.3 * float(terms.sigreg) + 0.7 * float(terms.invariance))
    swapped = lejepa(z[[1, 0, 3, 2]], A, lambd=0.3, n_global=2)
    torch.testing.assert_close(swapped.loss, terms.loss)
    with pytest.raises(UserError, match="lambd"):
        LeJEPA(SmallNet(), lambd=1.5)


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(METHODS))
def test_a_run_stopped_and_loaded_goes_on_bit_for_bit(name: str) -> None:
    sizes = [16, 16, 8] if name == "lejepa" else [16, 16]
    assert_resumes(partial(prepared, name), batches(sizes, 5, 3), stop=4, steps=6)


@pytest.mark.parametrize("name", list(METHODS))
def test_some_steps_make_the_loss_smaller(name: str) -> None:
    torch.manual_seed(0)
    method = prepare(METHODS[name](), ADAMW, 0.01, 30, 1)
    (batch,) = batches([16, 16], 16, 1)
    found = train(method, method.configure_optimizers(), [batch], range(30))
    assert float(found[-1]["loss"]) < 0.9 * float(found[0]["loss"])


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_losses_of_half_precision_are_computed_in_float32(half: torch.dtype) -> None:
    x, y = rows().to(half), rows(seed=1).to(half)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert vicreg(x, y)[2].dtype == torch.float32
        assert barlow_twins(x, y).C.dtype == torch.float32
        assert sigreg(x, unit_columns(rows(4, 6)).to(half)).dtype == torch.float32
    torch.testing.assert_close(vicreg(x, y), vicreg(x.float(), y.float()), atol=0, rtol=0)
