"""`razor doctor`: versions, devices, what is installed for which command: one paste for a report of a bug.

It says what this installation is, and nothing of who uses it: no names of users, machines or folders, and of the
environment only settings that change what is computed.
"""

import argparse
import getpass
import os
import platform
import re
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import rlrazor
from rlrazor import extras
from rlrazor.cli import exits
from rlrazor.cli.printing import Subparsers, human_bytes, print_json
from rlrazor.errors import RazorError, cause_of
from rlrazor.system import cores, writing

# What each command cannot do without, by the names of extras; with options it may want more.
COMMANDS: Mapping[str, Sequence[str]] = {
    "pick, report, theory, tasks, reproduce parity-mnist": (),
    "ForgettingMonitor, watch, compare, pick --base, convert": ("guard",),
    "compare --prior, evaluate": ("guard", "eval"),
    "finetune, sweep, calibrate, continual, reproduce language": ("guard", "train", "eval"),
    "reproduce robot": ("robot",),
}
OPTIONAL = {"peft": "adapters", "gguf": "GGUF files", "bitsandbytes": "models in 4 or 8 bits", "deepspeed": "ZeRO"}
SETTINGS = (
    *("CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "NVIDIA_TF32_OVERRIDE"),
    *("CUBLAS_WORKSPACE_CONFIG", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "RLRAZOR_THREADS", "HF_HUB_OFFLINE"),
    *("TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "ACCELERATE_MIXED_PRECISION", "DS_ACCELERATOR", "MUJOCO_GL"),
)
_NO_SETTINGS = "environment: no settings that change what is computed"
_CORE = ("torch", "numpy", "scipy", "polars", "safetensors", "pydantic")
_DISTRIBUTIONS = {"lm_eval": "lm-eval", "math_verify": "math-verify"}  # where it is not the module's name
_PLAIN = re.compile(r"[\w.,:=+\-]{1,80}")  # what a setting of SETTINGS is; anything else is not shown


def add_to(commands: Subparsers) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "doctor",
        help="versions, devices, and what is installed for which command: for a report of a bug",
        description="Print what this installation is: versions, devices, what is installed and for which command, and "
        "settings of the environment. It holds no names of users, machines or folders: paste it into a bug report.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Look, and print."""
    found = _without_names(examine())
    if arguments.json:
        print_json(found)
    else:
        print("\n".join(_lines(found)))
    return exits.DONE


def examine() -> dict[str, Any]:
    """What there is to know, as JSON can hold it."""
    installed = {extra: _packages(extra) for extra in extras.EXTRAS}
    unusable = {extra for extra, packages in installed.items() if not all(map(_usable, packages.values()))}
    return {
        "rlrazor": rlrazor.__version__,
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": cores.available(),
        "memory_bytes": _memory(),
        **_torch(),
        "packages": {name: _version(name) for name in _CORE},
        "extras": installed,
        "optional": {name: {"version": _version(name), "for": what} for name, what in OPTIONAL.items()},
        "commands": {
            command: {"lacks": [extra for extra in needed if extra in unusable]} for command, needed in COMMANDS.items()
        },
        "settings": {name: value for name in SETTINGS if (value := _setting(name)) is not None},
        "cache": _cache(),
    }


def _packages(extra: str) -> dict[str, dict[str, Any]]:
    """What an extra brings, by the names of distributions: those that its code asks for, and those it is declared with.

    `version`: None where it is not installed; `needs`: the range of versions, where the installed one is not in it.
    """
    ranges = _ranges(extra)
    names = dict.fromkeys([*(_DISTRIBUTIONS.get(name, name) for name in extras.EXTRAS[extra]), *ranges])
    found = {}
    for name in names:
        version, spec = _version(name), ranges.get(name, "")
        found[name] = {"version": version, "needs": spec if version and not _fits(version, spec) else None}
    return found


def _usable(found: Mapping[str, Any]) -> bool:
    return found["version"] is not None and found["needs"] is None


def _version(name: str) -> str | None:
    return extras.versions_of([name]).get(name)


def _ranges(extra: str) -> dict[str, str]:
    """By the names of packages, the versions that an extra of ours asks for; none where we are not installed."""
    found = {}
    with suppress(metadata.PackageNotFoundError):
        for line in metadata.requires("rlrazor") or ():
            requirement, _, marker = line.partition(";")
            parts = re.match(r"\s*([\w.-]+)(?:\[[^]]*\])?\s*(.*)", requirement)
            of = re.search(r"extra\s*==\s*['\"]([\w-]+)", marker)
            if parts and of and of[1] == extra and parts[1] != "rlrazor":
                found[parts[1].lower()] = parts[2].strip()
    return found


def _fits(version: str, spec: str) -> bool:
    """Whether a version is in a range; where nothing can tell, it is."""
    try:
        from packaging.specifiers import SpecifierSet

        return SpecifierSet(spec).contains(version, prereleases=True)
    except Exception:  # no packaging, or a version that is none
        return True


def _torch() -> dict[str, Any]:
    """The devices that torch sees; what it cannot do is said, as it may be what is wrong."""
    try:
        import torch

        found: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda, "devices": []}
        for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
            of = torch.cuda.get_device_properties(number)
            free, total = torch.cuda.mem_get_info(number)
            found["devices"].append(
                {
                    "name": of.name,
                    "capability": f"{of.major}.{of.minor}",
                    "memory_bytes": total,
                    "free_bytes": free,
                    "bfloat16": torch.cuda.is_bf16_supported(including_emulation=False),
                }
            )
        if found["cuda"] and not found["devices"]:
            found["trouble"] = "torch is built for CUDA and sees no device: models are measured on the CPU."
        return found
    except Exception as error:  # of a library that it cannot load, say
        return {"torch": None, "cuda": None, "devices": [], "trouble": f"torch cannot be used: {cause_of(error)}"}


def _memory() -> int | None:
    with suppress(ValueError, OSError, AttributeError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def _setting(name: str) -> str | None:
    value = os.environ.get(name)
    return value if not value or _PLAIN.fullmatch(value) else "(set)"


def _cache() -> dict[str, Any]:
    """Whether the cache can be written to, and the space that is left there."""
    folder = writing.cache_root()
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    trouble, free = None, None
    try:
        writing.check_writable(folder / "doctor")
        free = shutil.disk_usage(there).free
    except (RazorError, OSError):
        trouble = "The cache cannot be written to: set RLRAZOR_CACHE to a folder that can."
    return {"free_bytes": free, "trouble": trouble}


def _without_names(value: Any) -> Any:
    """The same without the user's and the machine's names, and folders that a sentence may have them in."""
    if isinstance(value, Mapping):
        return {name: _without_names(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_without_names(one) for one in value]
    if not isinstance(value, str):
        return value
    for name, instead in _names():
        value = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", instead, value)
    return re.sub(r"(?<![\w/])/(?:[\w.@+~-]+/)+", "…/", value)


def _names() -> Iterator[tuple[str, str]]:
    """What is not to be printed, the longest first; names of two letters would be found in words."""
    found: list[tuple[str, str]] = []
    with suppress(RuntimeError):
        found.append((str(Path.home()), "~"))
    with suppress(Exception):  # a user without a name
        found.append((getpass.getuser(), "USER"))
    found += [(socket.gethostname(), "HOST"), (platform.node(), "HOST")]
    yield from sorted(((name, instead) for name, instead in found if len(name) > 2), key=lambda one: -len(one[0]))


# For people


def _lines(found: Mapping[str, Any]) -> Iterator[str]:
    memory = human_bytes(found["memory_bytes"])
    yield f"rlrazor {found['rlrazor']}, Python {found['python']}, {found['system']}"
    yield f"{found['cores']} cores, {memory} of memory; Python runs from {_place()}"
    yield f"torch {found['torch'] or 'missing'}, {'CUDA ' + found['cuda'] if found['cuda'] else 'without CUDA'}"
    for number, one in enumerate(found["devices"]):
        yield (
            f"  cuda:{number} {one['name']}, {human_bytes(one['free_bytes'])} of {human_bytes(one['memory_bytes'])} "
            f"free, capability {one['capability']}, {'with' if one['bfloat16'] else 'without'} bfloat16"
        )
    yield ", ".join(f"{name} {version or 'missing'}" for name, version in found["packages"].items() if name != "torch")
    for extra, packages in found["extras"].items():
        yield f"[{extra}] {', '.join(_package(name, one) for name, one in packages.items())}"
    yield ", ".join(f"{_package(name, one)} (for {one['for']})" for name, one in found["optional"].items())
    for command, one in found["commands"].items():
        lacks = one["lacks"]
        yield f"{command}: {'ready' if not lacks else 'lacks ' + ', '.join(f'[{extra}]' for extra in lacks)}"
    for extra in dict.fromkeys(extra for one in found["commands"].values() for extra in one["lacks"]):
        yield f"  [{extra}] is installed {extras.installing(extra)}"
    yield ", ".join(f"{name}={value}" for name, value in found["settings"].items()) or _NO_SETTINGS
    yield found["cache"]["trouble"] or f"cache: {human_bytes(found['cache']['free_bytes'])} free"
    if "trouble" in found:
        yield found["trouble"]


def _place() -> str:
    """What kind of environment: its folder would be somebody's."""
    return "a virtual environment" if sys.prefix != sys.base_prefix else "no virtual environment"


def _package(name: str, found: Mapping[str, Any]) -> str:
    if found["version"] is None:
        return f"{name} missing"
    return f"{name} {found['version']}" + (f" (needs {needs})" if (needs := found.get("needs")) else "")
