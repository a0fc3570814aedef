"""rlrazor: fine-tune a model on a new task without losing the old ones."""

__version__: str


def __getattr__(name: str) -> object:
    """The version, looked up where it is asked for: that takes as long as Python's own start."""
    if name == "__version__":
        from importlib.metadata import version

        return version("rlrazor")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
