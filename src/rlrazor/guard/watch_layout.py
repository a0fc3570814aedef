"""Where a run's checkpoints are in its folder, whatever trainer writes them.

A step has a folder of its own, which is told by its name, and somewhere in it a model or an adapter in the hub's
layout, which is told by its files:

    checkpoint-50/                                   transformers, TRL, axolotl, LLaMA-Factory, unsloth; an adapter too
    vX-.../checkpoint-50/                            ms-swift, in both of its trainers; beside it checkpoint-50-merged
    global_step_50/actor/huggingface/, lora_adapter/ verl on FSDP; on Megatron actor/model/huggingface/
    step_50/policy/weights/, step_50-hf/             NeMo RL; what its converter wrote
    epoch_0_step_50/model/consolidated/              NeMo Automodel; of an adapter model/
    checkpoint/step-50/                              torchtitan, where it saves in the hub's format; step-50-hf/
    iter_0000050/, iter_0000050_hf/                  Megatron's exports
    global_step50_hf/                                OpenRLHF
    epoch_1/                                         torchtune

Where there is none, because the trainer saved shards, a sentence says how to make one.
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlrazor.errors import RazorError

_STEP = re.compile(
    r"(?:epoch_\d+_)?(?:checkpoint|ckpt|global_steps?|step|iter|iteration)[-_]?0*(\d{1,9})"
    r"(?:[-_](?:hf|huggingface|merged))?"
)
_EPOCH = re.compile(r"epoch[-_]0*(\d{1,9})")  # of trainers that save at the end of each, and nothing else
_DEEPEST = 5  # folders within that of a step: step_50/policy/weights/model/consolidated
# Other models than the policy, and its shards.
_OTHERS = {"critic", "value", "reward", "ref", "optim", "optimizer", "sharded", "dist_ckpt"}
_POLICY = {"actor", "policy"}
ADAPTER, MODEL = "adapter_config.json", ("config.json", "model.safetensors", "model.safetensors.index.json")


@dataclass(frozen=True)
class StepFolder:
    """The folders of one step: that of its name, and those with what converters have made of it. Named after one."""

    step: int
    folders: Sequence[Path]

    @property
    def name(self) -> str:
        """Of the first, which is the trainer's own."""
        return self.folders[0].name

    def files(self) -> Iterator[tuple[Path, os.stat_result]]:
        """All in it, with what the system knows of them; what vanishes meanwhile is left out."""
        for folder in self.folders:
            for within, _, names in _walk(folder):
                for name in names:
                    path = within / name
                    try:
                        found = path.stat()
                    except OSError:
                        continue
                    yield path, found


def steps_in(run: Path) -> list[StepFolder]:
    """The steps of a run, in order: those in its folder, or else those in the one folder in it that has any.

    Raises RazorError where several have, and OSError as listing a folder does.
    """
    found = _steps(run)
    if not found:
        policy = (path for path in _folders(run) if path.name.strip("_") not in _OTHERS)  # OpenRLHF has _critic
        inner = {path: steps for path in policy if (steps := _steps(path))}
        if len(inner) > 1:
            names = ", ".join(sorted(path.name for path in inner))
            raise RazorError(f"{run} holds the checkpoints of several runs, in {names}: name one of these folders.")
        found = next(iter(inner.values()), {})
    return [
        StepFolder(step, sorted(paths, key=lambda path: (len(path.name), path.name)))
        for step, paths in sorted(found.items())
    ]


def model_in(step: StepFolder) -> Path | None:
    """The folder of the policy: an adapter if there is one, else a model; None where there is neither.

    Weights need not be whole, nor there yet.
    """
    adapters, models = [], []
    for folder in step.folders:
        for within, depth, names in _walk(folder):
            of_policy = not _POLICY & set(within.relative_to(folder).parts)
            if ADAPTER in names:
                adapters.append((of_policy, depth, within))
            elif any(name.endswith(".safetensors") for name in names) and _is_model(names):
                models.append((of_policy, depth, within))
    found = adapters or models
    return min(found, key=lambda one: one[:2])[2] if found else None


