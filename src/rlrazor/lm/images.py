"""Prompts with images: read from a column `images`, put into the processor's template, given to the model beside ids.

A processor turns images into tensors and makes room for them among the tokens of a text. What a model is given beside
token ids goes with the ids of its prompt (`SeenIds`), so that whatever hands prompts on hands that on too. Such prompts
are read one at a time: how images of several prompts share a batch is each architecture's own.
"""

import functools
import hashlib
import io
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlrazor.errors import RazorError, cause_of
from rlrazor.lm import encoding, trials
from rlrazor.lm.prompts import many

LARGEST = 1 << 28  # bytes of an image's file
_FOR_TOKENS = ("input_ids", "attention_mask")


@dataclass(frozen=True)
class ImageFile:
    """An image as its file has it; its text is a digest of that, by which prompts are told apart."""

    content: bytes = field(repr=False)

    def __str__(self) -> str:
        return f"image {hashlib.sha256(self.content).hexdigest()[:16]}"

    def opened(self) -> Any:
        """Of Pillow's, in colours. Raises what Pillow raises."""
        from PIL import Image

        return Image.open(io.BytesIO(self.content)).convert("RGB")


class SeenIds(list[int]):
    """Token ids of a prompt with images, and `beside`: the tensors that its model is given with them."""

    def __init__(self, ids: Iterable[int], beside: Mapping[str, Tensor]) -> None:
        super().__init__(ids)
        self.beside = beside

    @property
    def digest(self) -> str:
        """Of what is beside the ids: 16 hexadecimal digits."""
        found = hashlib.sha256()
        for name, tensor in sorted(self.beside.items()):
            found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            found.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        return found.hexdigest()[:16]

    def inputs(self, model: Any, tokens: int, repeats: int = 1) -> dict[str, Tensor]:
        """The tensors for `tokens` tokens, of which the prompt's are the first, so many times, on the model's device.

        Of what is said of each token: the types of further ones are those of text, 0; which images they see, as before.
        """
        from rlrazor.lm import compute

        found, dtype = {}, getattr(model, "dtype", torch.float32)
        for name, tensor in self.beside.items():
            if tensor.dim() > 1 and tensor.shape[:2] == (1, len(self)):
                last = tensor[:, -1:].repeat_interleave(tokens - len(self), dim=1)
                tensor = torch.cat([tensor, torch.zeros_like(last) if "type" in name else last], dim=1)
            tensor = tensor.repeat(repeats, *(1 for _ in tensor.shape[1:]))
            found[name] = tensor.to(compute.device_of(model), dtype if tensor.is_floating_point() else None)
        return found


def seen(prompt: Sequence[int]) -> SeenIds | None:
    """The prompt, where images go with it."""
    return prompt if isinstance(prompt, SeenIds) else None


def images_of(value: Any, folder: Path, where: str) -> tuple[ImageFile, ...]:
    """The images of a row: paths (from `folder`), Pillow's, or what `datasets` has of them, objects of bytes and path.

    None of an empty list, as rows of text have beside others. Raises RazorError for one that cannot be read.
    """
    return tuple(_image(one, folder, where) for one in many(value))


def _image(value: Any, folder: Path, where: str) -> ImageFile:
    held = value if isinstance(value, Mapping) else {"path": value}
    content: Any = held.get("bytes")
    path: Any = held.get("path")
    shown = f"{path!s:.200}" if isinstance(path, str | Path) else "an image"
    try:
        if hasattr(path, "save"):  # Pillow's
            file = io.BytesIO()
            path.convert("RGB").save(file, "PNG")
            content = file.getvalue()
        if content is None:
            if not isinstance(path, str | Path):
                raise ValueError(f"it is of type {type(path).__name__}, no path, and no object of bytes and path")
            if (folder / Path(path).expanduser()).stat().st_size > LARGEST:
                raise ValueError(f"it has more than {LARGEST:,} bytes")
            content = (folder / Path(path).expanduser()).read_bytes()
        found = ImageFile(bytes(content))
        found.opened()
    except ImportError as error:
        raise RazorError("Prompts have images, which Pillow reads, and it is missing: pip install pillow.") from error
    except Exception as error:  # of Pillow's plugins, of any type
        raise RazorError(f"{where}: the image {shown} cannot be read ({cause_of(error).rstrip('.')}).") from error
    return found


