"""Tiny vision-language models with random weights, of architectures that transformers has, and a world of images.

The tokenizer and the processor are made here; nothing comes from a hub.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from rlrazor.experiments.robot.vla.scene import SceneEnvironment
from rlrazor.experiments.robot.world import FIRST, Expert, Floats, Task

SIDE, PATCH = 32, 8
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
FURTHER = [f"rare{number}" for number in range(300)]  # of which the last 256 are to stand for actions
SPECIAL = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]


def tokenizer() -> PreTrainedTokenizerFast:
    """Of letters, with rare words, and special tokens behind them."""
    vocabulary = {token: number for number, token in enumerate([*LETTERS, *FURTHER])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, additional_special_tokens=SPECIAL, **names)


def text_config(vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,  # so that it is far from uniform
    )


def idefics3() -> tuple[Any, Any]:
    """SmolVLM's architecture."""
    words = tokenizer()
    size = {"longest_edge": SIDE}
    images = Idefics3ImageProcessorPil(size=size, max_image_size=size, do_image_splitting=False)
    scale = 2
    processor = Idefics3Processor(images, words, image_seq_len=(SIDE // PATCH // scale) ** 2)
    vision: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    vision |= {"image_size": SIDE, "patch_size": PATCH, "initializer_range": 0.3}
    config = Idefics3Config(
        image_token_id=words.convert_tokens_to_ids("<image>"),
        vision_config=vision,
        text_config=text_config(len(words)),
        scale_factor=scale,
        pad_token_id=words.pad_token_id,
    )
    return made(Idefics3ForConditionalGeneration, config), processor


def llava() -> tuple[Any, Any]:
    """LLaVA's, which OpenVLA's is near to: an encoder's patches, projected, before the words."""
    words = tokenizer()
    size = {"height": SIDE, "width": SIDE}
    images = CLIPImageProcessorPil(size=size, crop_size=size)
    processor = LlavaProcessor(
        images, words, patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=SIDE,
            patch_size=PATCH,
            projection_dim=32,
        ),
        text_config=text_config(len(words)),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        image_seq_length=(SIDE // PATCH) ** 2,
    )
    return made(LlavaForConditionalGeneration, config), processor


ARCHITECTURES = {"idefics3": idefics3, "llava": llava}


def made(kind: Any, config: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(config).eval()


# A world of images


class Square:
    """A bright square on a dark plane, which an action moves. With `up` it has to come to the upper half."""

    def __init__(self, *, up: bool) -> None:
        self.up, self.at = up, np.zeros(2)

    def start(self, seed: int) -> NDArray[np.uint8]:
        self.at = np.array([0.5, np.random.default_rng(seed).uniform(0.4, 0.6)])
        return self.seen()

    def act(self, action: NDArray[np.float32]) -> tuple[NDArray[np.uint8], bool]:
        self.at = np.clip(self.at + 0.1 * action[:2].astype(float), 0, 1)
        return self.seen(), bool(self.at[1] > 0.8 if self.up else self.at[1] < 0.2)

    def close(self) -> None:
        self.closed = True

    def seen(self) -> NDArray[np.uint8]:
        image = np.full((SIDE, SIDE, 3), 20, np.uint8)
        column, row = (self.at * (SIDE - 6)).astype(int)
        image[SIDE - 6 - row : SIDE - row, column : column + 6] = (250, 200, 100)
        return image


class Pusher:
    """Goes straight there."""

    def __init__(self, *, up: bool) -> None:
        self.up = up

    def act(self, observation: Floats, rng: np.random.Generator) -> Floats:
        return np.array([0, 1 if self.up else -1, 0], np.float32)


@dataclass(frozen=True)
class Squares:
    """Two tasks on the same images: the instruction alone tells them apart. Actions have three dimensions."""

    name: str = "squares"
    horizon: int = 12
    observation_shape: tuple[int, ...] = (SIDE, SIDE, 3)

    @property
    def tasks(self) -> Mapping[str, Task]:
        return {
            "up": Task("up", ("push the square up", "up with it")),
            "down": Task("down", ("push the square down", "down with the square please")),
        }

    @property
    def action_low(self) -> Floats:
        return np.array([-1, -1, -1], np.float32)

    @property
    def action_high(self) -> Floats:
        return np.array([1, 1, 3], np.float32)

    def environment(self, task: str) -> gymnasium.Env[Any, Any]:
        return SceneEnvironment(Square(up=task == "up"), f"the square of {task}", SIDE)

    def expert(self, task: str, route: str = FIRST) -> Expert:
        return Pusher(up=task == "up")