def why_none(step: StepFolder) -> str:
    """What a finished step has instead of a model in the hub's layout, and what to do about it."""
    names = {path.relative_to(folder).as_posix(): path for folder in step.folders for path in _files(folder)}
    own, out = step.folders[0], f"{step.folders[0]}-hf"

    def has(pattern: str) -> bool:
        return any(re.search(pattern, name) for name in names)

    if has(r"(^|/)actor/"):
        backend = "megatron" if has(r"dist_ckpt/") else "fsdp"
        return (
            "verl saved its own shards and no weights in the hub's format: add hf_model to "
            "actor_rollout_ref.actor.checkpoint.save_contents, or convert it with python -m verl.model_merger merge "
            f"--backend {backend} --local_dir {own / 'actor'} --target_dir {out}"
        )
    if has(r"^policy/weights/"):
        script = "convert_megatron_to_hf.py" if has(r"^policy/weights/iter_") else "convert_dcp_to_hf.py"
        return (
            "NeMo RL saved a distributed checkpoint and no weights in the hub's format: convert it with its "
            f"examples/converters/{script} --hf-ckpt-path={out}"
        )
    if has(r"(^|/)shard-\d+-model-.*\.safetensors$"):
        return "its safetensors are the shards of NeMo Automodel: set save_consolidated: true"
    if has(r"^pytorch_model_fsdp"):
        return (
            "its weights are FSDP's shards: convert them with accelerate merge-weights, or set "
            "fsdp_state_dict_type: FULL_STATE_DICT"
        )
    if has(r"(^|/)(mp_rank_\d+[\d_]*/|common\.pt$|run_config\.yaml$|metadata\.json$)"):
        return (
            "it is Megatron's own checkpoint: export it with AutoBridge.export_ckpt of Megatron Bridge, or with the "
            f"exporter of what trains, to {out}"
        )
    if has(r"^[^/]*\.distcp$"):
        return (
            "it is a distributed checkpoint (DCP) and no weights in the hub's format: convert it with torchtitan's "
            f"scripts/checkpoint_conversion/convert_to_hf.py {own} {out} (its checkpoint.last_save_in_hf does so for "
            "the last step), or with the converter of what trains"
        )
    if has(r"(^|/)(\w*zero_pp_rank_|mp_rank_\d+_model_states)"):
        return (
            "its weights are DeepSpeed's shards: put them together with its zero_to_fp32.py, or set "
            "stage3_gather_16bit_weights_on_model_save (OpenRLHF: --save_hf_ckpt)"
        )
    if has(r"(^|/)(pytorch_model|adapter_model)[^/]*\.bin$"):
        return "its weights are pickled, which can run code and is not read: save safetensors (save_safetensors)"
    return "it has no weights in the hub's format (model.safetensors, its shards, or adapter_model.safetensors)"


def _is_model(names: Sequence[str]) -> bool:
    """Whether a folder that has safetensors has a model's: by name, or the config that names them."""
    return any(name in names for name in MODEL)


def _steps(folder: Path) -> dict[int, list[Path]]:
    """The folders of steps in it by their number: by steps, or else by epochs. A link to another is no other."""
    for pattern in (_STEP, _EPOCH):
        found: dict[int, list[Path]] = {}
        seen: set[str] = set()
        for path in sorted(_folders(folder), key=lambda path: (path.is_symlink(), path.name)):
            number, real = pattern.fullmatch(path.name), os.path.realpath(path)
            if number and real not in seen:
                seen.add(real)
                found.setdefault(int(number[1]), []).append(path)
        if found:
            return found
    return {}


def _folders(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        return [Path(one.path) for one in entries if not one.name.startswith(".") and one.is_dir()]


def _walk(folder: Path) -> Iterator[tuple[Path, int, list[str]]]:
    """Each folder within, but for those of other models, how deep it is, and the names of its files."""
    waiting = [(folder, 0)]
    while waiting:
        within, depth = waiting.pop(0)
        names = []
        try:
            with os.scandir(within) as entries:
                for one in entries:
                    if not one.is_dir():
                        names.append(one.name)
                    elif depth < _DEEPEST and one.name not in _OTHERS:
                        waiting.append((Path(one.path), depth + 1))
        except OSError:  # it is being deleted
            continue
        yield within, depth, names


def _files(folder: Path) -> Iterator[Path]:
    """All files of a step, also those of its shards."""
    for within, _, names in os.walk(folder):
        for name in names:
            yield Path(within) / name
