"""What scores on prior tasks cost: what items share read once, against lm-eval's own reading.

    python benchmarks/prior_tasks.py MODEL --data-mirror DIR [--tasks hellaswag,truthfulqa_mc1,mmlu] [--items 57]

MODEL is a hub id, a folder, a .gguf file, or a base by name. CPU seconds on one thread, so that other work on the
machine matters less; the data are loaded before. The scores of both are printed, and should be the same.
"""

import argparse
import time
from pathlib import Path
from unittest.mock import patch

from lm_eval.models.huggingface import HFLM

from rlrazor.lm import compute
from rlrazor.lm.harness.reader import Reader
from rlrazor.lm.models import load
from rlrazor.lm.prior import PriorTasks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data-mirror", type=Path)
    parser.add_argument("--tasks", default="hellaswag,truthfulqa_mc1,mmlu")
    parser.add_argument("--items", type=int, default=57)
    arguments = parser.parse_args()

    compute.prepare_process(1)
    lm = load(arguments.model)
    print("task, items: seconds and score of lm-eval's, and of ours")
    for name in arguments.tasks.split(","):
        tasks = PriorTasks([name], arguments.items, arguments.data_mirror)
        items, found = tasks.counts()[name], []
        for reading in (HFLM._loglikelihood_tokens, Reader._loglikelihood_tokens):
            with patch.object(Reader, "_loglikelihood_tokens", reading):
                began = time.process_time()
                score = tasks.scores(lm)[name].value
            found.append(f"{time.process_time() - began:.1f} s {score:.4f}")
        print(f"{name}, {items}: {', '.join(found)}", flush=True)


if __name__ == "__main__":
    main()
