"""What lies on disk of a run. Nothing here knows of training."""
