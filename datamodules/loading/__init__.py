"""From a set of images to the batches of an epoch: order, reading, transport."""
