"""Distillation without labels: what the losses are, what a teacher is shown, and that a student learns it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import selfsight
from selfsight import cli
from selfsight.backbones.registry import create, weights_line
from selfsight.checkpoints.export import export_backbone
from selfsight.checkpoints.teacher import FrozenTeacher
from selfsight.contracts import Batch
from selfsight.engine import teacher_features
from selfsight.errors import UserError
from selfsight.losses.feature_distillation import cosine_distance, similarity_distillation
from selfsight.methods import FeatureDistillation
from tests.checkpoints.published import lively, swav, write

from ..small import SmallNet

SEEN = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_similarities_by_hand() -> None:
    s, t, queue = drawn(3, 5), drawn(3, 5, seed=1), F.normalize(drawn(7, 5, seed=2))
    wanted = 0.0
    for i in range(3):
        z_s, z_t = s[i] / s[i].norm(), t[i] / t[i].norm()
        others = [z_t, *queue]
        p = torch.tensor([math.exp(float(z_t @ d) / 0.1) for d in others])
        q = torch.tensor([math.exp(float(z_s @ d) / 0.5) for d in others])
        wanted += float(-(p / p.sum() * (q / q.sum()).log()).sum()) / 3
    found = similarity_distillation(s, t, queue, student_temperature=0.5, teacher_temperature=0.1)
    assert float(found) == pytest.approx(wanted, rel=1e-5)


def test_similarities_are_lowest_for_the_teachers_own_features_and_teach_the_student_alone() -> None:
    t, queue = drawn(4, 5).requires_grad_(), F.normalize(drawn(9, 5, seed=2))
    same = {"student_temperature": 0.2, "teacher_temperature": 0.2}
    s = (3 * t.detach()).requires_grad_()
    loss = similarity_distillation(s, t, queue, **same)
    loss.backward()
    assert t.grad is None
    assert s.grad is not None
    torch.testing.assert_close(s.grad, torch.zeros_like(s), rtol=0, atol=1e-6)
    assert float(similarity_distillation(drawn(4, 5, seed=3), t, queue, **same)) > float(loss.detach()) + 0.1
    cold = similarity_distillation(s, t, queue, student_temperature=1e-4, teacher_temperature=1e-4)
    assert float(cold.detach()) == pytest.approx(0.0, abs=1e-6)  # everyone is most similar to themselves


def test_cosine_by_hand() -> None:
    x = drawn(2, 4, 3, 3)
    assert float(cosine_distance(2 * x, x)) == pytest.approx(0.0, abs=1e-6)
    assert float(cosine_distance(-x, x)) == pytest.approx(2.0, abs=1e-6)


def test_a_teacher_sees_images_of_its_own_size_and_normalisation() -> None:
    net = SmallNet(norm=nn.Identity)
    net.spec = {"image_size": 24, "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.4, 0.3]}  # type: ignore[assignment]
    raw = torch.rand(2, 3, 24, 24)
    wanted = net((raw - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / torch.tensor([0.5, 0.4, 0.3])[:, None, None])
    teacher = FrozenTeacher(net, **SEEN)
    torch.testing.assert_close(teacher((raw - 0.5) / 0.25), wanted, rtol=0, atol=1e-5)
    assert teacher.images(torch.zeros(1, 3, 16, 16)).shape == (1, 3, 24, 24)
    assert teacher.about == "8 features of images of 24 x 24 pixels, normalised as its own"
    net.spec = {"image_size": None, **SEEN}  # type: ignore[assignment]
    like = FrozenTeacher(net, **SEEN)
    x = drawn(1, 3, 16, 16)
    torch.testing.assert_close(like.images(x), x)
    assert like.about == "8 features of images of the student's size, normalised as the student's"


@pytest.mark.parametrize("loss", ["similarity", "cosine", "maps"])
def test_a_student_comes_to_see_what_its_teacher_sees(loss: Any) -> None:
    torch.manual_seed(0)
    teacher = lively(create("resnet10_slim", width=4, stem="cifar"))
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    method = FeatureDistillation(SmallNet(norm=nn.Identity), **SEEN, teacher=teacher, loss=loss, queue_length=32)
    method.train()
    assert not teacher.training
    views = [3 * drawn(16, 3, 1, 1) + drawn(16, 3, 16, 16, seed=seed) for seed in (1, 2)]
    batch = Batch(views, torch.arange(16), None, None)
    learned = [p for p in method.parameters() if p.requires_grad]
    assert not {id(p) for p in teacher.parameters()} & {id(p) for p in learned}
    optimizer, losses = torch.optim.Adam(learned, 0.01), []
    for _ in range(20):
        found = method.training_step(batch, 0)["loss"]
        optimizer.zero_grad()
        found.backward()
        optimizer.step()
        method.end_step()
        losses.append(float(found.detach()))
    assert losses[-1] < 0.9 * losses[2]
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    if loss == "similarity":
        x = F.normalize(teacher(views[1]))
        torch.testing.assert_close(method.queue.oldest_first().view(16, 2, -1)[:, 1], x)


def test_features_in_a_table_teach_what_the_teacher_does() -> None:
    def trained(kept: bool, **settings: Any) -> tuple[list[float], Tensor]:
        torch.manual_seed(0)
        teacher = lively(create("resnet10_slim", width=4, stem="cifar"))
        method = FeatureDistillation(SmallNet(norm=nn.Identity), **SEEN, teacher=teacher, queue_length=32, **settings)
        images, order = drawn(24, 3, 16, 16), torch.arange(24).roll(5)
        if kept:
            method.take_features(method.teacher(images[order]), order)
        optimizer, losses = torch.optim.SGD(method.head.parameters(), 0.1), []
        for rows in torch.randperm(24, generator=torch.Generator().manual_seed(1)).split(8):
            loss = method.training_step(Batch([images[rows]], rows, None, None), 0)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            method.end_step()
            losses.append(float(loss.detach()))
        return losses, method.queue.data

    for (losses, queue), (wanted, wanted_queue) in (
        (trained(True), trained(False)),
        (trained(True, teacher_sees="image"), trained(False)),
    ):
        assert losses == pytest.approx(wanted, abs=1e-6)
        torch.testing.assert_close(queue, wanted_queue, rtol=0, atol=1e-6)
    with pytest.raises(UserError, match="call take_features"):
        trained(False, teacher_sees="image")
    with pytest.raises(UserError, match="different places"):
        trained(False, teacher_sees="image", loss="maps")


def test_a_teacher_is_found_by_its_place_or_name(tmp_path: Path) -> None:
    net = lively(create("resnet10_slim", width=4))
    export_backbone(net, {"backbone": {"name": "resnet10_slim", "width": 4}, "image_size": 32, **SEEN}, tmp_path)
    x = drawn(2, 3, 32, 32)
    method = FeatureDistillation(SmallNet(), **SEEN, teacher=str(tmp_path))
    torch.testing.assert_close(method.teacher(x), net(x))
    assert method.about.startswith(f"teacher {tmp_path}: 32 features of images of 32 x 32 pixels")
    theirs = FeatureDistillation(SmallNet(), **SEEN, teacher=str(write(swav(), tmp_path)))
    assert theirs.teacher.about == "512 features of images of 224 x 224 pixels, normalised as its own"
    for teacher, told in (
        (None, "method.teacher=runs/NAME"),
        ("no-such-network", "there is no teacher 'no-such-network'"),
        (nn.Identity(), "does not say its num_features"),
    ):
        with pytest.raises(UserError, match=told):
            FeatureDistillation(SmallNet(), **SEEN, teacher=teacher)  # type: ignore[arg-type]


def test_which_weights_timm_has_published_is_told() -> None:
    net = create("resnet18.a1_in1k")
    assert weights_line(net) == "resnet18.a1_in1k of timm (licence: apache-2.0)"


@pytest.mark.slow
def test_a_run_learns_from_a_folder_and_is_carried_away(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = {"name": "resnet10_slim", "width": 4, "stem": "cifar"}
    (tmp_path / "net").mkdir()
    export_backbone(lively(create(**arguments)), {"backbone": arguments, "image_size": 32, **SEEN}, tmp_path / "net")  # type: ignore[arg-type]
    words = ["method=distillation", f"method.teacher={tmp_path / 'net'}", "dataset=digits", "limit_images=64"]
    words += ["batch_size=32", "evaluator=knn", "report=false", "trainer.max_epochs=1", f"runs={tmp_path}", "name=run"]
    cli.main(["pretrain", *words])
    assert "32 features of images of 32 x 32 pixels, normalised as its own" in capsys.readouterr().out
    assert selfsight.load(tmp_path / "run").spec["method"] == "distillation"
    with pytest.raises(SystemExit):
        cli.main(["pretrain", "method=distillation"])
    assert "method.teacher=runs/NAME" in capsys.readouterr().err


PLAIN = ["crop=center", "jitter=[0,0,0,0]", "grayscale=0", "hflip=0", "blur=0"]


@pytest.mark.slow
def test_a_run_asks_its_teacher_once_where_views_are_what_evaluation_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = {"name": "resnet10_slim", "width": 4, "stem": "cifar"}
    (tmp_path / "net").mkdir()
    export_backbone(lively(create(**arguments)), {"backbone": arguments, "image_size": 32, **SEEN}, tmp_path / "net")  # type: ignore[arg-type]
    words = ["method=distillation", f"method.teacher={tmp_path / 'net'}", "dataset=digits", "limit_images=48"]
    words += ["batch_size=16", "evaluator=knn", "report=false", "trainer.max_epochs=1", f"runs={tmp_path}"]
    words += ["backbone.width=4"]
    plain = [f"views.global.{word}" for word in PLAIN]
    cli.main(["pretrain", *words, *plain, "name=kept"])
    assert "sees each image once" in " ".join(capsys.readouterr().out.split())
    assert len(list((tmp_path / "kept" / "teacher").glob("*.safetensors"))) == 1
    with monkeypatch.context() as patched:
        patched.setattr(teacher_features, "plain", lambda data: False)
        cli.main(["pretrain", *words, *plain, "name=asked"])
    assert "sees every view, since they differ" in " ".join(capsys.readouterr().out.split())
    kept, asked = (load_file(tmp_path / name / "backbone.safetensors") for name in ("kept", "asked"))
    for name, value in asked.items():
        torch.testing.assert_close(kept[name], value, rtol=0, atol=1e-6)

    cli.main(["pretrain", *words, "method.teacher_sees=image", "views.global.count=2", "name=image"])
    capsys.readouterr()
    monkeypatch.setattr(FrozenTeacher, "forward", None)  # who goes on takes what is there
    cli.main(["pretrain", f"resume={tmp_path / 'image'}", "extend=1"])
    assert len((tmp_path / "image" / "metrics.csv").read_text().splitlines()) == 3
