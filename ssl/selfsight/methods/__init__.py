"""Methods, one file each."""

from selfsight.compat import moved

__getattr__ = moved(
    __name__,
    dict.fromkeys(("comatch", "fixmatch", "flexmatch", "freematch", "mixmatch", "simmatch", "simmatchv2"), "semi"),
)
