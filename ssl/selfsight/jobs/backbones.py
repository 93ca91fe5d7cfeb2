"""`selfsight backbones`: which kinds of network learn by which methods, told by one step of each."""

from __future__ import annotations

import contextlib
import copy
import functools
import multiprocessing
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from omegaconf import DictConfig
from rich.console import Console
from torch import nn

from selfsight.backbones.families import FAMILIES, LEFT_OUT, Family
from selfsight.backbones.interface import check_sizes, feature_map, one_line
from selfsight.backbones.registry import create
from selfsight.composition.catalogue import choices
from selfsight.composition.overrides import compose
from selfsight.contracts import Backbone, Batch, SemiBatch
from selfsight.datamodules import DataModule
from selfsight.datamodules.loading.loader import cores
from selfsight.engine import build, checks
from selfsight.engine.sizes import length
from selfsight.errors import USAGE, UserError, nearest
from selfsight.files import write_text
from selfsight.methods.base import Method
from selfsight.optim.recipe import OptimizationRecipe
from selfsight.optim.schedule import Clock
from selfsight.runs.console import make_console, make_table, quiet

#: a method for each thing that methods ask of a network: features of views of one size and of several, of turned
#: images, maps, maps of half the image, an average of the network, patches; others ask for what one of these does
METHODS = ("simclrv2", "supcon", "swav", "rotation", "pixpro", "spark", "simmatchv2", "mae")
#: words that a method needs besides: small views of half the side, some labels
EXTRA = {"swav": ["views.local.size=0.5"], "simmatchv2": ["labels.per_class=1", "datamodule.mu=1"]}
#: sides of the images that are tried, until the network takes them and its last map has more than one cell
SIDES = (32, 64, 96, 56, 128, 160, 192, 224, 256)
WORTH_A_PROCESS = 8  # families: it takes some seconds to begin
WIDTH = 140  # of the table on the screen
LARGEST = 120e6  # parameters; more do not take a step in the time and memory that all the others need
BEGIN, END = "<!-- table of `selfsight backbones` -->", "<!-- end of the table -->"


class Setting(NamedTuple):
    """What a method takes its step on."""

    cfg: DictConfig
    data: DataModule
    recipe: OptimizationRecipe
    length: Clock
    batch: Batch | SemiBatch


@dataclass(frozen=True)
class Row:
    """
    Attributes:
        parameters: of the smallest member. side: of the images of the step; None where no size will do.
        several: it takes images of half that side, too.
        refusals: by method, why its step did not go through; empty where it did.
    """

    family: Family
    parameters: int
    side: int | None
    several: bool
    refusals: Mapping[str, str]


def run(cfg: DictConfig) -> None:
    """Take the steps, show the table, write it where a file is named."""
    quiet()
    console = make_console()
    families, methods = named(cfg.families), methods_of(cfg.methods)
    rows = []
    with console.status("") as status, workers(len(families)) as map_over:
        for row in map_over(functools.partial(tried, methods=methods), families):
            rows.append(row)
            status.update(f"{row.family.title} ({len(rows)} of {len(families)})")
    show(console, rows, methods)
    if cfg.families:
        for family in families:
            console.print(f"\n{family.title}: {', '.join(family.members())}", markup=False)
    if cfg.out is not None:
        path = Path(cfg.out).expanduser()
        if not path.parent.is_dir():
            raise UserError(f"there is no folder '{path.parent}' to write '{path.name}' into; make it first.")
        write_text(path, inserted(path.read_text() if path.is_file() else "# Backbones\n", markdown(rows, methods)))
        console.print(f"table: {path}", markup=False)


