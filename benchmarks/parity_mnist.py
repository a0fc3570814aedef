"""How long one run takes, and where the time goes: one epoch, 5 checkpoints, batch 64, one thread.

    python benchmarks/parity_mnist.py [--method grpo] [--batch-size 64] [--repeats 3]

The same run (one epoch of ParityMNIST with 5 checkpoints) takes a public replication about 240 s on a machine with two
cores of an Intel Xeon at 2.1 GHz. Needs the real images, which it gets as `razor reproduce` does.
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from rlrazor.experiments.parity_mnist.config import resolve
from rlrazor.experiments.parity_mnist.evaluate import evaluate
from rlrazor.experiments.parity_mnist.experiment import ParityMnist
from rlrazor.experiments.parity_mnist.methods import find_method, is_correct
from rlrazor.experiments.parity_mnist.policy import load_weights, log_probs
from rlrazor.experiments.parity_mnist.sampling import sample
from rlrazor.experiments.parity_mnist.task import load_task
from rlrazor.experiments.parity_mnist.train import load_base
from rlrazor.lm.compute import prepare_process
from rlrazor.runs.records import Ancestor
from rlrazor.runs.store import Keep, RunStore


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="grpo", help="any method but rl-distilled")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--data-dir", type=Path)
    arguments = parser.parse_args()

    config = replace(
        resolve("paper"),
        methods=(arguments.method,),
        lrs=(1e-4,),
        schedules=("constant",),
        epochs=(1,),
        batch_size=arguments.batch_size,
    )
    (base,), (spec,) = config.base_specs("benchmark"), config.specs("benchmark", config.methods)
    experiment = ParityMnist(arguments.data_dir)
    prepare_process(1)
    start = time.perf_counter()
    task = load_task(arguments.data_dir)
    print(f"{'data: verified, read, as float32':44}{time.perf_counter() - start:8.2f} s")

    with tempfile.TemporaryDirectory() as folder:
        store = RunStore(Path(folder))
        start = time.perf_counter()
        store.keep(base, Keep(last=True))
        store.write(base, list(experiment.train(base, store)), seconds=0)
        print(f"{'base policy: pre-trained, measured':44}{time.perf_counter() - start:8.2f} s")
        parts = load_base(Ancestor(base, 0), store, task)

        walls = []
        for _ in range(arguments.repeats):
            start = time.perf_counter()
            checkpoints = list(experiment.train(spec, store))
            walls.append(time.perf_counter() - start)
    tuned = load_weights(checkpoints[-1].weights())
    one_evaluation = seconds_of(lambda: evaluate(spec, 0, 0.0, tuned, task, parts.reference), 5)
    scores_alone = seconds_of(lambda: [log_probs(tuned, inputs) for inputs in (task.new_test, task.prior_test)], 5)
    wall = min(walls)
    steps = -(-len(task.new_train) // arguments.batch_size)
    title = f"one epoch with {len(checkpoints)} checkpoints, {arguments.method}"
    print(f"{title:44}{wall:8.2f} s  (best of {len(walls)})")
    print(f"{'  of it evaluation':44}{len(checkpoints) * one_evaluation:8.2f} s  ({one_evaluation:.2f} s a checkpoint)")
    ratio = one_evaluation / scores_alone
    print(f"{'    of it scores, without drift':44}{scores_alone:8.2f} s  (a checkpoint; all is {ratio:.2f} times that)")
    print(f"{'  of it training':44}{wall - len(checkpoints) * one_evaluation:8.2f} s  ({steps} steps)")

    method, _ = find_method(arguments.method)
    policy = parts.policy
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.0, weight_decay=0.0, fused=True)
    rng = torch.Generator().manual_seed(0)
    rows = torch.randperm(len(task.new_train), generator=rng)[: arguments.batch_size]
    inputs, digits = task.new_train[rows], task.new_train_digits[rows]
    logits = policy(inputs).detach().requires_grad_()

    def objective() -> torch.Tensor:
        logp_BV = logits.log_softmax(dim=-1)
        actions_BG = sample(logp_BV.detach().exp(), config.group_size if method.on_policy else 2, rng)
        rewards_BG = is_correct(digits[:, None], actions_BG).float()
        loss = method.objective(logp_BV.gather(1, actions_BG), rewards_BG, parts.train_logp[rows].gather(1, actions_BG))
        loss.backward()
        return loss

    def backward() -> None:
        optimizer.zero_grad()
        policy(inputs).backward(torch.ones_like(logits))

    forward_ms = 1e3 * seconds_of(lambda: policy(inputs))
    for name, ms in {
        "gathering the images": 1e3 * seconds_of(lambda: task.new_train.index_select(0, rows)),
        "forward pass": forward_ms,
        "sampling, rewards, objective": 1e3 * seconds_of(objective),
        "backward pass": 1e3 * seconds_of(backward) - forward_ms,
        "AdamW": 1e3 * seconds_of(optimizer.step),
    }.items():
        print(f"{'    a step: ' + name:44}{ms:8.2f} ms")
    print(f"{'peak memory':44}{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:8.2f} GiB")


def seconds_of(work: Callable[[], object], repeats: int = 200) -> float:
    """Mean seconds of a call, after one to warm up."""
    work()
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    return (time.perf_counter() - start) / repeats


if __name__ == "__main__":
    main()
