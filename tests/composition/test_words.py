"""Every wrong word on the command line is one line with the nearest right one, and exit status 2."""

from __future__ import annotations

import io
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from selfsight import cli
from selfsight.composition import catalogue
from selfsight.composition.help import about
from selfsight.composition.words import parse_override
from selfsight.engine import monitor
from selfsight.errors import UserError
from selfsight.reporting import tables

from ..docs.test_commands import PAGES, commands

ROOT = Path(__file__).parents[2]


def fails(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(list(words))
    told = capsys.readouterr().err
    assert stop.value.code == 2, told
    assert told.count("\n") == 1, told
    assert "Traceback" not in told
    return told


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["pretrian"], "Did you mean 'pretrain'?"),
        (["pretrain", "method=simclr2"], "Did you mean 'simclrv2'?"),
        (["pretrain", "dataset=cifar-10"], "Did you mean 'cifar10'?"),
        (["pretrain", "backbone=resnet5O"], "Did you mean 'resnet50'?"),
        (["pretrain", "trainer.max_epoch=3"], "Did you mean 'trainer.max_epochs'?"),
        (["pretrain", "max_epochs=3"], "Did you mean 'trainer.max_epochs'?"),
        (["pretrain", "metod=swav"], "Did you mean 'method'?"),
        (["pretrain", "debug=smok"], "Did you mean 'smoke'?"),
        (["pretrain", "trainer.max_epochs=many"], "a number was expected"),
        (["pretrain", "method=simclrv2,swav"], "-m runs every combination"),
        (["pretrain", "--fast"], "is no option"),
        (["pretrain", "--epochs", "5"], "settings are words without dashes: trainer.max_epochs=VALUE"),
        (["pretrain", "--lr=0.1"], "without dashes: optimizer.lr=0.1"),
        (["pretrain", "--batch-size=8"], "without dashes: batch_size=8"),
        (["pretrain", "base_lr=0.1"], "there is no key 'base_lr'. Did you mean 'optimizer.lr'?"),
        (["pretrain", "optimizer.blr=0.1"], "Did you mean 'optimizer.lr'?"),
        (["pretrain", "method=mae", "mask_ratio=0.5"], "Did you mean 'method.mask_ratio'?"),
        (["knn", "run=last", "dims=[8]"], "Did you mean 'evaluator.dims'?"),
        (["pretrain", "epochs"], "not of the form key=value."),
        (["pretrain", "/"], "not of the form key=value; images of your own are dataset=folder dataset.root=/."),
        (["compare", "labels=[4]"], "Did you mean 'labels_per_class'?"),
        (["pretrain", "lr=0.1"], "Did you mean 'optimizer.lr'?"),
        (["pretrain", "model=resnet18"], "Did you mean 'backbone'?"),
        (["pretrain", "epochs=3"], "Did you mean 'trainer.max_epochs'?"),
        (["pretrain", "trainr.max_epochs=3"], "Did you mean 'trainer.max_epochs'?"),
        (["pretrain", "dataset.root=photos"], "belongs to dataset=cifar10, cifar100, fashion_mnist, folder,"),
        (["pretrain", "method.num_prototypes=30"], "belongs to method=deepclusterv2, swav."),
        (["pretrain", "schedule.lr=0.1"], "holds several values (schedule.lr.warmup_epochs"),
        (["pretrain", "schedule.lr=null"], "or leave it out: ~schedule.lr"),
        (["pretrain", "-m", "schedule.lr=0.1,0.2"], "holds several values"),
        (["pretrain", "-m", "seed=0,one"], "seed is 'one'; a number was expected"),
        (["pretrain", "batch_size=true"], "a number was expected"),
        (["pretrain", "trainer.max_epochs={a:1}"], "a number was expected"),
        (["pretrain", "trainer.accelerator=c(pu"], """put text in quotes: 'trainer.accelerator="c(pu"'."""),
        (["pretrain", "optimizer=null"], "cannot do without a choice of optimizer; choose from adam,"),
        (["pretrain", "~trainer"], "cannot do without a choice of trainer"),
        (["pretrain", "evaluator=dense_knn"], "no evaluator 'dense_knn' for pretrain"),
        (["knn", "evaluator=default"], "no evaluator 'default' for knn"),
        (["finetune", "recipe=cifar10/swav"], "recipe=cifar10/swav is one for `selfsight pretrain`"),
        (["pretrain", "resume=runs/one", "trainer.max_epochs=9"], "leave out trainer.max_epochs=9"),
        (["knn"], "run=runs/NAME"),
    ],
)
def test_a_wrong_word(capsys: pytest.CaptureFixture[str], words: list[str], expected: str) -> None:
    assert expected in fails(capsys, *words)


