import sys

if not {"timm", "wandb"} & set(sys.modules):
    # timm loads wandb wherever it is installed, for a summary nobody asks for here: a second of every start.
    sys.modules["wandb"] = None  # type: ignore[assignment]
    try:
        import timm  # noqa: F401
    finally:
        del sys.modules["wandb"]
