"""What frozen features know: neighbours, linear classifiers, clusters, collapse."""