PATHS = (
    "d/ünï çode",
    "d/p(1)",
    "d/x=y",
    "d/a,b",
    "2024",
    "1_000",
    "1e3",
    "it's",
    'a "b"',
    "C:\\new",
    "d\\",
    "~/x",
    "{y}",
)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("key", ["name", "source", "weights", "dataset.root", "labels.list"])
def test_paths_and_names_are_what_is_typed(path: str, key: str) -> None:
    assert parse_override(f"{key}={path}", (), sweep=False).value == path


def test_paths_reach_the_configuration() -> None:
    cfg = cli.compose(
        "pretrain", cli.checked("pretrain", ["dataset=folder", "dataset.root=2024", "name=1e3"], sweep=False)
    )
    assert (cfg.dataset.root, cfg.name) == ("2024", "1e3")
    for word in ("weights=d/x=y", "backbone=d/x=y"):  # as it was called before
        assert cli.compose("knn", cli.checked("knn", [word], sweep=False)).weights == "d/x=y"


def test_what_is_no_path_in_the_place_of_one() -> None:
    """Nothing, quoted text, references, lists; a number where some data sets have one; and a sweep's commas."""
    typed = ["dataset=folder", "dataset.root=null", "dataset.test='a,b'", "name=${dataset.name}"]
    cfg = cli.compose("pretrain", cli.checked("pretrain", typed, sweep=False))
    assert (cfg.dataset.root, cfg.dataset.test, cfg.name) == (None, "a,b", "folder")
    shapes = cli.compose("pretrain", cli.checked("pretrain", ["dataset=shapes", "dataset.test=7"], sweep=False))
    assert shapes.dataset.test == 7
    runs = cli.compose("compare-runs", cli.checked("compare-runs", ["runs=[runs/a,runs/b]"], sweep=False)).runs
    assert list(runs) == ["runs/a", "runs/b"]
    assert cli.checked("knn", ["run=a b,null"], sweep=True) == ['run="a b",null']
    assert cli.checked("knn", ["run=choice(a,b)"], sweep=True) == ["run=choice(a,b)"]


def test_one_value_where_a_list_stands_is_a_list_of_one() -> None:
    def labels(word: str, sweep: bool = False) -> list[str]:
        return cli.checked("compare", [word], sweep=sweep)

    assert labels("labels_per_class=4") == ["labels_per_class=[4]"]
    assert labels("labels_per_class=[4,5]") == ["labels_per_class=[4,5]"]
    assert labels("labels_per_class=${seeds}") == ["labels_per_class=${seeds}"]
    assert labels("labels_per_class=4,[5,6]", sweep=True) == ["labels_per_class=[4],[5,6]"]
    assert list(cli.compose("compare", labels("approaches=swav")).approaches) == ["swav"]


def test_nothing_in_the_place_of_several_values_empties_it() -> None:
    emptied = cli.checked("pretrain", ["evaluator.final={}"], sweep=False)
    assert cli.compose("pretrain", emptied).evaluator.final == {}


def test_an_optimizer_by_name_comes_with_its_own_values() -> None:
    def optimizer(*words: str) -> dict[str, object]:
        found = cli.compose("pretrain", cli.checked("pretrain", list(words), sweep=False)).optimizer
        return {str(key): value for key, value in found.items() if value is not None}

    tuned, lars = optimizer(), optimizer("optimizer=lars")
    assert tuned["_target_"] == "torch.optim.AdamW"
    assert "momentum" not in tuned
    assert lars["_target_"] == "selfsight.optim.LARS"
    assert lars == optimizer("dataset=cifar10", "optimizer=lars")
    assert "betas" not in lars
    assert optimizer("optimizer=lars", "optimizer.lr=7")["lr"] == 7
    assert optimizer("optimizer=adamw", "optimizer=lars") == lars, "the last word of a group stands"
    assert (
        optimizer("method=fixmatch", "optimizer=adamw")["lr"] == optimizer("dataset=cifar10", "optimizer=adamw")["lr"]
    )
    with pytest.raises(UserError, match="try them one by one"):
        cli.checked("pretrain", ["optimizer=lars,adamw"], sweep=True)