@contextlib.contextmanager
def workers(jobs: int) -> Iterator[Callable[..., Iterator[Row]]]:
    """A `map` over processes, one a core, in the order of what it is given; small steps leave a second core idle."""
    processes = min(jobs // WORTH_A_PROCESS, cores())
    if processes < 2:
        yield map
        return
    context = multiprocessing.get_context("spawn")  # forked, a process would wait for threads that are not there
    with ProcessPoolExecutor(processes, context, initializer=_begin_worker) as pool:
        yield pool.map


def _begin_worker() -> None:
    quiet()
    torch.set_num_threads(1)


def named(words: Sequence[str]) -> list[Family]:
    """The families that are meant: by their titles, parts of them, or the name of a member.

    Raises:
        UserError: there is no such family; names the nearest.
    """
    found: list[Family] = []
    titles = {_plain(family.title): family for family in FAMILIES}
    for word in words:
        plain = _plain(str(word))
        chosen = [titles[plain]] if plain in titles else [f for title, f in titles.items() if plain in title]
        chosen = chosen or [family for family in FAMILIES if str(word) in family.members()]
        if not chosen:
            known = [family.title for family in FAMILIES]
            raise UserError(f"there is no family of networks '{word}'.{nearest(str(word), known)}", status=USAGE)
        found += [family for family in chosen if family not in found]
    return found or list(FAMILIES)


def methods_of(words: Sequence[str] | None) -> list[str]:
    """The methods that are tried.

    Raises:
        UserError: there is no such method; names the nearest.
    """
    known = choices("method")
    if words is None:
        return [name for name in METHODS if name in known]
    for word in words:
        if word not in known:
            raise UserError(f"there is no method '{word}'.{nearest(str(word), known)}", status=USAGE)
    return list(words)


# --- steps -----------------------------------------------------------------------------------------------------------


def tried(family: Family, methods: Iterable[str]) -> Row:
    """A step of each method with the family's smallest member."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in create(family.smallest).parameters())
    if parameters > LARGEST:
        reason = f"was not tried: its smallest member has {parameters / 1e6:.0f} million parameters"
        return Row(family, parameters, None, False, dict.fromkeys(methods, reason))
    side, reason = smallest_side(family.smallest)
    if side is None:
        return Row(family, parameters, None, False, dict.fromkeys(methods, reason))
    torch.manual_seed(0)
    net = create(family.smallest, image_size=side)
    kind = re.compile(rf"\b(?:an? )?{type(net).__name__}\b")
    refusals = {method: kind.sub("the network", refusal(method, net, side)) for method in methods}
    return Row(family, parameters, side, takes(net, side // 2), refusals)


def smallest_side(name: str) -> tuple[int | None, str]:
    """The first of `SIDES` that a network takes, if possible with more than one cell in its map; None, and why not."""
    reason, fits = "", None
    for side in SIDES:
        try:
            with torch.device("meta"):
                net = create(name, image_size=side).eval()
                check_sizes(net, [side])
                cells = _cells(net, side)
        except UserError as error:
            reason = str(error)
            continue
        fits = fits or side
        if cells > 1:
            return side, ""
    return fits, "" if fits else reason


def _cells(net: Backbone, side: int) -> int:
    try:
        return feature_map(net, torch.empty(1, 3, side, side)).shape[2:].numel()
    except UserError:  # it has no map, and so none that is too small
        return 2


def takes(net: Backbone, side: int) -> bool:
    try:
        check_sizes(net, [side])
    except UserError:
        return False
    return True


def refusal(method: str, net: Backbone, side: int) -> str:
    """Why a method cannot take a step with a copy of a network; empty where it can."""
    try:
        at = setting(method, side)
        learner = build.method(at.cfg, at.data, backbone=copy.deepcopy(net))
        if any(view.size != side for view in at.data.views):  # that it takes this side is known
            checks.check_sizes(learner, at.data)
        learner.configure(at.recipe, at.length)
        step(learner, at.batch)
        return "" if moved(net, learner.backbone) else "the network stays as it was"
    except UserError as error:
        return str(error)
    except Exception as error:  # the table says what fails, whatever it is
        return f"fails: {type(error).__name__}: {one_line(error)}"


@functools.cache
def setting(method: str, side: int) -> Setting:
    """A method's own configuration, and a small batch of digits of that side; of two sizes for multi-crop."""
    words = [f"method={method}", "dataset=digits", f"dataset.image_size={side}", "debug=smoke", "batch_size=2"]
    words += EXTRA.get(method, [])
    cfg = compose("pretrain", words)
    data = build.datamodule(cfg)
    batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    return Setting(cfg, data, build.recipe(cfg), length(cfg, data), batch)


def step(learner: Method, batch: Batch | SemiBatch) -> None:
    """What a trainer does in its second step, when schedules have begun; by plain gradient descent.

    Raises:
        UserError: the loss is not finite.
    """
    learner.train()
    optimizer = torch.optim.SGD(learner.parameters(), lr=1e-3)
    learner.begin_step(1)
    loss = learner.training_step(batch, 0)["loss"]
    if not bool(loss.isfinite()):
        raise UserError("its loss is not finite")
    loss.backward()
    learner.on_after_backward()
    optimizer.step()
    learner.end_step()


def moved(before: nn.Module, after: nn.Module) -> bool:
    """Whether a step has changed any weight of a network."""
    weights = dict(before.named_parameters())
    return any(not torch.equal(weights[name], p) for name, p in after.named_parameters() if name in weights)


# --- the table -------------------------------------------------------------------------------------------------------


def cells(row: Row, methods: Iterable[str]) -> list[str]:
    """The columns of a row: family, smallest member, million parameters, pixels, sizes, and a mark for each method."""
    sizes = "" if row.side is None else "several" if row.several else "one"
    marks = ["–" if row.refusals[method] else "✓" for method in methods]
    side = "" if row.side is None else str(row.side)
    return [row.family.title, row.family.smallest, f"{row.parameters / 1e6:.1f}", side, sizes, *marks]


TITLES = ("family", "smallest member", "M parameters", "pixels", "sizes")


def reasons(rows: Iterable[Row], methods: Iterable[str]) -> list[str]:
    """A line for each reason why a method and some families do not go together."""
    found: dict[tuple[str, str], list[str]] = {}
    for method in methods:
        for row in rows:
            if row.refusals[method]:
                found.setdefault((method, row.refusals[method]), []).append(row.family.title)
    merged: dict[tuple[str, tuple[str, ...]], list[str]] = {}  # what holds for all methods is said once
    for (method, reason), families in found.items():
        merged.setdefault((reason, tuple(families)), []).append(method)
    return [f"{', '.join(names)} · {', '.join(families)}: {reason}" for (reason, families), names in merged.items()]


def show(console: Console, rows: Sequence[Row], methods: Sequence[str]) -> None:
    """The table on the screen, and below it why not."""
    table = make_table(*TITLES, *methods)
    for row in rows:
        table.add_row(*cells(row, methods))
    console.print(table, width=max(console.width, WIDTH))
    for line in reasons(rows, methods):
        console.print(f"  {line}", style="dim", markup=False)


def markdown(rows: Sequence[Row], methods: Sequence[str]) -> str:
    """The table as Markdown, with the reasons and the networks that are left out."""
    header = [*TITLES, *methods]
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    lines += [f"| {' | '.join(cells(row, methods))} |" for row in rows]
    lines += ["", "Why not:", "", *(f"- {line}" for line in reasons(rows, methods))]
    lines += ["", "Left out, because timm lacks them and they are longer than a page; nearest:", ""]
    lines += [f"- {name}: {instead}" for name, instead in LEFT_OUT.items()]
    return "\n".join(lines)


def inserted(page: str, table: str) -> str:
    """A page with the table in its place, or at its end."""
    block = f"{BEGIN}\n\n{table}\n\n{END}"
    if BEGIN in page and END in page:
        before, _, rest = page.partition(BEGIN)
        return before + block + rest.partition(END)[2]
    return f"{page.rstrip()}\n\n{block}\n"


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())
