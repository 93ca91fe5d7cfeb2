"""From the words of a command to one configuration."""
