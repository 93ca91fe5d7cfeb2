"""What a run looks like: pages, tables, curves, pictures, the explorer."""
