"""`selfsight prune`: which images of a data set to keep: a list to learn from, and a page of what goes."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console

from selfsight.composition.places import OF_FOLDERS
from selfsight.datamodules import ArrayImages, ImageData
from selfsight.datamodules.datasets.lists import lines_of
from selfsight.engine import measure
from selfsight.engine.options import PruneOptions
from selfsight.engine.pruning import chosen, scored
from selfsight.engine.reload import ALL, feature_cache, head_of
from selfsight.engine.subject import Subject, subject
from selfsight.errors import USAGE, UserError
from selfsight.files import place_to_write, with_folder, write_text
from selfsight.reporting.pruning import Pruned, pruning_page
from selfsight.runs.console import make_console
from selfsight.runs.folder import RunFolder

PAGE = ".html"


def run(cfg: DictConfig) -> None:
    """Score all images one may learn from, choose, and write the list and the page beside it."""
    options = PruneOptions.read(cfg)
    if cfg.stage == ALL:
        raise UserError(
            "stage is 'all', and images are told apart by one stage: name it, or leave it out.", status=USAGE
        )
    of = subject(cfg)
    data, out = of.data.data, place_of(cfg.out, of.folder, options)
    check_names(data)
    stage, head, cache = cfg.stage, head_of(cfg.stage, of.folder, of.backbone), feature_cache(of.folder, cfg.cache)
    features, images = measure.learnt_from(of.backbone, of.data, stage, head=head, cache=cache)
    found = scored(features, options, data)
    pruned = Pruned(images, features.indices, features.labels, found, chosen(found, features, options, data))
    paths = images.addresses(data.root or Path())
    write_text(with_folder(out), lines_of(sorted(paths[i] for i in features.indices[pruned.kept].tolist())))
    about = f"rule={options.rule} keep={options.keep:g} balance={options.balance:g}, {len(found.centroids)} prototypes"
    write_text(out.with_suffix(PAGE), pruning_page(data, pruned, about))
    tell(make_console(), of, pruned, out)


def place_of(out: str | None, folder: RunFolder | None, options: PruneOptions) -> Path:
    """Where the list goes.

    Raises:
        UserError: it is not said and there is no run folder, or the page beside it would take its place.
    """
    in_run = None if folder is None else folder.path / "pruned" / f"{options.rule}-{options.keep:g}.txt"
    path = place_to_write(out, in_run, "the list goes: out=kept.txt")
    if path.suffix == PAGE:
        raise UserError(f"out is '{path}', where the page beside the list goes; name the list, such as kept.txt.")
    return path


def check_names(data: ImageData) -> None:
    """
    Raises:
        UserError: images are known by their numbers, and not by paths.
    """
    sets = (data.train, data.unlabelled)
    if data.root is None or any(isinstance(images, ArrayImages) and images.names is None for images in sets):
        raise UserError(
            f"the images of '{data.name}' have numbers and no file names, so that no list can name them: prune a run "
            "on files of your own (dataset=folder dataset.root=DIR; with dataset.resident=false, if this is one)."
        )


def tell(console: Console, of: Subject, pruned: Pruned, out: Path) -> None:
    """How many images are kept, how even the classes are, and how the list is used."""
    data, node = of.data.data, of.dataset
    if node is None and of.folder is not None:
        node = of.folder.config().dataset
    console.print(f"{int(pruned.kept.sum()):,} of {len(pruned.kept):,} images kept: {out}", markup=False)
    before, after = pruned.counts(data.num_classes)
    if before.any():
        (was, now), there = pruned.evenness(data.num_classes), before > 0
        console.print(
            f"classes of {int(after[there].min()):,} to {int(after.max()):,} images, evenness {now:.2f}; they had "
            f"{int(before[there].min()):,} to {int(before.max()):,}, {was:.2f}",
            markup=False,
        )
    console.print(f"what goes, in pictures: {out.with_suffix(PAGE)}", markup=False)
    takes = node is not None and node.get("_target_") in OF_FOLDERS
    first = "the words of the run and" if takes else f"dataset=folder dataset.root={data.root}"
    console.print(f"to learn from what is kept: {first} dataset.only={out}", style="dim", markup=False)
