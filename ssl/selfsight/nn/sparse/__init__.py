"""Sparse convolution by masks: layers, the encoder made of them, and the same on packed visible cells."""
