"""lm-eval as a guest: quiet, with nothing downloaded unasked, and the process as before afterwards."""

import atexit
import functools
import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from rlrazor.errors import RazorError, cause_of
from rlrazor.extras import needs_extra
from rlrazor.lm import compute
from rlrazor.lm.harness.mirror import read_mirror
from rlrazor.lm.harness.programs import CodeEval
from rlrazor.system import quiet


@contextmanager
def as_guest(data_mirror: Path | None) -> Iterator[tuple[Path | None, list[str]]]:
    """lm-eval kept quiet and off the net, the random states as before afterwards: the mirror, and its warnings."""
    needs_extra("eval")
    mirror = None if data_mirror is None else Path(os.path.realpath(data_mirror.expanduser()))
    if mirror is not None and not mirror.is_dir():
        raise RazorError(f"There is no folder {data_mirror} to read the prior tasks from.")
    with _quiet() as warnings, _no_downloads(mirror), compute.generators_untouched():
        yield mirror, warnings


@contextmanager
def evaluating(name: str) -> Iterator[None]:
    """Say in one sentence what lm-eval, or a task's own code, raises while it evaluates."""
    try:
        yield
    except RazorError:
        raise
    except Exception as error:
        if compute.is_out_of_memory(error):
            raise
        raise RazorError(
            f"lm-eval cannot evaluate {name} on this model: {type(error).__name__}: {cause_of(error)}"
        ) from error


@contextmanager
def _no_downloads(mirror: Path | None) -> Iterator[None]:
    """Give lm-eval the mirror's rows in place of the hub's, if there is one, and our scorer of programs in any case."""
    import datasets
    import evaluate as hf_evaluate

    original = datasets.load_dataset

    def load_dataset(path: str, name: str | None = None, **kwargs: Any) -> Any:
        if mirror is None or path in ("json", "csv", "parquet", "text"):  # a task of the user's, with files of its own
            return original(path, name, **kwargs)
        return read_mirror(mirror, path, name)

    def load_metric(name: str) -> Any:
        if name != "code_eval":
            raise RazorError(f"The metric {name} is a program on the hub, which is not run. Choose another task.")
        return CodeEval()

    with _replaced(datasets, "load_dataset", load_dataset), _replaced(hf_evaluate, "load", load_metric):
        yield


@functools.cache
def untrained_punkt() -> bool:
    """Whether NLTK's sentence splitter is missing; if so, put one without abbreviations in its place.

    Also fixes the seed of IFEval's language detector, which draws from the operating system's entropy otherwise.
    """
    import langdetect
    import nltk

    langdetect.DetectorFactory.seed = 0
    try:
        nltk.data.find("tokenizers/punkt_tab/english")
    except LookupError:
        folder = tempfile.mkdtemp(prefix="rlrazor-punkt-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        english = Path(folder) / "tokenizers" / "punkt_tab" / "english"
        english.mkdir(parents=True)
        for parameters in ("abbrev_types.txt", "collocations.tab", "ortho_context.tab", "sent_starters.txt"):
            (english / parameters).touch()
        nltk.data.path.append(folder)
        return True
    return False


@contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)


@contextmanager
def _quiet() -> Iterator[list[str]]:
    """Collect lm-eval's warnings instead of printing them; bars, and what else libraries say, go nowhere."""
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # its bootstrap would start a process per core
    nowhere = io.StringIO()
    with redirect_stderr(nowhere), redirect_stdout(nowhere), quiet.warnings_of("lm_eval") as messages:
        yield messages
