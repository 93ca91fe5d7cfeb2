"""Pictures of what each method does, one file a method; the methods know nothing of them."""

from selfsight.reporting.galleries import dino, mae, pixpro, rotation, semi, simmatchv2, spark, swav
from selfsight.reporting.galleries.gallery import Gallery, galleries

__all__ = ["Gallery", "dino", "galleries", "mae", "pixpro", "rotation", "semi", "simmatchv2", "spark", "swav"]
