"""`selfsight <job> key=value …`: finds the job, composes its configuration from the words, runs it.

Light on imports: `selfsight --help` loads neither torch nor Hydra.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import NoReturn

from selfsight.compat import without_signals
from selfsight.composition.catalogue import GROUPS, JOBS, POSITIONAL, choices, conf_dir, job_of, searching
from selfsight.composition.chosen import group_choice
from selfsight.composition.help import INFO
from selfsight.composition.keys import CALLED_ELSEWHERE
from selfsight.composition.overrides import checked, compose
from selfsight.composition.words import hydra_words, quoted
from selfsight.errors import USAGE, UserError, nearest
from selfsight.runs.processes import INTERRUPTED, TASK_VARIABLE, first_has_ended, on_first_process

__all__ = ["GROUPS", "JOBS", "checked", "choices", "compose", "conf_dir", "group_choice", "main", "run"]

#: options by the names that Hydra gives them
FLAGS = {
    "-h": "help", "--help": "help", "--version": "version", "-m": "multirun", "--multirun": "multirun",
    "-r": "run", "--run": "run", "--resolve": "resolve", "-sc": "shell_completion",
    "--shell-completion": "shell_completion",
}  # fmt: skip
VALUED = {
    "-c": "cfg", "--cfg": "cfg", "-p": "package", "--package": "package", "-i": "info", "--info": "info",
    "-cd": "config_dir", "--config-dir": "config_dir", "-cn": "config_name", "--config-name": "config_name",
}  # fmt: skip


@dataclass
class Flags:
    """The options of a command: switches by name, and those that have a value."""

    switches: set[str] = field(default_factory=set)
    values: dict[str, str] = field(default_factory=dict)
    config_dirs: list[str] = field(default_factory=list)


def main(argv: list[str] | None = None) -> None:
    """Entry point of the console script."""
    words = list(sys.argv[1:] if argv is None else argv)
    with noted_interrupts() as pressed:
        try:
            run(words)
        except KeyboardInterrupt:
            tell_interrupt()
        except BrokenPipeError:  # the reader of our output went away
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except Exception as error:
            if pressed:
                tell_interrupt()
            if not on_first_process() and first_has_ended():  # and has said why; here it is the same, or its end alone
                sys.exit(1)
            if not isinstance(error, UserError):
                raise
            print(f"selfsight: {error}", file=sys.stderr)
            sys.exit(error.status)


@contextlib.contextmanager
def noted_interrupts() -> Iterator[list[int]]:
    """A list that grows by every Ctrl-C meanwhile: libraries turn the exception it raises into errors of theirs."""
    pressed: list[int] = []

    def interrupted(number: int, frame: FrameType | None) -> None:
        pressed.append(number)
        signal.default_int_handler(number, frame)

    before = signal.getsignal(signal.SIGINT)
    ours = before is signal.default_int_handler and threading.current_thread() is threading.main_thread()
    if ours:
        signal.signal(signal.SIGINT, interrupted)
    try:
        yield pressed
    finally:
        if ours:
            signal.signal(signal.SIGINT, before)


def tell_interrupt() -> NoReturn:
    if on_first_process():
        print("selfsight: interrupted", file=sys.stderr)
    sys.exit(INTERRUPTED)


def run(words: list[str]) -> None:
    """Do what a command line says."""
    if os.getcwd() not in sys.path:  # at the end, where no file of a person's own hides a library
        sys.path.append(os.getcwd())
    if TASK_VARIABLE in os.environ:
        from selfsight.jobs.launch import do_given_task

        do_given_task()
        return
    flags, words = split_flags(words)
    with searching(flags.config_dirs):
        command(flags, words)


def command(flags: Flags, words: list[str]) -> None:
    """What the words say, on the search path that the options say."""
    from selfsight.composition import help as told

    if "version" in flags.switches:
        from selfsight import __version__

        print(__version__)
        return
    if "shell_completion" in flags.switches:
        told.complete(words)
        return
    if not words or words[0] == "help":
        print(told.help_text(), end="")
        return
    job, words = words[0], words[1:]
    if job not in JOBS:
        raise UserError(f"there is no job '{job}'; the jobs are {', '.join(JOBS)}.{nearest(job, JOBS)}", status=USAGE)
    name = configuration(job, flags.values.get("config_name"))
    if job in POSITIONAL and (folders := [word for word in words if "=" not in word]):
        listed = ",".join(quoted(folder) for folder in folders)
        words = [*(word for word in words if word not in folders), f"{POSITIONAL[job]}=[{listed}]"]
    if "help" in flags.switches:
        print(told.job_help(name) + (told.choice_help(name, words) if words else ""), end="")
        return
    many, places, words = hydra_words(name, words, many="multirun" in flags.switches, run=not flags.values)
    with searching(places):
        obey(flags, name, words, many=many)


def obey(flags: Flags, name: str, words: list[str], *, many: bool) -> None:
    """Print what ``--cfg`` or ``--info`` ask for, or run the job, once or in all combinations."""
    from selfsight.composition import help as told

    if kind := flags.values.get("cfg"):
        resolve = "resolve" in flags.switches
        print(told.show_cfg(name, words, kind, flags.values.get("package"), resolve=resolve), end="")
        return
    if kind := flags.values.get("info"):
        told.show_info(name, words, kind)
        return
    if many:
        from selfsight.jobs.sweep import sweep

        sweep(name, checked(name, words, sweep=True))
        return
    from selfsight.composition.overrides import checked_and_composed, finish
    from selfsight.jobs.launch import check, module_of, start

    with no_collection(), without_signals():
        overrides, composed = checked_and_composed(name, words)
        check(job_of(name), composed.cfg)  # before the things configured are imported
        cfg = finish(name, composed, overrides)
        module_of(job_of(name))
    start(job_of(name), cfg)


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """While libraries are imported the garbage collector rests, since what they leave stays.

    It would take a seventh of the time to the first step otherwise.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def configuration(job: str, name: str | None) -> str:
    """The name of the configuration that a job is composed from: its own, or the person's.

    Raises:
        UserError: the person's belongs to another job.
    """
    if name is None:
        return job
    name = name.removesuffix(".yaml")
    if (found := job_of(name)) != job:
        raise UserError(f"the configuration '{name}' is one for `selfsight {found}`.", status=USAGE)
    return name


