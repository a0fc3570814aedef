"""Where a model is: its folder, of a hub id, a path or a GGUF file, and the tensors in it one at a time."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from rlrazor.errors import RazorError, cause_of, disk_error_in
from rlrazor.lm import gguf, hub, loading, packaged, weight_files


def folder_of(source: str) -> Path:
    """The local folder with the model: itself, a GGUF file's conversion, also of a package's, or the hub's download."""
    if source in packaged.BASES:
        return packaged.folder_of(source)
    path = Path(source).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return gguf.convert(path)
    if path.is_dir():
        return path
    if path.exists():
        raise RazorError(f"{source} is neither a folder with a model nor a .gguf file.")
    if hub.is_local(source):
        raise hub.nowhere(source)
    return _downloaded(source)


def tokenizer_folder_of(source: str) -> Path:
    """The local folder with the tokenizer of a model, whose weights are not downloaded for it."""
    if source in packaged.BASES or Path(source).expanduser().exists() or hub.is_local(source):
        return folder_of(source)
    return _downloaded(source, [name for name in weight_files.POLICY_FILES if "safetensors" not in name])


def _downloaded(repository: str, files: Sequence[str] = weight_files.POLICY_FILES) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(repository, allow_patterns=list(files)))
    except GatedRepoError as error:
        raise RazorError(
            f"The hub shows {repository} only to those who have agreed to its terms. Agree to them on its page, then "
            "log in with `hf auth login`."
        ) from error
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise RazorError(
            f"The hub has no model {repository}, or does not show it to you. Check the name; one that is private needs "
            "`hf auth login`."
        ) from error
    except Exception as error:
        if (disk := disk_error_in(error)) is not None:
            raise RazorError(
                f"{repository} cannot be kept in {constants.HF_HUB_CACHE}: {disk.strerror}. Free some space there, or "
                "set HF_HOME to a folder that can be written to."
            ) from error
        if hub.is_unreachable(error):
            raise RazorError(
                f"There is no folder {repository}, the hub cannot be reached, and its cache does not have it. Try "
                "again with a connection, or give a local folder or .gguf file."
            ) from error
        status = hub.answer_in(error)
        who = "Downloading it failed" if status is None else f"The hub answered {status}"
        raise RazorError(f"There is no folder {repository}. {who}: {cause_of(error)}") from error


def stored_scheme(source: str | Path) -> str:
    """How a model of a hub id, a folder or a GGUF file was quantised as it was saved, in words; "" for not at all."""
    return weight_files.scheme_in(folder_of(str(source)))


class SavedWeights(Mapping[str, Tensor]):
    """The tensors of a model's folder by name, read one at a time as they are asked for.

    Of the files that transformers loads it from, whatever else is beside them. A file is mapped for each tensor anew:
    what stays mapped, and was read, counts as the process's memory.
    """

    def __init__(self, source: str | Path) -> None:
        """Of a hub id, a folder or a GGUF file, as `load` takes them; raises its errors."""
        from safetensors import safe_open

        paths = weight_files.find(folder_of(str(source)), source).files
        self._files: dict[str, Path] = {}
        with loading.clear_errors(source):
            for path in paths:
                with safe_open(path, framework="pt") as file:
                    self._files |= dict.fromkeys(file.keys(), path)

    def __getitem__(self, name: str) -> Tensor:
        from safetensors import safe_open

        with safe_open(self._files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)
