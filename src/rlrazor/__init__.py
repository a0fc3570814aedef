"""rlrazor: fine-tune a model on a new task without losing the old ones."""

from importlib.metadata import version

__version__ = version("rlrazor")
