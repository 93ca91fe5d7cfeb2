"""Weights that timm publishes, where the Hugging Face Hub cannot be asked: those of this machine, or a sentence."""

from __future__ import annotations

import os
import socket
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import timm

from selfsight.errors import UserError

#: names of the file on the Hub where a network names no other, in the order in which timm looks for them
FILES = ("model.safetensors", "pytorch_model.bin")


def endpoint() -> str | None:
    """Another address of the Hub than the usual one, as the environment names it when it is asked."""
    return os.environ.get("HF_ENDPOINT")


def has_address() -> bool:
    """Whether the Hub's name can be looked up: where it cannot, huggingface-hub tries for half a minute."""
    from huggingface_hub.constants import ENDPOINT

    if getproxies():  # which look names up themselves
        return True
    try:
        socket.getaddrinfo(urlsplit(endpoint() or ENDPOINT).hostname, None)
    except OSError:
        return False
    return True


def without_hub(name: str) -> dict[str, Any]:
    """What `timm.create_model` has to be told to take published weights from this machine; nothing where the Hub is.

    Raises:
        UserError: they are not on this machine, and the Hub cannot be asked.
    """
    from huggingface_hub import try_to_load_from_cache

    published: Any = timm.get_pretrained_cfg(name, allow_unregistered=True)
    if published is None or not published.hf_hub_id or published.custom_load == "hf" or has_address():
        return {}
    repository, _, revision = published.hf_hub_id.partition("@")
    asked = published.hf_hub_filename
    files = FILES if asked is None else (asked.removesuffix(".bin") + ".safetensors", asked)
    for file in files:
        here = try_to_load_from_cache(repository, file, revision=revision or None)
        if isinstance(here, str):
            return {"pretrained_cfg_overlay": {"file": here, "custom_load": False}}
    raise UserError(
        f"The weights of '{name}' are not on this machine and the Hub cannot be reached (its name is not known here); "
        "connect once, or use backbone.pretrained=false."
    )
