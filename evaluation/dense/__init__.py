"""What frozen feature maps know of each place in an image."""

from selfsight.evaluation.dense.probes import DenseKNN, DenseLinear

__all__ = ["DenseKNN", "DenseLinear"]
