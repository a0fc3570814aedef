"""Which of transformers' classes a model is loaded as: text alone, or what reads images and sound beside it.

Of many checkpoints transformers has both: Qwen3.5's weights load as a `ForConditionalGeneration`, and without what sees
as a `ForCausalLM`. The config says as which they were saved; an adapter says by its names on which it was trained.
"""

from collections.abc import Iterable
from typing import Any

import torch

from rlrazor.lm.offloading import IN_PEFT

_AUTO = {
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "AutoModelForMultimodalLM": "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
}


def class_of(config: Any, adapter: Iterable[str] = ()) -> Any:
    """The auto class that loads a model of this config: of several the one whose class the config names, or the first.

    `adapter`: names of an adapter's weights, of which the class has to have the modules; where it has as few as another
    has, the order decides. Whether any class loads it is left to the loading.
    """
    import transformers

    classes = [getattr(transformers, name) for name in _classes(config)]
    if len(classes) < 2 or not (modules := _modules(adapter)):
        return classes[0]
    return max(classes, key=lambda one: len(modules & _modules_of(one, config)))


def generating() -> set[str]:
    """The names of all classes that write text: those that this transformers' auto classes load."""
    from transformers.models.auto import modeling_auto

    names = [name for mapping in _AUTO.values() for name in getattr(modeling_auto, mapping, {}).values()]
    return {one for name in names for one in (name if isinstance(name, tuple) else (name,))}


def _classes(config: Any) -> list[str]:
    """Names of auto classes, the best first."""
    from transformers.models.auto import modeling_auto

    by_auto = {auto: getattr(modeling_auto, mapping, {}).get(config.model_type) for auto, mapping in _AUTO.items()}
    found = [auto for auto, name in by_auto.items() if name]
    named = next(iter(getattr(config, "architectures", None) or ()), None)
    return sorted(found, key=lambda auto: by_auto[auto] != named) or ["AutoModelForCausalLM"]


def _modules(adapter: Iterable[str]) -> set[str]:
    """The modules that an adapter was put around, by its weights' names."""
    found = set()
    for name in adapter:
        parts = name.removeprefix(IN_PEFT).split(".")
        ends = [at for at, part in enumerate(parts) if at and not part.isdigit()]
        found |= {".".join(parts[:at]) for at in ends}
    return found


def _modules_of(auto: Any, config: Any) -> set[str]:
    try:
        with torch.device("meta"):
            return {name for name, _ in auto.from_config(config, trust_remote_code=False).named_modules() if name}
    except Exception:  # which loading will raise again
        return set()