def test_help_lists_jobs_and_choices(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--help"], ["-h"]):
        cli.main(words)
        told = capsys.readouterr().out
        for word in ("pretrain", "doctor", "simclrv2", "cifar10", "resnet50", "smoke", "usage"):
            assert word in told
    cli.main(["pretrain", "--help"])
    told = capsys.readouterr().out
    for word in ("method", "swav", "batch_size: 256", "resume", "few_shot", "cifar10/swav"):
        assert word in told
    for word in ("dense_knn", "few_labels", "spark_finetune"):
        assert word not in told, "of another job"


def test_any_timm_name_is_a_backbone() -> None:
    assert cli.checked("pretrain", ["backbone=regnety_002"], sweep=False) == [
        "backbone=timm",
        "backbone.name=regnety_002",
    ]


def test_help_is_quick_and_loads_no_torch() -> None:
    code = "import sys; from selfsight.cli import main; main(['--help']); assert 'torch' not in sys.modules"
    times = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    assert "hydra" not in code
    assert min(times) < 5, "help must not load the libraries"


def test_every_choice_composes() -> None:
    """Each method with its own values, each recipe with those of its job, and the choices of all other groups.

    What stands in a command on one of the pages is composed with the pages.
    """
    on_pages = {command for page in PAGES for command in commands(page)}
    typed = {word for command in on_pages for word in command.split()}
    for name in cli.choices("method", "pretrain"):
        if f"method={name}" not in typed:
            cli.compose("pretrain", [f"method={name}"])
    for name in cli.choices("recipe"):
        if f"recipe={name}" not in typed:
            cli.compose(str(catalogue.recipe_job(name)), [f"recipe={name}"])
    others = {group: cli.choices(group, "pretrain") for group in cli.GROUPS if group not in ("method", "recipe")}
    for i in range(max(map(len, others.values()))):  # these say nothing of each other
        words = {group: names[i] for group, names in others.items() if i < len(names)}
        made = cli.compose("pretrain", [f"{group}={name}" for group, name in words.items()]).choices
        assert {group: made[group] for group in words} == words


def test_every_recipe_says_its_job() -> None:
    """By which the help and the refusals know it; its first comment is the command."""
    for name in cli.choices("recipe"):
        job = catalogue.recipe_job(name)
        assert job in cli.JOBS, name
        assert f"selfsight {job} " in about(catalogue.file("recipe", name)), name


def test_a_recipe_that_takes_in_another_lets_go_of_what_a_method_lacks() -> None:
    """SimSiam's schedule has no warm-up; the recipe taken in sets one."""
    cfg = cli.compose("pretrain", ["recipe=continue", "method=simsiam"])
    assert "warmup_epochs" not in cfg.schedule.lr
    assert (cfg.optimizer.lr, cfg.batch_size, cfg.trainer.max_epochs) == (0.0002, "auto", "auto")


def test_conf_travels_with_the_package() -> None:
    assert (cli.conf_dir() / "pretrain.yaml").is_file()
    assert Path(cli.__file__).parent.name == "selfsight"


def test_what_a_run_tells_fits_into_eighty_columns() -> None:
    """Each number whole, each epoch and each row of the table in one line."""
    figures = {"loss": 13.10005, "knn_top1": 0.987, "view_knn_top1": 0.5, "rank": 512.04, "feature_std": 0.3}
    told = monitor.line(1000, 1000, figures, 12345.6, 3723)
    assert told == "epoch 1000/1000  loss 13.10  kNN 98.7%  rank 512.0  12346 images/s  1:02:03 left"
    assert len(told) == 80
    told = monitor.line(7, 200, {"loss": 0.012345, "rank": 3, "view_knn_top1": 0.25}, 98.7, 59)
    assert told == "epoch   7/200  loss 0.01235  rank 3.0  kNN of views 25.0%  99 images/s  0:59 left"

    shots = {k: {"mean": 0.6571, "std": 0.1234} for k in ("1", "5", "20")}
    row = {"knn_top1": 1.0, "linear_top1": 1.0, "rank": 512.04, "few_shot": shots}
    console = Console(file=io.StringIO(), width=80)
    tables.show_run(console, dict.fromkeys(tables.ROWS, row), {})
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= 80
    for label in tables.ROWS.values():
        (told,) = (line for line in lines if line.startswith(label))
        assert told.removeprefix(label).split() == ["100.0%", "100.0%", "512.0", *["65.7", "±", "12.3%"] * 3]


@pytest.mark.parametrize("loggers", [["logger=[csv,tensorboard]"], ["logger=csv", "logger=tensorboard"]])
def test_several_loggers_at_once_beside_other_values(loggers: list[str]) -> None:
    assert set(cli.compose("pretrain", [*loggers, "runs=x"]).logger) == {"tensorboard"}, "metrics.csv is always there"


def test_auto_stands_for_a_number_where_the_trainer_takes_it() -> None:
    """Beside `debug=smoke`, too, which has numbers there."""
    assert cli.compose("pretrain", ["debug=smoke", "trainer.devices=auto"]).trainer.devices == "auto"
    with pytest.raises(UserError, match=r"optimizer.lr is 'auto'; a number was expected"):
        cli.compose("pretrain", ["optimizer.lr=auto"])


def test_the_end_of_a_command_is_quiet(tmp_path: Path) -> None:
    """Whatever the libraries have to say when the interpreter ends."""
    command = [sys.executable, "-m", "selfsight", "pretrain", "debug=smoke", "report=false", f"runs={tmp_path}"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout.rstrip().endswith("backbone.safetensors")
