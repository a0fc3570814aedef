"""Libraries' own bars and warnings to developers, kept out of what our commands print, here and in their workers."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# Read by the libraries as they are imported, and inherited by the processes that we start.
_ENVIRONMENT = {
    "TQDM_DISABLE": "1",  # lm-eval's, NLTK's and whoever else's
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",  # of layers "not sharded" in one process, say
}
_DEVELOPERS = (FutureWarning, DeprecationWarning, PendingDeprecationWarning)


def libraries() -> None:
    """Turn off the bars of transformers, TRL, datasets, lm-eval and the hub, imported yet or not, and FutureWarnings.

    Two bars on one terminal garble each other; a line a tenth of a second fills a log. Imports nothing.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for category in _DEVELOPERS:
        warnings.simplefilter("ignore", category)
    for module in ("transformers.utils.logging", "datasets.utils.tqdm", "huggingface_hub.utils.tqdm"):
        if module not in sys.modules:
            continue
        for name in ("disable_progress_bar", "disable_progress_bars"):
            if (disable := getattr(sys.modules[module], name, None)) is not None:
                disable()


@contextmanager
def without_advice() -> Iterator[None]:
    """Within this block libraries warn of nothing, which is for whoever programs with them: what a user has to know we
    say ourselves.
    """
    from transformers.utils import logging as of_transformers

    before = of_transformers.get_verbosity()
    of_transformers.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        of_transformers.set_verbosity(before)


@contextmanager
def warnings_of(library: str) -> Iterator[list[str]]:
    """What the logger of a library warns of within this block: here, and nowhere else."""
    logger, messages = logging.getLogger(library), list[str]()
    handler, before = logging.Handler(), (logger.level, logger.propagate)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]