def split_flags(words: Sequence[str]) -> tuple[Flags, list[str]]:
    """The options in the words, wherever they stand, and the other words.

    Raises:
        UserError: there is no such option, or it has no value or a wrong one.
    """
    flags, rest, waiting = Flags(), [], list(words)
    while waiting:
        word = waiting.pop(0)
        name, equals, value = word.partition("=")
        if not word.startswith("-"):
            rest.append(word)
        elif word in FLAGS:
            flags.switches.add(FLAGS[word])
        elif name in VALUED:
            option = VALUED[name]
            if not equals:
                follows = bool(waiting) and (option != "info" or waiting[0] in INFO)
                value = waiting.pop(0) if follows else "all" if option == "info" else ""
            if value == "" or value not in {"cfg": ("job", "hydra", "all"), "info": INFO}.get(option, (value,)):
                expected = {"cfg": "job, hydra or all", "info": ", ".join(INFO)}.get(option, "a value after it")
                raise UserError(f"{name} is '{value}'; {expected} was expected.", status=USAGE)
            if option == "config_dir":
                flags.config_dirs.append(value)
            else:
                flags.values[option] = value
        else:
            known = [option for option in (*FLAGS, *VALUED) if option.startswith("--")]
            key = name.strip("-").replace("-", "_")
            if word.startswith("--") and (key in CALLED_ELSEWHERE or not nearest(name, known)):
                raise UserError(
                    f"'{word}' is no option; settings are words without dashes: {CALLED_ELSEWHERE.get(key, key)}="
                    f"{value or 'VALUE'}.",
                    status=USAGE,
                )
            raise UserError(
                f"'{word}' is no option; options are -m and {', '.join(known)}; everything else is key=value."
                f"{nearest(name, known)}",
                status=USAGE,
            )
    return flags, rest


if __name__ == "__main__":
    main()
