"""The numbers of MAE's authors (facebookresearch/mae)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

from selfsight.backbones.vision_transformer import DINOViT, MAEViT
from selfsight.contracts import Batch
from selfsight.losses.mae import masked_pixels
from selfsight.methods.base import Method
from selfsight.methods.finetune import FineTune
from selfsight.methods.mae import MAE
from selfsight.nn.mae_decoder import MAEDecoder
from selfsight.nn.patches import keep_count, patchify, random_patches, take_patches, unpatchify
from selfsight.nn.positions import resize_positions, sincos_2d
from selfsight.nn.probes import NormalisedLinear
from selfsight.nn.vit import visible_tokens
from selfsight.optim.groups import layer_decayed, layer_ids, split_no_decay
from selfsight.optim.lars import LARS
from selfsight.optim.recipe import OptimizationRecipe
from selfsight.optim.schedule import Clock, Cosine, Warmup

from .check_dino import compare_first_weights
from .check_optim import Named, steps, trajectory
from .check_schedule import nested
from .harness import Case, family
from .networks import NoBackbone, compare_state, one_epoch_steps, tiny_vit

TOLERANCE = 1e-9
THEIRS = (
    ("decoder.embed.", "decoder_embed."), ("decoder.blocks.", "decoder_blocks."), ("decoder.norm.", "decoder_norm."),
    ("decoder.pred.", "decoder_pred."), ("decoder.pos_embed", "decoder_pos_embed"),
    ("decoder.mask_token", "mask_token"), ("backbone.", ""),
)  # fmt: skip


def official(name: str) -> str:
    """A name of ours in the authors' words."""
    return next(new + name.removeprefix(old) for old, new in THEIRS if name.startswith(old))


