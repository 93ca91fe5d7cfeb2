"""Where `images.decode` stood in version 0.1, for scripts that import from here."""

from selfsight.datamodules.images.decode import EXTENSIONS, Unreadable, decode, read_image

__all__ = ["EXTENSIONS", "Unreadable", "decode", "read_image"]