def encode(
    tokenizer: Any,
    said: str | Sequence[Mapping[str, Any]],
    images: Sequence[ImageFile],
    template: Mapping[str, Any],
    where: str,
    *,
    chat: bool,
) -> SeenIds:
    """Token ids of a prompt, text or turns, with images, and what is beside them, by the processor of the model.

    Images that no turn has a place for are put in front of the first of the user's, as TRL does. `chat`: text is put
    into the user's turn of a template, where there is one. Raises RazorError for a model without a processor, and for a
    template or a processor that does not take the prompt.
    """
    own = _given.get(tokenizer, lambda: None)()
    processor = own or processor_of(str(getattr(tokenizer, "name_or_path", "")))
    written = getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None)
    if isinstance(said, str) and chat and written:
        said = [{"role": "user", "content": said}]
    try:
        if isinstance(said, str):
            token = str(getattr(processor, "image_token", ""))
            text, front = said if token and token in said else token * len(images) + said, True
        elif written is None:
            raise ValueError("there is no chat template")
        else:
            turns, front = _with_places(said, len(images)), False
            asked = {"messages": turns, "add_generation_prompt": turns[-1]["role"] != "assistant", **template}
            trials.try_template(_Shown(tokenizer, written), [asked])
            text = processor.apply_chat_template(
                asked.pop("messages"), chat_template=written, tokenize=False,
                continue_final_message=not asked["add_generation_prompt"], **asked,
            )  # fmt: skip
        shown = [[image.opened() for image in images]]
        batch = processor(text=[text], images=shown, return_tensors="pt", add_special_tokens=False)
    except RazorError:
        raise
    except Exception as error:  # of a template or a processor, of any type
        raise RazorError(
            f"{where}: the model's processor does not take the prompt with its images ({cause_of(error).rstrip('.')})."
        ) from error
    first = encoding.front_ids(tokenizer) if front else []
    ids = [*first, *batch["input_ids"][0].tolist()]
    beside = {name: value for name, value in batch.items() if name not in _FOR_TOKENS and isinstance(value, Tensor)}
    for name, value in beside.items():
        if first and value.dim() > 1 and value.shape[:2] == (1, len(ids) - len(first)):
            beside[name] = torch.cat(
                [torch.zeros_like(value[:, :1]).repeat_interleave(len(first), dim=1), value], dim=1
            )
    if not beside:
        raise RazorError(f"{where}: the model's processor makes nothing of its images.")
    return SeenIds(ids, beside)


_given: weakref.WeakKeyDictionary[Any, Callable[[], Any]] = weakref.WeakKeyDictionary()


def read_with(processor: Any) -> None:
    """From now on read images of prompts for a processor's tokenizer with it, as long as there is someone to hold it.

    It may have settings, such as the size of images, that the processor in the model's folder has not.
    """
    if hasattr(processor, "image_processor") and getattr(processor, "tokenizer", None) is not None:
        _given[processor.tokenizer] = weakref.ref(processor)


def have_images(prompts: Sequence[Any]) -> bool:
    """Whether any of the prompts has one."""
    return any(isinstance(prompt, Mapping) and prompt.get("images") for prompt in prompts)


def processor_note(base: Any, tuned: Any) -> str | None:
    """What the processor beside a tuned model's tokenizer says otherwise than the base's; None where nothing is.

    Both models read the same: what the base's processor makes of an image.
    """
    folders = [str(getattr(tokenizer, "name_or_path", "")) for tokenizer in (base, tuned)]
    if folders[0] == folders[1]:
        return None
    try:
        of_base, of_tuned = (_settings(processor_of(folder)) for folder in folders)
    except RazorError:  # it has none of its own, and where the base has none that is said as images are read
        return None
    other = sorted(name for name in of_base.keys() | of_tuned.keys() if of_base.get(name) != of_tuned.get(name))
    if not other:
        return None
    first = other[0]
    more = f", and {len(other) - 1} more" if len(other) > 1 else ""
    return (
        f"The tuned model's processor has other settings than the base's ({first}: {of_tuned.get(first)} and "
        f"{of_base.get(first)}{more}): images are read as the base's says, for both models. To have them read as the "
        "tuned model's says, give a copy of the base's folder with the tuned model's processor files."
    )


def _settings(processor: Any) -> dict[str, Any]:
    """All that decides what it makes of an image but for its class, of which there is a fast and a slow one."""
    own = {name: value for name, value in vars(processor).items() if isinstance(value, int | float | str | list)}
    own |= processor.image_processor.to_dict()
    apart = ("chat_template", "processor_class", "image_processor_type")  # templates are noted by themselves
    return {name: value for name, value in own.items() if name not in apart and not name.startswith("_")}


@functools.lru_cache(maxsize=2)
def processor_of(folder: str) -> Any:
    """The processor in the folder of a tokenizer. Raises RazorError where there is none that takes images."""
    from transformers import AutoProcessor

    try:
        found = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
        why = "" if hasattr(found, "image_processor") else "its folder has none that takes images"
    except Exception as error:  # missing files, packages, or anything else
        found, why = None, cause_of(error).rstrip(".")
    if why:
        raise RazorError(
            f"The prompts have images, and the model has no processor for them ({why}): give the folder of a model "
            "that reads images, with its preprocessor_config.json, or prompts without a column `images`."
        )
    return found


@dataclass(frozen=True)
class _Shown:
    """A processor's template, as `trials.try_template` asks a tokenizer for its own."""

    tokenizer: Any
    template: str

    def get_chat_template(self, *_: Any) -> str:
        return self.template

    @property
    def special_tokens_map(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.tokenizer.special_tokens_map
        return found


def _with_places(turns: Sequence[Mapping[str, Any]], images: int) -> list[dict[str, Any]]:
    """Turns as lists of parts, with a place for each image. Raises ValueError where places and images do not match."""
    parted = [{**turn, "content": _parts(turn.get("content"))} for turn in turns]
    places = sum(part.get("type") == "image" for turn in parted for part in turn["content"])
    if places == 0:
        first = next((turn for turn in parted if turn["role"] == "user"), parted[0])
        first["content"] = [*({"type": "image"} for _ in range(images)), *first["content"]]
    elif places != images:
        raise ValueError(f"it has places for {places} images, and {images} images")
    return parted


def _parts(content: Any) -> list[dict[str, Any]]:
    if content is None or isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    return [{"type": "text", **part} if "text" in part else {"type": str(part.get("type"))} for part in content]