def official_names(tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {official(name): value for name, value in tensors.items()}


def ours(name: str) -> str:
    """A name of theirs in our words."""
    return next(
        (old + name.removeprefix(new) for old, new in THEIRS if new and name.startswith(new)), f"backbone.{name}"
    )


# --- patches and masks -----------------------------------------------------------------------------------------------


@family("mae", "patchify_")
def patches(case: Case) -> None:
    p, images = case.number("patch_size"), case.tensor("images")
    case.compare("patches", patchify(images, p), 0)
    grid = images.shape[-2] // p, images.shape[-1] // p
    case.compare("images", unpatchify(case.tensor("patches"), grid, p), 0)


@family("mae", "masking_")
def masking(case: Case) -> None:
    x, noise = case.tensor("x"), case.tensor("noise")
    keep = keep_count(x.shape[1], case.number("mask_ratio"))
    chosen = random_patches(noise, keep)
    case.compare("len_keep", keep, 0)
    case.compare("x_masked", take_patches(x, chosen.visible), 0)
    case.compare("mask", chosen.mask, 0)
    case.compare("ids_restore", chosen.restore, 0)


@family("mae", "lenkeep_")
def kept(case: Case) -> None:
    lengths, ratios = case.inp["lengths"].tolist(), case.inp["ratios"].tolist()
    case.compare("len_keep", [[keep_count(length, ratio) for ratio in ratios] for length in lengths], 0)


@family("mae", "sincos_")
def positions(case: Case) -> None:
    grid, prefix = (case.number("grid_size"),) * 2, case.number("cls_token")
    case.compare("pos_embed", sincos_2d(grid, case.number("embed_dim"), first="column", prefix=prefix)[0], 1e-12)


@family("mae", "posinterp_")
def resized_positions(case: Case) -> None:
    new = (case.number("new_grid"),) * 2
    resized = resize_positions(case.tensor("pos_embed"), new, 1, rule="size", prefix=case.number("prefix_tokens"))
    case.compare("pos_embed", resized, TOLERANCE)


# --- model -----------------------------------------------------------------------------------------------------------


def vit_of(case: Case, kind: Any = MAEViT, **options: Any) -> Any:
    sizes = [case.number(name) for name in ("img_size", "patch_size", "embed_dim", "depth", "num_heads")]
    return tiny_vit(*sizes, kind, case.number("eps"), mlp_ratio=case.number("mlp_ratio"), **options)


def decoder_of(case: Case) -> MAEDecoder:
    p, sizes = case.number("patch_size"), ("dim", "depth", "heads")
    grid = (case.number("img_size") // p,) * 2
    theirs = {"dim": "decoder_embed_dim", "depth": "decoder_depth", "heads": "decoder_num_heads"}
    return MAEDecoder(
        case.number("embed_dim"), grid, p * p * 3, **{name: case.number(theirs[name]) for name in sizes},
        mlp_ratio=case.number("mlp_ratio"), eps=case.number("eps"),
    )  # fmt: skip


def method_of(case: Case) -> MAE:
    options = {"mask_ratio": case.number("mask_ratio")} if "mask_ratio" in case.hp else {}
    normalise = bool(case.number("norm_pix_loss")) if "norm_pix_loss" in case.hp else True
    method = MAE(
        vit_of(case), normalise_pixels=normalise, decoder_dim=4, decoder_depth=1, decoder_heads=1, **options
    )  # fmt: skip
    method.decoder = decoder_of(case)
    return method.double()


def load(method: MAE, case: Case) -> MAE:
    method.load_state_dict({ours(name): value for name, value in case.tensors("sd__").items()})
    return method


@family("mae", "encoder_")
def encoder(case: Case) -> None:
    vit = vit_of(case).double()
    vit.load_state_dict(case.tensors("sd__"))
    noise = case.tensor("noise")
    chosen = random_patches(noise, keep_count(noise.shape[1], case.number("mask_ratio")))
    case.compare("latent", visible_tokens(vit, case.tensor("images"), chosen.visible), TOLERANCE)
    case.compare("mask", chosen.mask, 0)
    case.compare("ids_restore", chosen.restore, 0)


@family("mae", "decoder_")
def decoder(case: Case) -> None:
    model, latent = decoder_of(case).double(), case.tensor("latent", requires_grad=True)
    model.load_state_dict({ours(n).removeprefix("decoder."): value for n, value in case.tensors("sd__").items()})
    prediction = model(latent, case.tensor("ids_restore"))
    (prediction * case.tensor("upstream")).sum().backward()
    case.compare("pred", prediction, TOLERANCE)
    case.compare("dlatent", latent.grad, TOLERANCE)
    found = {official(f"decoder.{name}"): p.grad for name, p in model.named_parameters()}
    compare_state(case, "grad__", found, TOLERANCE)


@family("mae", "loss_")
def loss(case: Case) -> None:
    prediction = case.tensor("pred", requires_grad=True)
    normalise = bool(case.number("norm_pix_loss"))
    value = masked_pixels(prediction, case.tensor("images"), case.tensor("mask"), normalise=normalise)
    value.backward()
    case.compare("loss", value, TOLERANCE)
    case.compare("grad_pred", prediction.grad, TOLERANCE)


@family("mae", "model_")
def model(case: Case) -> None:
    method, x = load(method_of(case), case), case.tensor("images")
    method.draw_noise = lambda _: case.tensor("noise")  # type: ignore[method-assign]
    value = method.training_step(Batch([x], torch.arange(len(x))), 0)["loss"]
    value.backward()
    result = method.reconstruct(x, case.tensor("noise"))
    case.compare("loss", value, TOLERANCE)
    case.compare("pred", result.prediction, TOLERANCE)
    case.compare("mask", result.patches.mask, 0)
    found = official_names({name: p.grad for name, p in method.named_parameters() if p.grad is not None})
    assert set(found) == {name.removeprefix("grad__") for name in case.out if name.startswith("grad__")}
    compare_state(case, "grad__", found, TOLERANCE)


@family("mae", "init_", slow=True)
def first_weights(case: Case) -> None:
    if case.number("kind") == "mae":
        compare_first_weights(case, lambda: method_of(case).float(), ours)
        return
    options = {"global_pool": "avg", "num_classes": case.number("num_classes")}
    compare_first_weights(case, lambda: vit_of(case, DINOViT, **options))


# --- optimisation ----------------------------------------------------------------------------------------------------


def warmed(case: Case, peak: float) -> Warmup:
    return Warmup(case.number("warmup_epochs"), 0.0, Cosine(1.0, case.number("min_lr") / peak))


@family("mae", "lr_")
def learning_rates(case: Case) -> None:
    clock, lr = one_epoch_steps(case.number("iters_per_epoch"), case.number("epochs")), case.number("lr")
    recipe = OptimizationRecipe(torch.optim.SGD, lr, {"lr": warmed(case, lr)})
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr_scale": scale} for scale in case.number("lr_scale")]
    optimizer, rows = recipe.build(groups, clock), []
    for step in case.inp["iteration"]:
        values = recipe.values(int(step), clock)
        recipe.apply(optimizer, values)
        rows.append([values["lr"], *(group["lr"] for group in optimizer.param_groups)])
    case.compare("lr", np.array(rows)[:, 0], TOLERANCE)
    case.compare("group_lr", np.array(rows)[:, 1:], TOLERANCE)


def shaped(case: Case) -> tuple[list[str], nn.Module]:
    """A module with the names of the case, each tensor of as many dimensions."""
    names = case.inp["names"].tolist()
    return names, nested({name: torch.zeros([1] * n) for name, n in zip(names, case.inp["ndim"].tolist(), strict=True)})


@family("mae", "groups_")
def groups(case: Case) -> None:
    names, module = shaped(case)
    for name, wanted in zip(names, case.inp["requires_grad"].tolist(), strict=True):
        module.get_parameter(name).requires_grad_(bool(wanted))
    decay = case.number("weight_decay")
    found = {
        id(p): g.get("weight_decay", decay) for g in split_no_decay(module, decay_places=True) for p in g["params"]
    }
    case.compare("weight_decay", [found.get(id(module.get_parameter(name)), -1) for name in names], 0)


@family("mae", "layerdecay_")
def layers(case: Case) -> None:
    names, module = shaped(case)
    ids, head = layer_ids(names)
    assert head == case.number("depth") + 1
    case.compare("layer_id", [ids[name] for name in names], 0)
    plain = tuple(timm.create_model("vit_tiny_patch16_224").no_weight_decay())
    decay, found = case.number("weight_decay"), {}
    by_layer = layer_decayed(module, case.number("layer_decay"), plain_names=plain)
    for group in by_layer:
        found |= {id(p): (group.get("lr_scale", 1.0), group.get("weight_decay", decay)) for p in group["params"]}
    rows = [found[id(module.get_parameter(name))] for name in names]
    case.compare("lr_scale", [row[0] for row in rows], TOLERANCE)
    case.compare("weight_decay", [row[1] for row in rows], 0)
    case.compare("number_of_groups", len(by_layer), 0)


@family("mae", "lars_")
def lars(case: Case) -> None:
    parameters = Named(case.tensors("param__"))
    optimizer = LARS(
        split_no_decay(parameters), lr=0.0, momentum=case.number("momentum"),
        weight_decay=case.number("weight_decay"), trust_coefficient=case.number("trust_coefficient"), variant="torch",
    )  # fmt: skip
    got = list(trajectory(parameters, optimizer, steps(case.tensors("grad__")), case.inp["lr"].tolist()))
    compare_state(case, "param__", {name: np.stack([after[name] for after in got]) for name in got[0]}, TOLERANCE)


# --- whole steps -----------------------------------------------------------------------------------------------------


def train(
    case: Case, method: Method, optimizer: Any, batches: Iterator[Batch], clip: float = 0.0
) -> Iterator[tuple[int, Tensor, list[float]]]:
    """Batches of which ``accum_iter`` make one step: number of the step, loss and rates after each of them."""
    n, accumulate = case.number("iters_per_epoch"), case.number("accum_iter") if "accum_iter" in case.hp else 1
    clock = Clock(1, case.number("batch_size") * accumulate, case.number("epochs"), n // accumulate)
    blr = case.number("blr")
    peak = OptimizationRecipe(optimizer, blr, scaling="linear").peak_lr(clock.batch_size)
    recipe = OptimizationRecipe(optimizer, blr, {"lr": warmed(case, peak)}, "linear")
    built = method.configure(recipe, clock).configure_optimizers()
    for i, batch in enumerate(batches):
        method.begin_step(i // accumulate)
        loss = method.training_step(batch, i)["loss"]
        (loss / accumulate).backward()
        if (i + 1) % accumulate == 0:
            if clip:
                nn.utils.clip_grad_norm_(method.parameters(), clip)
            built.step()
            built.zero_grad()
            method.end_step()
        yield i // accumulate, loss.detach(), [group["lr"] for group in built.param_groups]


@family("mae", "steps_")
def training(case: Case) -> None:
    method, images, noise = load(method_of(case), case), case.tensor("images"), case.tensor("noise")
    numbers = iter(range(len(noise)))
    method.draw_noise = lambda _: noise[next(numbers)]  # type: ignore[method-assign]
    optimizer = partial(torch.optim.AdamW, betas=tuple(case.number("betas")), weight_decay=case.number("weight_decay"))
    batches = (Batch([x], torch.arange(len(x))) for x in images)
    accumulate, losses, rates, lengths = case.number("accum_iter"), [], [], []
    for i, (_, value, groups) in enumerate(train(case, method, optimizer, batches)):
        losses.append(value)
        rates.append(groups[0])
        trained = [p.detach().flatten() for p in method.parameters() if p.requires_grad]
        lengths.append(torch.cat(trained).norm())
        if i + 1 == 2 * accumulate:
            compare_state(case, "second__", official_names(method.state_dict()), 1e-7)
    case.compare("loss", torch.stack(losses), 1e-7)
    case.compare("lr", rates, TOLERANCE)
    case.compare("parameter_norm", torch.stack(lengths), 1e-7)
    compare_state(case, "sd__", official_names(method.state_dict()), 1e-7)


def classifier_of(case: Case, **options: Any) -> FineTune:
    pool = "avg" if case.number("global_pool") else "token"
    return FineTune(
        vit_of(case, global_pool=pool, kind=timm.models.VisionTransformer), projector=None, layer=0,
        num_classes=case.number("num_classes"), freeze_projector=True, freeze_after=-1, frozen_statistics=True,
        classifier_decay=0.0, plain_classifier=False, **options,
    ).double()  # fmt: skip


HEAD = (("head.", "classifier."), ("", "backbone."))
HEAD_BACK = (("classifier.", "head."), ("backbone.", ""))


def finetune_names(tensors: Mapping[str, Any], pairs: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    return {next(new + n.removeprefix(old) for old, new in pairs if n.startswith(old)): v for n, v in tensors.items()}


@family("mae", "vitft_")
def classifier(case: Case) -> None:
    method = classifier_of(case)
    method.load_state_dict(finetune_names(case.tensors("sd__"), HEAD))
    x = case.tensor("images")
    logits = method(x)
    (logits * case.tensor("upstream")).sum().backward()
    case.compare("logits", logits, TOLERANCE)
    case.compare("features", method.selected(x), TOLERANCE)
    found = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
    compare_state(case, "grad__", finetune_names(found, HEAD_BACK), TOLERANCE)


class GivenTargets(FineTune):
    """Images come mixed already, with their targets."""

    given: Tensor | None = None

    def mixed(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return super().mixed(x, y) if self.given is None else (x, self.given)


@family("mae", "finetune_")
def finetuning(case: Case) -> None:
    soft, targets = case.number("soft"), case.tensor("targets")
    method = classifier_of(
        case, layer_decay=case.number("layer_decay"), label_smoothing=0.0 if soft else case.number("smoothing")
    )
    method.__class__ = GivenTargets
    method.load_state_dict(finetune_names(case.tensors("sd__"), HEAD))
    optimizer = partial(torch.optim.AdamW, weight_decay=case.number("weight_decay"))

    def batches() -> Iterator[Batch]:
        for x, y in zip(case.tensor("images"), targets, strict=True):
            if soft:
                method.given = y  # type: ignore[assignment]
            yield Batch([x], torch.arange(len(x)), torch.zeros(len(x), dtype=torch.int64) if soft else y)

    rows = list(train(case, method, optimizer, batches(), case.number("clip_grad")))
    case.compare("loss", torch.stack([value for _, value, _ in rows]), 1e-7)
    case.compare("lowest_lr", [min(rates) for _, _, rates in rows], TOLERANCE)
    case.compare("highest_lr", [max(rates) for _, _, rates in rows], TOLERANCE)
    compare_state(case, "sd__", finetune_names(method.state_dict(), HEAD_BACK), 1e-7)


class Probe(Method):
    """A head on a frozen network, the whole of it in training mode."""

    def __init__(self, vit: nn.Module, head: nn.Module) -> None:
        super().__init__(NoBackbone())
        self.vit, self.head = vit.requires_grad_(False), head

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        assert batch.labels is not None
        return {"loss": nn.functional.cross_entropy(self.head(self.vit(batch.views[0])), batch.labels)}


@family("mae", "linprobe_")
def linear_probe(case: Case) -> None:
    pool = "avg" if case.number("global_pool") else "token"
    vit = vit_of(case, timm.models.VisionTransformer, global_pool=pool)
    method = Probe(vit, NormalisedLinear(case.number("embed_dim"), case.number("num_classes"))).double()
    recorded = case.tensors("sd__")
    head = {n.removeprefix("head."): v for n, v in recorded.items() if n.startswith("head.")}
    method.head.load_state_dict(head)
    method.vit.load_state_dict({n: v for n, v in recorded.items() if not n.startswith("head.")})
    optimizer = partial(LARS, momentum=0.9, weight_decay=case.number("weight_decay"), variant="torch")
    batches = (
        Batch([x], torch.arange(len(x)), y) for x, y in zip(case.tensor("images"), case.tensor("targets"), strict=True)
    )
    rows = list(train(case, method, optimizer, batches))
    case.compare("loss", torch.stack([value for _, value, _ in rows]), TOLERANCE)
    case.compare("lr", [rates[0] for _, _, rates in rows], TOLERANCE)
    trained = [name for name, p in method.named_parameters() if p.requires_grad]
    case.compare("trainable", np.array(trained), 0)
    compare_state(case, "sd__", {f"head.{n}": v for n, v in method.head.state_dict().items()}, TOLERANCE)
    method.eval()
    case.compare("logits_val", method.head(method.vit(case.tensor("images_val"))), TOLERANCE)
