"""Sets of images with their labels: by name, from folders, from lists, prepared."""
