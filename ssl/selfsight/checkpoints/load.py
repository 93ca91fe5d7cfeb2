"""A trained backbone, back in two lines:

import selfsight
backbone = selfsight.load("runs/simclrv2-digits-1")
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from selfsight.checkpoints import hub
from selfsight.checkpoints.authors import refuse_what_is_no_file_of_weights
from selfsight.checkpoints.export import CHECKSUM, DESCRIPTION, WEIGHTS, is_ours, name_of
from selfsight.contracts import Backbone
from selfsight.errors import UserError, nearest
from selfsight.trust import NOBODY, Trust, check, trusting

AUTHORS = "authors:"  #: before the path of a checkpoint of others, in so many words
OURS = (".safetensors", ".json")


def load(path: str | Path, *, trust: bool = False) -> Backbone:
    """The backbone of a run folder, frozen and in eval mode, on the CPU.

    Args:
        path: a folder with ``backbone.safetensors`` and ``backbone.json``, or one of these files; a folder that
            ``selfsight export format=hub`` has written; or ``hf-hub:PERSON/MODEL`` on the Hugging Face Hub.
        trust: build whatever the description names; only for a folder whose maker you know.

    Returns:
        The network, timm's interface; ``net.spec`` is the description (``image_size``, ``mean``, ``std``, ``method``).

    Raises:
        UserError: a file is missing, cannot be read, or holds the weights of another network.
    """
    weights_file, spec = describe(path)
    with trusting(Trust(everything=trust)), trusting(getattr(path, "trust", NOBODY)):  # of a `selfsight.Run`
        net = _network(spec, path)
    weights = _read(weights_file, spec)
    _check(weights, net.state_dict(), weights_file, f"'{name_of(spec['backbone'])}' its description names")
    dtype = next((v.dtype for v in weights.values() if v.is_floating_point()), None)
    net.to(dtype).load_state_dict(weights)
    net.spec = spec
    return net.eval().requires_grad_(False)


def _network(spec: Mapping[str, Any], path: str | Path) -> Backbone:
    """The network that a description names, with the weights it begins with.

    Raises:
        UserError: it is a person's own, and its code is not to be had here or takes other arguments.
    """
    from selfsight.backbones.interface import one_line, wrap
    from selfsight.backbones.registry import create

    arguments = dict(spec["backbone"])
    check({"backbone": arguments}, path)
    if "pretrained" in arguments or is_ours(arguments):
        arguments["pretrained"] = False
    if is_ours(arguments):
        return create(**{name: value for name, value in arguments.items() if not name.startswith("_")})
    from hydra.utils import instantiate

    try:
        made = instantiate(arguments, _convert_="all")
    except Exception as error:  # it is somebody's own code
        cause = error.__cause__ or error
        raise UserError(
            f"'{path}' holds the weights of '{name_of(arguments)}', which cannot be made here ({one_line(cause)}): its "
            "module has to be importable, as it was in training."
        ) from error
    return wrap(made, image_size=spec.get("image_size") or 64)


def start_from(net: nn.Module, path: str | Path) -> nn.Module:
    """``net`` with the weights of the backbone at ``path``, in place, to train on from there.

    Args:
        path: as for `load`; or a checkpoint of others, which `selfsight.checkpoints.formats` recognises, with
            ``authors:`` before it or without.

    Raises:
        UserError: as `load`, and weights of another network than ``net``.
    """
    if (file := of_others(path)) is not None:
        from selfsight.checkpoints import formats

        net.load_state_dict(formats.read(file, net=net).backbone)
        return net
    file, spec = describe(path)
    weights = _resized(_read(file, spec), net, spec, path)
    try:
        _check(weights, net.state_dict(), file, "backbone of this run")
    except UserError as error:
        raise UserError(f"{error} It is that of {words_of(spec['backbone'])}.") from None
    net.load_state_dict(weights)
    return net


def words_of(arguments: Mapping[str, object]) -> str:
    """``backbone=resnet18 backbone.stem=cifar``: how a network is chosen on the command line."""
    if not is_ours(arguments):
        return f"backbone._target_={arguments['_target_']}"
    beside = ("name", "pretrained", "image_size")
    changed = [f"backbone.{k}={v}" for k, v in beyond_defaults(arguments).items() if k not in beside]
    return " ".join([f"backbone={arguments['name']}", *changed])


def beyond_defaults(arguments: Mapping[str, object]) -> dict[str, object]:
    """The arguments of `selfsight.backbones.registry.create` that are not its defaults."""
    from selfsight.backbones.registry import create

    usual = {name: parameter.default for name, parameter in inspect.signature(create).parameters.items()}
    return {k: v for k, v in arguments.items() if k != "_target_" and (k not in usual or v != usual[k])}


def _resized(
    weights: dict[str, Tensor], net: nn.Module, spec: Mapping[str, Any], path: str | Path
) -> Mapping[str, Any]:
    """The weights, position embeddings and the like resized (as timm does it) where ``net`` is for other images.

    Raises:
        UserError: they are for images of another size, and this kind of network cannot be changed from one to another.
    """
    wanted = net.state_dict()
    if wanted.keys() != weights.keys() or all(wanted[name].shape == weights[name].shape for name in wanted):
        return weights
    from selfsight.backbones.interface import one_line, usual_size

    source = cast(Any, _network(spec, path))
    before, after = usual_size(source), usual_size(net)
    if before == after or type(source) is not type(net) or _indifferent(source, after):
        return weights
    try:
        source.load_state_dict(weights)
        getattr(source, "set_input_size")(img_size=(after, after))  # noqa: B009 - not every network has it
    except (RuntimeError, AttributeError, AssertionError, ValueError, TypeError) as error:
        raise UserError(
            f"'{path}' was trained on images of {before} x {before} pixels, and a {type(net).__name__} cannot be "
            f"changed to {after} x {after} ({one_line(error)}): set dataset.image_size={before}."
        ) from error
    resized: Mapping[str, Any] = source.state_dict()
    return resized


def _indifferent(net: nn.Module, size: int) -> bool:
    """Whether a network takes images of a size as it is, so that none of its tensors depends on the size."""
    from selfsight.backbones.interface import check_sizes

    if hasattr(net, "set_input_size"):  # positions are made for a size, and may be resized in each forward pass
        return False
    try:
        check_sizes(net, [size])
    except UserError:
        return False
    return True


def of_others(path: str | Path) -> Path | None:
    """The file that ``path`` names where it is no backbone of ours; None where it is one, or a folder of one."""
    from selfsight.checkpoints.tensorflow import prefix_of

    plain = Path(str(path).removeprefix(AUTHORS)).expanduser()
    if str(path).startswith(AUTHORS) or (prefix_of(plain) is not None and not (plain / DESCRIPTION).is_file()):
        return plain
    return plain if plain.is_file() and not (plain.suffix in OURS and plain.with_suffix(".json").is_file()) else None


def describe(path: str | Path) -> tuple[Path, dict[str, Any]]:
    """Path of the weights at ``path``, and what ``backbone.json`` says about them.

    Raises:
        UserError: a file is missing, or the description cannot be read.
    """
    if str(path).startswith(hub.PREFIX):
        path = hub.fetch(str(path).removeprefix(hub.PREFIX))
    path = Path(path).expanduser()
    if (path / hub.CONFIG).is_file() and not (path / DESCRIPTION).is_file():
        return path / hub.WEIGHTS, _description(path / hub.CONFIG, inside=hub.OURS)
    if not path.is_dir() and path.suffix in OURS:
        weights, description = path.with_suffix(".safetensors"), path.with_suffix(".json")
    else:
        weights, description = path / WEIGHTS, path / DESCRIPTION
        if not path.is_dir():
            beside = [str(file.parent) for file in path.parent.glob(f"*/{DESCRIPTION}")]
            raise UserError(f"There is no folder '{path}' with a backbone in it.{nearest(str(path), beside)}")
    for file in (weights, description):
        if not file.is_file():
            hint = " (the run has not come to its end)" if (weights.parent / "config.yaml").is_file() else ""
            raise UserError(
                f"There is no '{file}'{hint}; a finished run has {WEIGHTS} and {DESCRIPTION} in its folder."
            )
    return weights, _description(description)


def _description(file: Path, inside: str | None = None) -> dict[str, Any]:
    """What a file says about the weights beside it, the whole of it or a part.

    Raises:
        UserError: it says nothing of a backbone of ours.
    """
    try:
        content = json.loads(file.read_text())
        spec: dict[str, Any] = content if inside is None else content[inside]
        name_of(spec["backbone"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        where = "" if inside is None else f" under '{inside}'"
        raise UserError(
            f"'{file}' does not describe a backbone of selfsight: it has to be JSON with \"backbone\": "
            f'{{"name": ...}}{where}.'
        ) from None
    return spec


def described(net: nn.Module, key: str) -> Any:
    """What the description of a backbone says of ``key``; of a network of timm's, what was published with it.

    Raises:
        UserError: nothing.
    """
    spec: Any = getattr(net, "spec", None)
    published: Any = getattr(net, "pretrained_cfg", None)
    if spec is None and published:
        spec = {"image_size": published["input_size"][-1], "mean": published["mean"], "std": published["std"]}
    if spec is None:
        raise UserError(
            f"{type(net).__name__} does not say its {key}, which is needed here; give it what `selfsight.load` does: "
            'net.spec = {"image_size": 224, "mean": [...], "std": [...]}.'
        )
    if key not in spec:
        raise UserError(
            f"{DESCRIPTION} of this backbone does not say its {key}, which is needed here; write it down there."
        )
    return spec[key]


def _read(file: Path, spec: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors in a file of weights.

    Raises:
        UserError: it is not whole, is of another kind, or is not the one that its description was written with.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    refuse_what_is_no_file_of_weights(file, file.stat().st_size, file.open("rb").read(1024))
    try:
        weights: dict[str, Tensor] = load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"'{file}' cannot be read as safetensors ({error}); copy or export it again.") from None
    if CHECKSUM in spec:
        with file.open("rb") as content:
            found = hashlib.file_digest(content, "sha256").hexdigest()
        if found != spec[CHECKSUM]:
            raise UserError(
                f"'{file}' is not what was written there (its {CHECKSUM} is another one): copy or export it again, or "
                f'take "{CHECKSUM}" out of {DESCRIPTION} if you have changed it yourself.'
            )
    return weights


def _check(weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor], file: Path, name: str) -> None:
    missing, over = sorted(wanted.keys() - weights.keys()), sorted(weights.keys() - wanted.keys())
    other = [k for k in wanted.keys() & weights.keys() if wanted[k].shape != weights[k].shape]
    if wrong := [*missing, *over, *sorted(other)]:
        raise UserError(
            f"'{file}' holds another network than the {name}: {len(missing)} tensors are "
            f"missing, {len(over)} left over and {len(other)} of another shape, '{wrong[0]}' for one."
        )
