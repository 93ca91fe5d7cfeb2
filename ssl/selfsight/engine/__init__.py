"""From a configuration to parts, from parts to a trained network, and from a run folder back into memory."""
