"""What can be told before anything heavy is imported: files that are not there, names that do not exist."""

from contextlib import suppress
from pathlib import Path

from rlrazor.errors import RazorError
from rlrazor.lm import hub, packaged
from rlrazor.lm.task_names import WORDS, are_none, check_names

TINY = "tiny"  # the base that is made here, and its prior tasks


def generic_source(text: str) -> str | Path:
    """What --generic names: a file, or one of WORDS as it is; a file of such a name is given as ./self."""
    return text if text in WORDS else Path(text)


def require_files(**files: str | Path | None) -> None:
    """Raise RazorError where a file, by the option that names it, is not there; a word is none."""
    for option, path in files.items():
        if isinstance(path, Path) and not _is_there(path):
            if option == "law":
                raise RazorError(f"There is no law in {path}. `razor calibrate` makes one.")
            raise RazorError(f"There is no {path}, which --{option.replace('_', '-')} names.")


def missing_source(*sources: str) -> str | None:
    """The first model that can only be a local one, by how it is written, and is not there."""
    for source in sources:
        if hub.is_local(source) and not _is_there(Path(source)):
            return source
    return None


def require_source(*sources: str) -> None:
    """Raise RazorError for a `missing_source`, and a base by name whose package is not installed."""
    packaged.require_installed(*sources)
    if (source := missing_source(*sources)) is not None:
        raise hub.nowhere(source)


def require_prior(tasks: str | tuple[str, ...] | None) -> None:
    """Raise RazorError for prior tasks that lm-eval does not have, comma-separated or one by one."""
    names = prior_names(tasks)
    if not are_none(names):
        check_names([name for name in names if name != TINY])


def prior_names(tasks: str | tuple[str, ...] | None) -> list[str]:
    """The prior tasks that --prior names."""
    names = tasks.split(",") if isinstance(tasks, str) else tasks or ()
    return [name.strip() for name in names if name.strip()]


def needs_no_prior(tasks: str | None) -> bool:
    """Whether --prior says that there are none. Raises RazorError where it says so beside a task."""
    return are_none(prior_names(tasks))


def settle_hub(*sources: str, data: bool) -> None:
    """Find out whether the hub can be reached, where a model or `data` may have to come from it.

    Not where a model is missing, which ends the command.
    """
    if missing_source(*sources) is None and (
        data or any(source not in (TINY, *packaged.BASES) and not _is_there(Path(source)) for source in sources)
    ):
        hub.settle()


def _is_there(path: Path) -> bool:
    with suppress(OSError, ValueError, RuntimeError):
        return path.expanduser().exists()
    return True  # what is wrong with it is said where it is read
