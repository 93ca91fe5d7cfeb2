"""Values that no run can have are refused with key and reason, before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from selfsight import cli
from selfsight.engine import build, nodes
from selfsight.engine.session import make_trainer
from selfsight.errors import UserError
from selfsight.runs.folder import RunFolder


def composed(job: str, *words: str) -> Any:
    return cli.compose(job, cli.checked(job, list(words), sweep=False))


@pytest.fixture(scope="module")
def configs() -> dict[str, Any]:
    return {job: composed(job, "trainer.accelerator=cpu") for job in ("pretrain", "finetune", "profile")} | {
        "compare": composed("compare")
    }


WRONG: dict[str, tuple[Any, ...]] = {
    "name": (".", "..", "../x", "a/b", "a\\b"),
    "runs": (None,),
    "seed": (-1, 2**32, 1.5, None, "one"),
    "batch_size": (0, 2.5, True),
    "num_workers": (-1, None, "some"),
    "limit_images": (0, -1, 0.5),
    "trainer.max_epochs": (0, -1, 1.5, None),
    "trainer.devices": (0, -1, [], [0, 0], [-1], "banana", None),
    "trainer.num_nodes": (0,),
    "trainer.strategy": ("banana", "ddp_spawn"),
    "trainer.precision": ("banana", "64-true", 8),
    "trainer.compile": ("banana",),
    "trainer.accumulate": (0, -1, 1.5),
    "trainer.clip_norm": (0, -1.0),
    "trainer.limit_batches": (0, 0.5),
    "trainer.checkpoint_every": (0,),
    "trainer.accelerator": ("tpu",),
    "optimizer.lr": (-1, float("inf"), None),
    "optimizer.weight_decay": (-1,),
    "schedule.reference_batch": (0,),
    "schedule.scaling": ("banana",),
    "evaluator.online.every": (0, 1.5),
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG.items() for value in values])
def test_values_that_cannot_be_meant(configs: dict[str, Any], key: str, value: Any) -> None:
    cfg = configs["pretrain"].copy()
    OmegaConf.update(cfg, key, value)
    with pytest.raises(UserError, match=key.split(".")[-1]) as caught:
        build.check("pretrain", cfg)
    assert str(caught.value).count("\n") == 0


@pytest.mark.parametrize(
    ("job", "key", "value"),
    [
        ("profile", "steps", 0),
        ("profile", "warmup", -1),
        ("finetune", "layer", "banana"),
        ("compare", "seeds", 0),
        ("compare", "workers", 0),
        ("compare", "workers", "banana"),
        ("compare", "labels_per_class", []),
        ("compare", "labels_per_class", [1, 0]),
    ],
)
def test_values_of_single_jobs(configs: dict[str, Any], job: str, key: str, value: Any) -> None:
    build.check(job, configs[job])
    cfg = configs[job].copy()
    OmegaConf.update(cfg, key, value)
    with pytest.raises(UserError, match=f"{key} is .* was expected"):
        build.check(job, cfg)


RIGHT: dict[str, tuple[Any, ...]] = {
    "name": ("a.b", "1e3", "", None),
    "seed": (0, 2**32 - 1),
    "num_workers": (0, 8, "auto"),
    "limit_images": (1, None),
    "trainer.devices": (1, 2, "auto"),
    "trainer.strategy": ("ddp",),
    "trainer.precision": (32, "16-mixed", "auto"),
    "trainer.compile": (True, "auto"),
    "trainer.clip_norm": (0.5, 1, None),
    "trainer.limit_batches": (1, None),
    "optimizer.lr": (0, 0.1),
    "optimizer.weight_decay": (0, 0.1),
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in RIGHT.items() for value in values])
def test_values_that_can(configs: dict[str, Any], key: str, value: Any) -> None:
    cfg = configs["pretrain"].copy()
    OmegaConf.update(cfg, key, value)
    build.check("pretrain", cfg)


def test_the_nearest_word_is_named(configs: dict[str, Any]) -> None:
    cfg = configs["pretrain"].copy()
    cfg.trainer.precision = "bf16-mix"
    with pytest.raises(UserError, match="Did you mean 'bf16-mixed'"):
        build.check("pretrain", cfg)


@pytest.mark.parametrize(
    "words", [["trainer.max_epochs=0"], ["trainer.devices=2", "batch_size=5"], ["optimizer.betas=[2,0.9]"]]
)
def test_no_folder_is_left(tmp_path: Path, words: list[str]) -> None:
    with pytest.raises(UserError):
        cli.run(["pretrain", "debug=smoke", *words, f"runs={tmp_path / 'runs'}"])
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", cli.choices("optimizer"))
def test_every_optimiser_takes_its_own_values(name: str) -> None:
    build.recipe(composed("pretrain", f"optimizer={name}", "trainer.accelerator=cpu"))


@pytest.mark.parametrize(
    ("node", "said"),
    [
        ({"_target_": "torch.nn.Linear", "in_features": 2}, "missing 1 required positional argument"),
        ({"_target_": "torch.nn.Dropout", "p": 7}, "dropout probability has to be between 0 and 1"),
        ({"_target_": "selfsight.nowhere.Thing"}, "Error loading 'selfsight.nowhere.Thing'"),
        ({"_target_": "torch.nn.Linear", "in_features": "${gone}", "out_features": 1}, "gone"),
    ],
)
def test_what_a_constructor_refuses_names_its_place(node: dict[str, Any], said: str) -> None:
    cfg: Any = OmegaConf.create({"evaluator": {"final": node}})
    with pytest.raises(UserError) as caught:
        nodes.build(cfg.evaluator.final)
    assert str(caught.value).startswith(f"evaluator.final ({node['_target_']}) cannot be made with these values: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_a_constructor_refuses_of_other_objects() -> None:
    cfg: Any = OmegaConf.create({"head": {"_target_": "torch.nn.Linear", "in_features": 2}})
    with pytest.raises(UserError, match=r"^head \(torch.nn.Linear\) cannot be made"):
        nodes.build(cfg.head, out_features="many")


def test_what_lightning_refuses(tmp_path: Path) -> None:
    parts = build.parts(composed("pretrain", "trainer.accelerator=cpu", "debug=smoke"))
    object.__setattr__(parts.trainer, "precision", "banana")  # what our own check would have refused
    with pytest.raises(UserError, match=r"trainer cannot be made with these values: .*banana"):
        make_trainer(parts, RunFolder(tmp_path), [])
