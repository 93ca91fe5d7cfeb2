"""One of each kind of part that selfsight takes by name. Importing this registers the network with timm."""

from example_plugin import network as network
