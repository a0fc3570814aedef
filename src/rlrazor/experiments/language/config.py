"""What a sweep over language models is made of: settings with their help, presets, and the specs that follow."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Any, TypeVar

from rlrazor import bounds
from rlrazor.errors import RazorError
from rlrazor.experiments.language.methods import (
    EWC,
    FROM_TEACHER,
    OWN,
    REPLAY,
    TEACHER,
    find_method,
    idle_settings,
    protection_of,
)
from rlrazor.lm.harness.asking import Asking
from rlrazor.lm.prompts import template_kwargs
from rlrazor.lm.task_names import CHAT_FORMS, DEFAULT_TASKS, NONE, NOT_IN, PARAGRAPHS, PRIOR, SELF, are_none
from rlrazor.runs import settings
from rlrazor.runs.records import BASE, Ancestor, RunSpec
from rlrazor.runs.settings import Presets, check_bounds, check_many, check_runs, check_samples, kinds_of, setting

EXPERIMENT = "language"
RECIPE = 4  # goes into every base's spec: raise it when a change to this folder changes the bits of a run

TINY = "tiny"  # the base, and the prior suite, that need no download
PRETRAIN_STEPS = 1200
WARMUP = 0.05
THREADS = 4  # not the machine's cores: sums are rounded in another order by another number of threads
SCHEDULES = ("constant", "cosine")
AUTO = "auto"  # of a precision: bf16 where the device computes faster in it, which a CPU does not
PRECISIONS = (AUTO, "float32", "bf16")
DTYPES = ("float32", "bfloat16")
SCORED = ("greedy", "sampled")
AS_SAID = -1  # of fewshot: as many as the task says

UNLIKE = "unlike"
PROBES = (PARAGRAPHS, SELF, PRIOR, UNLIKE)  # of `Config.probes`, in the order of the table; see `further`

PAPER_METHODS = ("sft", "simpo", "reinforce", "dr-grpo")
SMOLLM2_METHODS = (
    *("sft-fixed", "sft-two", "self-sft", "iterative-sft", "oracle", "rl-distilled", "simpo", "self-replay"),
    *("reinforce", "grpo", "dr-grpo", "grpo+kl"),
)
GEMMA_METHODS = ("sft-fixed", "self-sft", "dr-grpo")
TINY_METHODS = (
    *("sft-one", "sft-two", "sft-uniform", "oracle", "rl-distilled", "simpo"),
    *("reinforce", "grpo", "dr-grpo", "dr-grpo+kl", "kl-dpg"),
)


@dataclass(frozen=True)
class Config:
    """The grid of one sweep, and what each checkpoint is measured on.

    Offline methods (SFT, SimPO) run over lrs x schedules x epochs x batch_sizes; on-policy ones over rl_lrs x
    iterations, at a constant learning rate, for one pass over the prompts. Zeros: `max_steps`, `train_prompts` and
    `prior_limit` set no limit, `lora_rank` trains all weights, `max_new_tokens` is the task's.
    """

    base: str = setting(
        "the model to start from: a hub id, a folder, a .gguf file, 'smollm2', 'gemma3-270m', or 'tiny'"
    )
    task: str = setting("the new task, which `razor tasks` lists; of --prompts a name for it")
    methods: tuple[str, ...] = setting("methods, comma-separated, or 'paper', 'tiny' or 'smollm2'")
    lrs: tuple[float, ...] = setting("learning rates, comma-separated, or LOW:HIGH:COUNT log-spaced")
    rl_lrs: tuple[float, ...] = setting("learning rates, as above")
    schedules: tuple[str, ...] = setting("learning-rate schedules: constant, cosine", ("constant",))
    epochs: tuple[int, ...] = setting("passes over the prompts", (1,))
    batch_sizes: tuple[int, ...] = setting("sequences per step", (32,))
    rl_prompts: int = setting("prompts per step", 8)
    group_size: int = setting("samples of each of them", 64)
    iterations: tuple[int, ...] = setting("updates per batch of samples", (1,))
    seeds: tuple[int, ...] = setting("seeds", (0,))
    checkpoints_per_epoch: int = setting("checkpoints measured per epoch, or with max_steps per run", 5)
    max_steps: int = setting("updates at most; 0: as many as the epochs have", 0)
    warmup_steps: float = setting(
        "updates in which the learning rate rises: below 1 a share of the run's, else so many, or 5 % where max_steps, "
        "or an epoch, has no more",
        WARMUP,
    )
    kl_coef: float = setting("weight of KL(pi || pi0)", 0.1)
    replay_share: float = setting("share of the examples that are old", 0.05)
    ewc_strength: float = setting("weight of the pull back to the weights that it starts from", 1e3)
    lwf_strength: float = setting("weight of KL(pi0 || pi) on old text, in nats per token", 1.0)
    own_tries: int = setting("samples at most, of one prompt or another, for each right one that is trained on", 16)
    rounds: int = setting("times that its right samples are drawn, each time from the policy as it is then", 4)
    lora_rank: int = setting("train an adapter of this rank; 0: all weights", 0)
    dtype: str = setting(
        "of the base's weights, in which everything is measured and saved: float32 or bfloat16; weights that are "
        "trained are in float32 meanwhile",
        "float32",
    )
    precision: str = setting(
        "of matrix products in training: float32, bf16 by autocast, or auto, bf16 on a GPU that has it", "float32"
    )
    max_new_tokens: int = setting("tokens of a completion at most; 0: as the task says", 0)
    train_prompts: int = setting("prompts trained on at most; 0: all", 0)
    test_prompts: int = setting("held-out prompts that scores and KL are measured on, at most", 256)
    kl_samples: int = setting("completions of each of them", 1)
    scored: str = setting("new-task score: greedy, or sampled", "greedy")
    prior: tuple[str, ...] = setting("prior tasks, comma-separated names of lm-eval", DEFAULT_TASKS)
    prior_limit: int = setting("items of each prior task at most; 0: all", 0)
    chat_template: str = setting(
        "ask the prior tasks in the tokenizer's chat template, as lm-eval's --apply_chat_template: turns, each example "
        "a turn of the conversation, or one-turn, all of them in the user's; or no",
        NOT_IN,
    )
    fewshot: int = setting("examples before each question of a prior task; -1: as the task says", AS_SAID)
    chat_template_kwargs: str = setting(
        'what the chat template is told, in JSON, such as {"enable_thinking": false}, of the new task\'s prompts and, '
        "with chat_template, of the prior tasks'",
        "{}",
    )
    probes: tuple[str, ...] = setting(
        "further inputs on which KL is measured, comma-separated: paragraphs (the built-in ones), self (what the base "
        "writes from nothing), prior (the prior tasks' own prompts), unlike (code, tables, other languages)",
        (),
    )
    thresholds: tuple[float, ...] = setting("new-task scores at which the report compares methods", (0.95, 0.96, 0.97))
    pretrain_steps: int = setting("updates of its pre-training", PRETRAIN_STEPS)
    threads: int = setting("of each process, on a CPU; another number changes the last digits", THREADS)

    def __post_init__(self) -> None:
        many = ("methods", "lrs", "rl_lrs", "schedules", "epochs", "batch_sizes", "iterations", "seeds", "prior")
        if self.probes == (NONE,):
            object.__setattr__(self, "probes", ())
        check_many(self, (*many, "thresholds", *(["probes"] if self.probes else [])))
        if self.taught and TEACHER not in self.methods:
            raise RazorError(
                f"{self.taught[0]} imitates the sweep's best {TEACHER} policy: add {TEACHER} to the methods."
            )
        for name, values, known in (
            ("schedule", self.schedules, SCHEDULES),
            ("precision", (self.precision,), PRECISIONS),
            ("dtype", (self.dtype,), DTYPES),
            ("scored", (self.scored,), SCORED),
            ("probe", self.probes, PROBES),
            ("chat_template", (self.chat_template,), CHAT_FORMS),
        ):
            unknown = [value for value in values if value not in known]
            if unknown:
                raise RazorError(f"Unknown {name} {unknown[0]!r:.60}. Choose from: {', '.join(known)}.")
        if self.group_size < 2:
            raise RazorError("group_size must be at least 2: a group of one has nothing to compare its reward with.")
        check_bounds(self)
        if self.lora_rank and (held := [name for name in self.methods if protection_of(name) == EWC]):
            raise RazorError(
                f"{held[0]} holds each weight to where it was, and an adapter's were nowhere: leave lora_rank out, or "
                f"take {REPLAY}."
            )
        self._check_size()
        self._check_probes()
        if self.base == TINY and self.dtype != "float32":
            raise RazorError(f"The base {TINY!r} has float32 weights: leave dtype out.")
        if self.base == TINY and (self.asking.as_json() or self.told):
            raise RazorError(
                f"The base {TINY!r} has no chat template, and prior tasks without examples: leave chat_template, "
                "chat_template_kwargs and fewshot out."
            )
        tiny_alone = self.prior == (TINY,) if self.base == TINY else TINY not in self.prior
        if self.has_prior and not tiny_alone:
            if self.base == TINY:
                raise RazorError(f"The base {TINY!r} has prior tasks of its own: set prior to {TINY}.")
            raise RazorError(f"The prior tasks named {TINY!r} are those of the base {TINY!r}: name others with prior.")

    @property
    def told(self) -> dict[str, Any]:
        """What the chat template is told."""
        return template_kwargs(self.chat_template_kwargs)

    @property
    def asking(self) -> Asking:
        """How prior tasks are asked."""
        return Asking.of(self.chat_template, None if self.fewshot == AS_SAID else self.fewshot, self.told)

    @property
    def has_prior(self) -> bool:
        """Whether there are prior tasks, whose scores say what is forgotten."""
        return not are_none(self.prior)

    def used(self) -> list[str]:
        """The settings that matter to these methods and this base."""
        idle = idle_settings(self.methods) | (set() if self.base == TINY else {"pretrain_steps"})
        return [one.name for one in fields(self) if one.name not in idle]

    def _check_size(self) -> None:
        """Raise RazorError for a grid that nobody could wait for, or a step that no machine could hold."""
        offline = len(self.lrs) * len(self.schedules) * len(self.epochs) * len(self.batch_sizes)
        runs = max(offline, len(self.rl_lrs) * len(self.iterations)) * len(self.methods) * len(self.seeds)
        check_runs(runs, self.checkpoints_per_epoch * (1 if self.max_steps else max(self.epochs)))
        check_samples(self, "rl_prompts")
        measured = self.test_prompts * self.kl_samples
        bounds.check_size("measured completions", measured, bounds.MOST_ROWS, "lower test_prompts or kl_samples")

    def _check_probes(self) -> None:
        """Raise RazorError for a probe that there is nothing to make of."""
        if PRIOR in self.probes and not self.has_prior:
            raise RazorError(f"The probe {PRIOR} is the prior tasks' prompts, and there are none: leave it out.")
        if PARAGRAPHS in self.probes and self.base == TINY:
            raise RazorError(f"The base {TINY!r} knows ten letters and no words: leave the probe {PARAGRAPHS} out.")

    @property
    def taught(self) -> list[str]:
        """The methods that imitate a teacher."""
        return [name for name in self.methods if find_method(name)[0].demonstrations == FROM_TEACHER]

    def base_specs(self, base: str, data: str) -> list[RunSpec]:
        """One run per seed that measures the base; `base` and `data` are fingerprints, as in `specs`."""
        return [RunSpec(EXPERIMENT, BASE, self._of_base(base, data), seed) for seed in self.seeds]

    def specs(
        self, base: str, data: str, methods: Sequence[str], teachers: Mapping[int, Ancestor] | None = None
    ) -> list[RunSpec]:
        """The fine-tuning runs of these methods, method by method; `teachers` (seed -> teacher) for `rl-distilled`.

        `base` and `data` are the fingerprints of the base policy and of the new task's prompts.
        """
        specs = []
        for start, name in product(self.base_specs(base, data), methods):
            method, penalised = find_method(name)
            fixed = {
                "kl_coef": self.kl_coef if penalised else 0.0,
                "group_size": self.group_size if method.advantage else None,
                **{key: getattr(self, key) for key in method.settings},
                **{key: getattr(self, key) for key in _TRAINING},
            }
            teacher = None
            if method.demonstrations == FROM_TEACHER:
                assert teachers is not None
                teacher = teachers[start.seed]
            if method.advantage:
                runs = product(self.rl_lrs, SCHEDULES[:1], (1,), (self.rl_prompts,), self.iterations)
            else:
                runs = product(self.lrs, self.schedules, self.epochs, self.batch_sizes, (1,))
            for lr, schedule, epochs, batch_size, iterations in runs:
                own = {"lr": lr, "schedule": schedule, "epochs": epochs, "batch_size": batch_size}
                if self.max_steps or 0 < self.warmup_steps < 1 or method.trainer == OWN:
                    # By its warm-up, when it is measured or how much it draws at once, no beginning of a longer run.
                    own["warmup_epochs"] = epochs
                params = {**own, "iterations": iterations, **fixed}
                specs.append(RunSpec(EXPERIMENT, name, params, start.seed, Ancestor(start, 0), teacher))
        return specs

    def _of_base(self, base: str, data: str) -> dict[str, Any]:
        measured = {key: getattr(self, key) for key in ("test_prompts", "kl_samples", "scored", "prior_limit")}
        if self.probes:
            measured["probes"] = [name for name in PROBES if name in self.probes]
        if asked := self.asking.as_json():
            measured["asked"] = asked
        return {
            "recipe": RECIPE,
            "base": base,
            "task": self.task,
            "data": data,
            "max_new_tokens": self.max_new_tokens,
            **({"chat_template_kwargs": self.told} if self.told else {}),
            **({"dtype": self.dtype, "trained_dtype": "float32"} if self.dtype != "float32" else {}),
            "measured": {**measured, "prior": list(self.prior)},
            **({"pretrain_steps": self.pretrain_steps} if self.base == TINY else {}),
            "threads": self.threads,
        }


AnyConfig = TypeVar("AnyConfig", bound=Config)
_TRAINING = ("checkpoints_per_epoch", "max_steps", "warmup_steps", "lora_rank", "precision", "train_prompts")
KINDS = kinds_of(Config)

# Two cores carry it. Full precision, as measured; learning rates from the least that learns the task within the updates
# to where forgetting shows.
_SMOLLM2 = Config(
    base="smollm2",
    task="letter-word",
    methods=SMOLLM2_METHODS,
    lrs=(1e-5, 2e-5, 5e-5, 1e-4, 2e-4),
    rl_lrs=(1e-5, 2e-5, 5e-5, 1e-4),
    batch_sizes=(24,),
    group_size=6,
    max_steps=36,
    checkpoints_per_epoch=2,
    seeds=(0, 1),
    test_prompts=104,  # four of each letter
    kl_samples=2,
    scored="sampled",
    prior=("hellaswag", "truthfulqa_mc1", "mmlu", "ifeval"),
    prior_limit=456,  # eight of each of MMLU's subjects
    thresholds=(0.8, 0.9, 0.95),
    threads=1,
)

PRESETS: Mapping[str, Config] = {
    # The paper's Table 2. One task at a time: --task math, science or tools.
    "paper": Config(
        base="Qwen/Qwen2.5-3B-Instruct",
        task="math",
        methods=PAPER_METHODS,
        lrs=(1e-5, 3e-5, 5e-5, 7e-5, 9e-5),
        rl_lrs=(1e-5, 2e-5, 3e-5, 4e-5, 5e-5),
        schedules=SCHEDULES,
        epochs=(1, 2),
        batch_sizes=(16, 32, 64, 128),
        iterations=(1, 2),
        precision="bf16",
        warmup_steps=50,
        checkpoints_per_epoch=1,
        thresholds=(0.3, 0.4, 0.5, 0.6),
    ),
    "smollm2": _SMOLLM2,
    "gemma3": replace(_SMOLLM2, base="gemma3-270m", methods=GEMMA_METHODS),
    "tiny": Config(
        base=TINY,
        task="letters",
        methods=TINY_METHODS,
        lrs=(5e-5, 1e-4, 2e-4, 4e-4),
        rl_lrs=(5e-5, 1e-4, 2e-4, 4e-4),
        epochs=(3,),
        batch_sizes=(64,),
        rl_prompts=16,
        group_size=16,
        ewc_strength=1e5,  # it is sure of its answers, so the Fisher information is small
        max_steps=200,
        checkpoints_per_epoch=8,
        kl_samples=4,
        scored="sampled",
        prior=(TINY,),
        thresholds=(0.9, 0.95, 0.98),
        threads=1,  # the model is too small for more
    ),
}


_TYPED = Presets(
    PRESETS,
    {"paper": lambda: PAPER_METHODS, "tiny": lambda: TINY_METHODS, "smollm2": lambda: SMOLLM2_METHODS},
)
resolve, parse_setting = _TYPED.resolve, _TYPED.parse


def settled(config: AnyConfig) -> AnyConfig:
    """With a precision of training that is this device's, where it is `AUTO`.

    As the base's weights are, else bf16 on a GPU that has it. Imports torch, which `resolve` does not.
    """
    if config.precision != AUTO:
        return config
    if config.base == TINY:
        return replace(config, precision="float32")
    from rlrazor.lm import compute

    return replace(config, precision="bf16" if config.dtype == "bfloat16" or compute.has_bf16() else "float32")


def replayed(spec: RunSpec, examples: int) -> int:
    """How many old examples there are among those of a run, whose own are so many: its share of all, or none."""
    share = spec.params.get("replay_share", 0.0)
    return max(1, round(share / (1 - share) * examples)) if share else 0


def count_steps(spec: RunSpec, prompts: int) -> int:
    """Updates of a run on so many prompts."""
    params = spec.params
    steps = steps_per_epoch(spec, prompts) * params["epochs"]
    return int(min(steps, params["max_steps"] or steps))


def warmup_steps(spec: RunSpec, prompts: int) -> int:
    """Of a run on so many prompts, the updates in which the learning rate rises from 0.

    See `Config.warmup_steps`. A short run that is the beginning of a longer one has the same.
    """
    given = float(spec.params["warmup_steps"])
    total = count_steps(spec, prompts)
    if given < 1:
        return round(given * total)
    known = total if "warmup_epochs" in spec.params else steps_per_epoch(spec, prompts)
    return round(given if given < known else WARMUP * known)


def steps_per_epoch(spec: RunSpec, prompts: int) -> int:
    """Updates in one pass over so many prompts."""
    return int(max(1, prompts // spec.params["batch_size"])) * int(spec.params["iterations"])


def due_steps(spec: RunSpec, prompts: int) -> list[int]:
    """The steps after which a checkpoint is measured: evenly spaced, in each epoch or, with `max_steps`, in all."""
    total, per_epoch = count_steps(spec, prompts), spec.params["checkpoints_per_epoch"]
    if spec.params["max_steps"]:
        return sorted(settings.checkpoint_steps(total, 1, per_epoch))
    return sorted(settings.checkpoint_steps(steps_per_epoch(spec, prompts), spec.params["epochs"], per_epoch))
