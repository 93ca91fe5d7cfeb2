"""Which images are labelled, and which image comes when: the rules of RotNet, SimMatchV2, USB and SparK."""

from __future__ import annotations

import torch

from selfsight.datamodules.datasets.splits import first_per_class, percent_counts, usb_split
from selfsight.datamodules.loading.order import Order

from .harness import Case, family


@family("rotation", "first_k_per_class")
def first_k_per_class(case: Case) -> None:
    labels = case.tensor("labels")
    kept = first_per_class(labels, [case.number("k")] * (int(labels.max()) + 1))
    case.compare("kept_indices", kept, 0)
    case.compare("kept_labels", labels[kept], 0)


@family("simmatchv2", "keep_percent")
def keep_percent(case: Case) -> None:
    labels = case.tensor("labels")
    available = torch.bincount(labels, minlength=case.number("num_classes"))
    for i, fraction in enumerate(case.inp["percents"].tolist()):
        kept = first_per_class(labels, percent_counts(available, fraction), by_class=True)
        case.compare(f"index{i}", kept, 0)


@family("simmatchv2", "usb_split")
def usb(case: Case) -> None:
    classes = case.number("num_classes")
    counts = [case.number("num_labels") // classes] * classes
    labelled, rest = usb_split(case.tensor("targets"), counts, case.number("seed"))
    case.compare("labeled_idx", labelled, 0)
    case.compare("unlabeled_idx", rest, 0)


@family("simmatchv2", "labeled_sampler", "usb_sampler")
def repeated_permutations(case: Case) -> None:
    world = case.number("world")
    examples = (
        case.number("num_samples_total")
        if "num_samples_total" in case.hp
        else case.number("num_samples_per_rank") * world
    )
    order = Order(case.number("dataset_len"), world, examples=examples, split="stride")
    epochs = [
        torch.stack([torch.cat(order.batches(epoch, rank, world)) for rank in range(world)])
        for epoch in case.inp["epochs"].tolist()
    ]
    case.compare("indices", torch.stack(epochs), 0)


@family("spark", "sampler_")
def infinite_batches(case: Case) -> None:
    world = case.number("world_size")
    order = Order(
        case.number("dataset_len"),
        case.number("global_batch"),
        seed=case.number("seed"),
        last="fill" if case.number("filling") else "keep",
        split="block",
    )
    assert order.steps == case.number("iters_per_epoch")
    for name in case.out:
        epoch, rank = (int(part.lstrip("epochrank")) for part in name.split("_"))
        case.compare(name, torch.cat(order.batches(epoch, rank, world)), 0)
