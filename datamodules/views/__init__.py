"""What a view of an image is, and two engines that make it: on CPU workers and on the device."""

from selfsight.datamodules.views.view import View

__all__ = ["View"]
