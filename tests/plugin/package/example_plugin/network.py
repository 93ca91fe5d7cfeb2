"""A network of two convolutions, by name and as a plain module."""

from timm.models import register_model
from torch import nn

from selfsight.backbones.interface import taken, wrap


class Pebble(nn.Sequential):
    """Images ``[B, in_chans, H, W]`` to a map ``[B, width, H/4, W/4]``; all that a plain module has to do."""

    def __init__(self, width: int = 16, in_chans: int = 3) -> None:
        layers = [nn.Conv2d(in_chans, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU()]
        super().__init__(*layers, nn.Conv2d(width, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())


@register_model
def pebble(pretrained: bool = False, **options):
    """For timm, with a name: `selfsight.backbones.interface.wrap` adds what timm's networks have."""
    options = taken("a pebble", ("width", "in_chans", "num_classes"), pretrained, options)
    options.pop("num_classes", None)
    return wrap(Pebble(**options))
