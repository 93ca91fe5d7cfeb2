"""Backbones by name: timm's, and ours beside them. Whoever else needs timm imports it from here."""

from selfsight.compat import left_out

with left_out("wandb"):  # a run that logs to it imports it
    import timm

__all__ = ["timm"]
