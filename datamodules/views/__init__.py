"""What a view of an image is, the views of published recipes by name, and two engines that make them: on CPU workers
and on the device."""

from selfsight.datamodules.views.view import View
from selfsight.datamodules.views.views import views

__all__ = ["View", "views"]
