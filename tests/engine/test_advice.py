"""Sizes that do not fit the images are told with words that a run takes; the table says why nothing was learned."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from omegaconf import OmegaConf

from selfsight import cli
from selfsight.engine import advice, build, sizes
from selfsight.engine.advice import Plan
from selfsight.errors import UserError

#: what fits: each case below spoils one size of it
FITS = Plan(images=1000, batch=64, steps_per_epoch=15, steps=1500, epochs=100, warmup_epochs=10)
SPOILT: dict[str, tuple[dict[str, Any], list[str]]] = {
    "one step an epoch": (
        {"images": 270, "batch": 256, "steps_per_epoch": 1, "steps": 100},
        ["batch_size=32", "trainer.max_epochs=250"],
    ),
    "few steps": ({"steps": 30, "epochs": 2, "warmup_epochs": 0}, ["trainer.max_epochs=134"]),
    "few steps by number": (
        {"steps": 30, "epochs": 2, "warmup_epochs": 0, "in_steps": True}, ["trainer.max_steps=2000"],
    ),
    "prototypes": ({"settings": {"num_prototypes": 3000}}, ["method.num_prototypes=200"]),
    "several sets of them": ({"settings": {"num_prototypes": [300, 3000]}}, ["method.num_prototypes=200"]),
    "outputs": ({"settings": {"out_dim": 65536}}, ["method.out_dim=512"]),
    "freeze": ({"settings": {"freeze_prototypes_steps": 900}}, ["method.freeze_prototypes_steps=75"]),
    "warm-up": ({"warmup_epochs": 60}, ["schedule.lr.warmup_epochs=10"]),
    "queue": ({"settings": {"queue_length": 3840, "queue_start_epoch": 15}}, ["method.queue_length=448"]),
    "late queue": ({"settings": {"queue_length": 512, "queue_start_epoch": 100}}, ["method.queue_start_epoch=20"]),
    "memory": ({"settings": {"memory": 4096}}, ["method.memory=500"]),
}  # fmt: skip
#: methods that have a size
OF = {"num_prototypes": "swav", "freeze": "swav", "queue": "swav", "out_dim": "dino", "memory": "simclrv2"}


def words(plan: Plan) -> list[str]:
    return [word for found in advice.advise(plan) for word in found.words]


def test_what_fits_is_not_talked_about() -> None:
    assert advice.lines(FITS, ["selfsight", "pretrain"]) == []


@pytest.mark.parametrize("case", SPOILT)
def test_each_rule_by_itself(case: str) -> None:
    changes, expected = SPOILT[case]
    plan = replace(FITS, **changes)
    assert words(plan) == expected
    told = {word.partition("=")[0].removeprefix("method."): float(word.partition("=")[2]) for word in expected}
    mended = advice.mended(plan, advice.advise(plan))
    settings = {**plan.settings, **{key: value for key, value in told.items() if key in plan.settings}}
    warmup = told.get("schedule.lr.warmup_epochs", plan.warmup_epochs)
    assert words(replace(mended, settings=settings, warmup_epochs=warmup)) == [], "what was advised is well"


@pytest.mark.parametrize("method", ["swav", "dino", "simclrv2"])
def test_a_run_takes_every_word(method: str) -> None:
    advised = {word.partition("=")[0]: word for _, expected in SPOILT.values() for word in expected}
    own = [word for key, word in advised.items() for part, name in OF.items() if part in key and name == method]
    common = [word for key, word in advised.items() if not key.startswith("method.")]
    cfg = cli.compose("pretrain", [f"method={method}", *own, *common])
    for word in [*own, *common]:
        key, _, value = word.partition("=")
        assert OmegaConf.select(cfg, key) == float(value)


def test_at_most_three_lines_the_last_one_to_be_typed() -> None:
    settings = {"num_prototypes": 3000, "freeze_prototypes_steps": 313, "queue_length": 3840, "queue_start_epoch": 500}
    plan = Plan(404, 256, 1, 36, 36, warmup_epochs=30, settings=settings)
    typed = [
        "selfsight",
        "pretrain",
        "name=one",
        "method=swav",
        "batch_size=256",
        "dataset.root=my photos",
        "resume=auto",
    ]
    told = advice.lines(plan, typed)
    assert len(told) == 3
    assert told[0].startswith("advice: 404 images in batches of 256 are 1 step an epoch and 36 in all")
    assert told[2].startswith("rather: selfsight pretrain method=swav 'dataset.root=my photos' batch_size=32 ")
    assert "method.num_prototypes=80" in told[2].split()
    assert not {"name=one", "resume=auto"} & {*told[2].split()}, "a run of that name is there by then"


def test_presets_and_recipes_are_left_in_peace() -> None:
    for chosen in (["method=swav"], ["recipe=shapes/simclrv2"]):
        cfg = cli.compose("pretrain", chosen)
        assert advice.advise(sizes.expected_plan(cfg, 1437)) == [], chosen


@pytest.mark.parametrize(
    ("images", "batch", "epochs"), [(300, 32, 223), (3000, 256, 182), (50, 16, 400), (10**6, 256, 50)]
)
def test_sizes_by_rule(images: int, batch: int, epochs: int) -> None:
    assert advice.small_batch(images) == batch
    assert advice.small_epochs(images, batch) == epochs


def test_the_small_recipe_fits_the_images_and_leaves_what_is_set() -> None:
    data = ["dataset=digits", "limit_images=404", "presets=null"]
    cfg = build.sized(cli.compose("pretrain", ["recipe=small", "method=swav", *data]))
    assert (cfg.batch_size, cfg.trainer.max_epochs, cfg.schedule.lr.warmup_epochs) == (32, 167, 10)
    assert (cfg.method.num_prototypes, cfg.method.freeze_prototypes_steps) == (80, 313)
    assert advice.advise(sizes.expected_plan(cfg, 404)) == []
    cfg = build.sized(
        cli.compose("pretrain", ["recipe=small", "method=swav", "method.num_prototypes=7", "batch_size=8", *data])
    )
    assert (cfg.batch_size, cfg.trainer.max_epochs, cfg.method.num_prototypes) == (8, 50, 7)


def test_auto_is_no_batch_of_other_jobs() -> None:
    with pytest.raises(UserError, match="batch_size is 'auto'; a whole number"):
        build.check("finetune", OmegaConf.create({"batch_size": "auto"}))


# --- looking back ----------------------------------------------------------------------------------------------------


def rows(trained: float, untrained: float, pixels: float, **more: float) -> dict[str, dict[str, object]]:
    return {
        "pixels": {"knn_top1": pixels},
        "untrained": {"knn_top1": untrained},
        "pretrained": {"knn_top1": trained, **more},
    }


def test_a_network_that_learned_is_left_in_peace() -> None:
    assert advice.look_back(rows(0.9, 0.5, 0.6), FITS, 0.1) is None
    assert advice.look_back({"pretrained": {"rank": 3.0}}, FITS, 0.1) is None, "nothing to compare"
    assert advice.look_back(rows(1.0, 1.0, 0.6), FITS, 0.1) is None, "nothing is above all of them"


@pytest.mark.parametrize(
    ("figures", "plan", "expected"),
    [
        (
            rows(0.3, 0.5, 0.4), FITS,
            "not above the untrained network (kNN 30.0% against 50.0%); likely cause: too short, 1,500 steps; next: "
            "trainer.max_epochs=400",
        ),
        (
            rows(0.3, 0.1, 0.3), replace(FITS, in_steps=True),
            "not above raw pixels (kNN 30.0% against 30.0%); likely cause: too short, 1,500 steps; next: "
            "trainer.max_steps=6000",
        ),
        (
            rows(0.1, 0.5, 0.4, rank=1.1), FITS,
            "collapse, all images get much the same features; next: optimizer.lr=0.1",
        ),
        (
            rows(0.1, 0.5, 0.4), replace(FITS, images=270, batch=256, steps_per_epoch=1, steps=100),
            "and 100 in all, too few to learn much; next: batch_size=32 trainer.max_epochs=250",
        ),
    ],
)  # fmt: skip
def test_a_network_that_did_not_learn(figures: Any, plan: Plan, expected: str) -> None:
    sentence = advice.look_back(figures, plan, 0.3)
    assert sentence is not None
    assert expected in sentence


def test_a_classifier_that_knows_one_name_is_told() -> None:
    """Of a training of MixMatch whose guesses became one class: kNN of its features was 37.6 %."""
    classes = ["cat", "dog", "bird", "frog", "ship"]
    fallen = {"student": {"top1": 0.22, "per_class": [0.02, 0.03, 0.99, 0.0, 0.02]}}
    sentence = advice.one_class(fallen, classes, 0.376, 0.003)
    assert sentence is not None
    assert "the classifier (student) calls most images 'bird': 22.0% are right, as by guessing, and 37.6%" in sentence
    assert "next: optimizer.lr=0.001" in sentence
    learned = {"student": {"top1": 0.5, "per_class": [0.4, 0.3, 0.95, 0.4, 0.45]}}
    assert advice.one_class(learned, classes, 0.8, 0.003) is None
    assert advice.one_class(fallen, classes, 0.25, 0.003) is None, "the features tell no more"
    without_ships = {"student": {"top1": 0.25, "per_class": [0.02, 0.03, 0.99, 0.0, None]}}
    assert "most images 'bird'" in (advice.one_class(without_ships, classes, 0.5, 0.003) or "")
    assert advice.one_class({}, classes, 0.5, 0.003) is None
    assert advice.one_class({"student": {"top1": 0.22, "per_class": None}}, classes, 0.376, 0.003) is None
