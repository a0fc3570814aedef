"""What a sweep of robot policies is made of: settings with their help, presets, and the specs that follow from them.

Imports neither torch nor a simulator.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import product
from typing import TYPE_CHECKING, Any

from rlrazor import bounds
from rlrazor.errors import RazorError
from rlrazor.experiments.robot.tasks import NEW, PAPER_PRIOR, PRIOR
from rlrazor.runs.records import BASE, Ancestor, RunSpec
from rlrazor.runs.settings import Presets, check_bounds, check_many, check_runs, setting

if TYPE_CHECKING:
    from rlrazor.experiments.robot.methods import Method

EXPERIMENT = "robot"
RECIPE = 1  # goes into every base's spec: raise it when a change to this folder changes the bits of a run

TRANSFORMER = "transformer"
META_WORLD = "meta-world"
SIMPLER = "simpler"
LIBERO_SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")
IMAGES = (SIMPLER, *LIBERO_SUITES)
"""The worlds that are seen by a camera, and need a policy that sees."""
DTYPES = ("float32", "bfloat16")
SCORED = ("sampled", "greedy")
BASE_RANGE = (0.2, 0.4)
"""How often a base should solve the new task: now and then, so that RL has something to begin with."""
PAPER_METHODS = ("sft-second", "reinforce")
ALL_METHODS = ("sft", "sft-second", "filtered", "reinforce", "grpo", "reinforce+kl", "grpo+kl", "kl-dpg")


@dataclass(frozen=True)
class Config:
    """The grid of one sweep: every combination of a method, a learning rate and a seed is a run.

    Each seed has a base of its own, which all its runs start from. Defaults are the full experiment's.
    """

    methods: tuple[str, ...] = setting("methods, comma-separated, or 'paper' (two) or 'all' (eight)", ALL_METHODS)
    lrs: tuple[float, ...] = setting(
        "learning rates of offline methods, comma-separated, or LOW:HIGH:COUNT log-spaced", (3e-5, 1e-4, 3e-4)
    )
    rl_lrs: tuple[float, ...] = setting("learning rates of on-policy methods, as above", (1e-5, 3e-5))
    seeds: tuple[int, ...] = setting("seeds; each makes a base policy of its own", (0, 1, 2))
    checkpoints_per_epoch: int = setting("checkpoints measured per run", 3)
    new_task: str = setting("the task that is learnt", NEW)
    prior_tasks: tuple[str, ...] = setting("the tasks that the base can do, comma-separated", PRIOR)
    updates: int = setting("updates of a run of an offline method", 600)
    batch_size: int = setting("states per update", 256)
    grid: int = setting("starts of the new task that are learnt from: so many on each side of a grid", 10)
    per_start: int = setting("demonstrations of each start", 10)
    expert_noise: float = setting("standard deviation of noise on the actions of these demonstrations", 0.1)
    tries: int = setting("trajectories of the base from each start, of which its successes are learnt from", 20)
    rl_updates: int = setting("updates, each on new trajectories", 150)
    starts: int = setting("starts of each of them", 16)
    group_size: int = setting("trajectories of each start", 5)
    kl_coef: float = setting(
        "weight of KL(pi || pi0), of an episode or offline of an action, in the methods named ...+kl", 0.01
    )
    demonstrations: int = setting("demonstrations of each prior task that the base learns from", 60)
    new_demonstrations: int = setting("the same of the new task", 30)
    noise: float = setting("standard deviation of noise on the actions of the former", 0.3)
    new_noise: float = setting("the same of the latter", 0.3)
    bc_updates: int = setting("updates of the base", 400)
    bc_batch: int = setting("states per update of the base", 512)
    bc_lr: float = setting("learning rate of the base", 2e-3)
    width: int = setting("numbers that the transformer has for each token", 160)
    layers: int = setting("layers of the transformer", 3)
    heads: int = setting("attention heads of each", 4)
    episodes: int = setting("held-out episodes that success is measured on, of each task, sampled and greedy each", 100)
    kl_episodes: int = setting("of these, sampled ones that KL is measured on", 30)
    scored: str = setting("the score: success of actions that are sampled, or greedy", "sampled")
    thresholds: tuple[float, ...] = setting("new-task scores at which the report compares methods", (0.6, 0.7, 0.8))
    world: str = setting(
        "meta-world; or a suite of LIBERO, such as libero_goal, or simpler, with a policy of images", META_WORLD
    )
    policy: str = setting("transformer, made here; or a vision-language model, a folder or hub id", TRANSFORMER)
    dtype: str = setting("of that model's weights, float32 or bfloat16", "float32")
    lora_rank: int = setting("of that model, train an adapter of this rank; 0: all weights", 0)

    def __post_init__(self) -> None:
        check_many(self, ("methods", "lrs", "rl_lrs", "seeds", "prior_tasks", "thresholds"))
        for name, known in (("scored", SCORED), ("dtype", DTYPES)):
            if (value := getattr(self, name)) not in known:
                raise RazorError(f"Unknown {name} {value!r:.60}. Choose from: {', '.join(known)}.")
        if self.new_task in self.prior_tasks:
            raise RazorError(f"{self.new_task} cannot be the new task and a prior one: leave it out of one of them.")
        check_bounds(self)
        self._check_policy()
        self._check_size()
        for name in self.methods:
            if name not in ALL_METHODS:
                self.method_of(name)

    def _check_policy(self) -> None:
        """Raise RazorError for a policy that is not of this world."""
        if (self.world in IMAGES) == (self.policy == TRANSFORMER):
            raise RazorError(
                f"The policy {TRANSFORMER!r} reads the states of {META_WORLD}, and a vision-language model the images "
                f"of {', '.join(IMAGES)}: change --policy or --world."
            )
        if self.policy == TRANSFORMER and self.width % self.heads:
            raise RazorError(f"width must be a multiple of heads, and {self.width} is none of {self.heads}.")
        if self.dtype != "float32" and not self.lora_rank:
            raise RazorError(f"Weights in {self.dtype} are too coarse to train: give an adapter, --lora-rank 32 say.")

    def _check_size(self) -> None:
        """Raise RazorError for a grid that nobody could wait for, or what no machine could hold."""
        check_runs(
            len(self.methods) * max(len(self.lrs), len(self.rl_lrs)) * len(self.seeds), self.checkpoints_per_epoch
        )
        starts = self.grid**2
        if self.starts > starts:
            raise RazorError(f"There are {starts} starts on a grid of {self.grid}: lower starts, or raise grid.")
        if self.kl_episodes > self.episodes:
            raise RazorError("kl_episodes are some of the episodes, so they cannot be more: lower them.")
        for what, count, mend in (
            ("demonstrations", starts * self.per_start, "lower grid or per_start"),
            ("trajectories of the base", starts * self.tries, "lower grid or tries"),
            ("trajectories an update", self.starts * self.group_size, "lower starts or group_size"),
            ("held-out episodes", self.episodes * (1 + len(self.prior_tasks)), "lower episodes"),
        ):
            bounds.check_size(what, count, bounds.MOST_EPISODES, mend)

    def method_of(self, name: str) -> "tuple[Method, bool]":
        """The method of this name, and whether it has a penalty. Raises RazorError for an unknown one."""
        from rlrazor.experiments.robot.methods import find_method  # which imports torch

        return find_method(name)

    def used(self) -> list[str]:
        """The settings that matter to these methods and this policy."""
        found = [self.method_of(name) for name in self.methods]
        idle: set[str] = set()
        if not any(method.on_policy for method, _ in found):
            idle |= {"rl_lrs", "rl_updates", "starts", "group_size"}
        if all(method.on_policy for method, _ in found):
            idle |= {"lrs", "updates", "batch_size"}
        idle |= set() if any(method.route for method, _ in found) else {"per_start", "expert_noise"}
        idle |= set() if any(method.own for method, _ in found) else {"tries"}
        idle |= set() if any(penalised for _, penalised in found) else {"kl_coef"}
        idle |= {"dtype", "lora_rank"} if self.policy == TRANSFORMER else {"width", "layers", "heads"}
        return [one.name for one in fields(self) if one.name not in idle]

    def base_specs(self, data: str) -> list[RunSpec]:
        """A base run per seed; `data` tells what the policy and its world are made from."""
        kept = [
            "new_task",
            "demonstrations",
            "new_demonstrations",
            "noise",
            "new_noise",
            "bc_updates",
            "bc_batch",
            "bc_lr",
        ]
        kept += ["episodes", "kl_episodes", "scored"]
        kept += ["width", "layers", "heads"] if self.policy == TRANSFORMER else ["policy", "dtype", "lora_rank"]
        params = {"recipe": RECIPE, "world": self.world, "data": data, "prior_tasks": list(self.prior_tasks)}
        params |= {name: getattr(self, name) for name in kept}
        return [RunSpec(EXPERIMENT, BASE, params, seed) for seed in self.seeds]

    def specs(self, data: str, methods: Sequence[str]) -> list[RunSpec]:
        """The fine-tuning runs of these methods, method by method."""
        return [
            RunSpec(EXPERIMENT, name, {"lr": lr, **self._of_run(name)}, base.seed, Ancestor(base, 0))
            for base, name in product(self.base_specs(data), methods)
            for lr in (self.rl_lrs if self.method_of(name)[0].on_policy else self.lrs)
        ]

    def _of_run(self, name: str) -> dict[str, Any]:
        """The params of a run by this method, but for its learning rate."""
        method, penalised = self.method_of(name)
        params: dict[str, Any] = {"schedule": "constant", "epochs": 1, "grid": self.grid}
        params |= {"checkpoints_per_epoch": self.checkpoints_per_epoch, "kl_coef": self.kl_coef if penalised else 0.0}
        if method.on_policy:
            return params | {"updates": self.rl_updates, "starts": self.starts, "group_size": self.group_size}
        params |= {"updates": self.updates, "batch_size": self.batch_size}
        if method.own:
            return params | {"tries": self.tries}
        return params | {"per_start": self.per_start, "expert_noise": self.expert_noise}


PRESETS: Mapping[str, Config] = {
    "quick": Config(
        methods=("sft", "reinforce"),
        lrs=(3e-4,),
        rl_lrs=(3e-5,),
        seeds=(0,),
        checkpoints_per_epoch=2,
        prior_tasks=(*PAPER_PRIOR, "reach"),
        updates=100,
        per_start=2,
        rl_updates=16,
        demonstrations=40,
        new_demonstrations=30,
        bc_updates=300,
        episodes=40,
        kl_episodes=10,
        thresholds=(0.5, 0.6, 0.7),
    ),
    "paper": Config(),
}

_TYPED = Presets(PRESETS, {"paper": lambda: PAPER_METHODS, "all": lambda: ALL_METHODS})
resolve, parse_setting = _TYPED.resolve, _TYPED.parse
