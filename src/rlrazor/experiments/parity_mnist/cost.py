"""What runs on ParityMNIST cost: counts, and the two things that take time, an update and an evaluation."""

import statistics
import time

import torch

from rlrazor import objectives
from rlrazor.experiments.parity_mnist.config import Config
from rlrazor.experiments.parity_mnist.policy import NEW_TASK, PIXELS, DigitPolicy, as_inputs, log_probs
from rlrazor.experiments.parity_mnist.sampling import generator, sample
from rlrazor.lm.compute import prepare_process
from rlrazor.runs.dry_run import Sizes, Trial, peak_memory
from rlrazor.runs.experiment import Cost
from rlrazor.runs.records import BASE, RunSpec

TRAIN_IMAGES, TEST_IMAGES = 60_000, 20_000
WEIGHTS_BYTES = 4 * sum(weight.numel() for weight in DigitPolicy().parameters())
RECORD_BYTES = 2000  # a line of records.jsonl, twice, and its row
# Of data, and of an evaluation.
IMAGES_BYTES = 2 * (TRAIN_IMAGES + TEST_IMAGES // 2) * PIXELS + 4 * TEST_IMAGES * (PIXELS + 1)
LEAST_ERROR = 0.2  # of the seconds, as a share: a machine's speed differs by as much from one minute to the next
MEASURES_COST = 1.5  # an evaluation with every measure of drift against scores alone (benchmarks/parity_mnist.py)
TRACED_COST = 0.3  # a traced step, which looks at a twentieth of the images, and takes two gradients on them besides
REPEATS = 20


def of(spec: RunSpec, images: int = TRAIN_IMAGES) -> Cost:
    """Of a run on so many images, by default all."""
    if spec.method == BASE:
        return Cost(0, 1)
    params = spec.params
    steps = -(-images // params["batch_size"]) * params["epochs"]
    return Cost(steps, steps if params.get("traced") else params["epochs"] * params["checkpoints_per_epoch"])


def trial(config: Config, inputs: float = TEST_IMAGES * MEASURES_COST) -> Trial:
    """Time an update and an evaluation, on random images; of an evaluation, `inputs` tell the cost."""
    prepare_process(1)
    timings = [_time_step(config) for _ in range(3)]
    step, evaluation = statistics.median(timings), _time_evaluation(inputs)

    def seconds(spec: RunSpec, cost: Cost) -> float:
        measuring = evaluation * (TRACED_COST if spec.params.get("traced") else 1)
        return cost.steps * step + cost.checkpoints * measuring

    return Trial(
        run=seconds,
        error=max(LEAST_ERROR, (max(timings) - min(timings)) / 2 / step),
        sizes=Sizes(peak_memory() + IMAGES_BYTES, RECORD_BYTES, WEIGHTS_BYTES, WEIGHTS_BYTES),
        timed=f"{3 * REPEATS} updates of {config.batch_size} images, and {TEST_IMAGES // 10:,} images evaluated",
    )


def _time_step(config: Config) -> float:
    """Seconds of one training step of GRPO, the dearest of the usual methods."""
    policy, rng = DigitPolicy(), generator(0, "estimate")
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    inputs = as_inputs(torch.randint(256, (config.batch_size, 28, 28), generator=rng, dtype=torch.uint8), NEW_TASK)
    start = 0.0
    for repeat in range(REPEATS + 3):
        if repeat == 3:  # after warming up
            start = time.perf_counter()
        logp_BV = policy(inputs).log_softmax(dim=-1)
        actions_BG = sample(logp_BV.detach().exp(), config.group_size, rng)
        loss = objectives.grpo(logp_BV.gather(1, actions_BG), (actions_BG % 2).float(), actions_BG)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (time.perf_counter() - start) / REPEATS


def _time_evaluation(count: float) -> float:
    """Seconds of an evaluation, whose time is that of running so many images."""
    policy, inputs = DigitPolicy(), torch.rand(TEST_IMAGES // 10, PIXELS + 1)
    log_probs(policy, inputs)
    start = time.perf_counter()
    log_probs(policy, inputs)
    return (time.perf_counter() - start) * count / len(inputs)
