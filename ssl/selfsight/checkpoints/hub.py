"""Backbones on the Hugging Face Hub: a folder as timm writes them, uploaded and fetched.

``config.json`` has timm's form, so that ``timm.create_model("hf-hub:NAME", pretrained=True)`` builds the network where
timm has it; beside timm's keys it holds what ``backbone.json`` says, from which `selfsight.load` builds any.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from selfsight import __version__
from selfsight.backbones.published import endpoint, has_address
from selfsight.checkpoints.export import CHECKSUM, SMALL_STEMS, name_of, state, timm_call
from selfsight.contracts import Backbone
from selfsight.errors import UserError
from selfsight.files import replace

PREFIX = "hf-hub:"
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
OURS = "selfsight"  #: key of our description in the configuration


def write_folder(backbone: Backbone, folder: Path, card: str, licence: str | None = None) -> None:
    """Weights, configuration and model card in ``folder``, each whole or as it was before.

    Args:
        backbone: of `selfsight.load`. card: the text of ``README.md``. licence: of the weights, as the Hub names it.

    Raises:
        UserError: the folder cannot be made or written.
    """
    from safetensors.torch import save

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder '{folder}' cannot be made ({error.strerror}); name another: out=DIR.") from None
    config = configuration(backbone, licence)
    replace(folder / WEIGHTS, lambda path: path.write_bytes(save(state(backbone), {"format": "pt"})))
    replace(folder / CONFIG, lambda path: path.write_text(json.dumps(config, indent=2) + "\n"))
    replace(folder / CARD, lambda path: path.write_text(card, encoding="utf-8"))


def configuration(backbone: Backbone, licence: str | None = None) -> dict[str, Any]:
    """``config.json``: timm's keys, and ours under ``selfsight``."""
    spec = {key: value for key, value in backbone.spec.items() if key != CHECKSUM}  # of another file
    arguments: Mapping[str, Any] = spec["backbone"]
    name, options = timm_call(backbone, arguments) or (name_of(arguments), {})
    published: Any = getattr(backbone, "pretrained_cfg", None) or {}
    size = spec.get("image_size") or 224
    mean, std = spec.get("mean") or [0.0], spec.get("std") or [1.0]
    channels = arguments.get("in_chans", 3)
    images = {
        "input_size": [channels, size, size],
        "fixed_input_size": bool(published.get("fixed_input_size", False)),
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "center",
        "mean": list(mean) if len(mean) == channels else [mean[0]] * channels,
        "std": list(std) if len(std) == channels else [std[0]] * channels,
    }
    of_timm = {key: published.get(key) for key in ("first_conv", "classifier") if published.get(key)}
    return {
        "architecture": name,
        "num_classes": 0,
        "num_features": backbone.num_features,
        **({"model_args": options} if options else {}),
        "pretrained_cfg": {
            "tag": str(spec.get("method", OURS)), "custom_load": False, **images, "num_classes": 0, **of_timm,
            **({"license": licence} if licence else {}),
        },
        OURS: {**spec, "num_features": backbone.num_features, "selfsight": __version__},
    }  # fmt: skip


def built_by_timm(backbone: Backbone) -> bool:
    """Whether timm builds the network from the configuration alone."""
    arguments = backbone.spec["backbone"]
    return timm_call(backbone, arguments) is not None and str(arguments.get("stem")) not in SMALL_STEMS


# --- over the network ------------------------------------------------------------------------------------------------


def network_errors() -> tuple[type[Exception], ...]:
    """What is raised where the network fails, by whichever library huggingface-hub speaks HTTP with."""
    from huggingface_hub.errors import HfHubHTTPError

    return (*(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception)), OSError)


def push(folder: Path, name: str) -> str:
    """Upload the files of `write_folder` as the repository ``name`` (``person/model``), made where it is not there.

    Returns:
        The repository's address.

    Raises:
        UserError: no such name can be, nobody is logged in, this account may not write there, or there is no network.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    api = HfApi(endpoint=endpoint(), library_name=OURS, library_version=__version__)
    files = [CommitOperationAdd(file, folder / file) for file in (WEIGHTS, CONFIG, CARD)]
    try:
        repository = api.create_repo(name, exist_ok=True)
        api.create_commit(repo_id=repository.repo_id, operations=files, commit_message="Backbone of selfsight")
    except HFValidationError:
        raise UserError(
            f"'{name}' is no name of a repository on the Hub; it is PERSON/MODEL, as in ada/swav-photos."
        ) from None
    except LocalTokenNotFoundError:
        raise UserError("nobody is logged in to the Hub here; run `hf auth login`, or set HF_TOKEN.") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status in (401, 403):
            raise UserError(
                f"the Hub does not let this account write to '{name}'; run `hf auth login` with a token that may write "
                "there, or name another repository."
            ) from None
        raise UserError(f"the Hub refused '{name}' ({_one_line(error)}).") from None
    except network_errors() as error:
        raise UserError(
            f"the Hub cannot be reached ({_one_line(error)}); the folder '{folder}' is complete, push it later."
        ) from None
    return str(repository)


def fetch(name: str) -> Path:
    """The folder with configuration and weights of the repository ``name``, from the cache where it is there.

    Args:
        name: ``person/model``, or ``person/model@revision``.

    Raises:
        UserError: there is no such repository, or none with these files, or no network.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repository, _, revision = name.partition("@")
    found, here_alone = "", not has_address()
    try:
        for file in (CONFIG, WEIGHTS):
            found = hf_hub_download(
                repository, file, revision=revision or None, endpoint=endpoint(), local_files_only=here_alone
            )
    except HFValidationError:
        raise UserError(
            f"'{name}' is no name of a repository on the Hub; it is PERSON/MODEL, as in ada/swav-photos."
        ) from None
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise UserError(
            f"the Hub has no repository '{name}', or it is a private one: then log in, `hf auth login`."
        ) from None
    except LocalEntryNotFoundError as error:
        reason = "its name is not known here" if here_alone else _one_line(error.__cause__ or error)
        raise UserError(
            f"'{name}' is not on this machine and the Hub cannot be reached ({reason}); connect once, or load it from "
            "a folder."
        ) from None
    except EntryNotFoundError:
        raise UserError(f"'{name}' has no {CONFIG} and {WEIGHTS}, so it holds no backbone; name another.") from None
    except network_errors() as error:
        raise UserError(f"'{name}' cannot be fetched from the Hub ({_one_line(error)}).") from None
    return Path(found).parent


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160].rstrip(".") or type(error).__name__
