"""Detection on a pretrained backbone, and COCO's average precision."""

from selfsight.evaluation.detection.detector import Detection

__all__ = ["Detection"]
