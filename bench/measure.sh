#!/usr/bin/env bash
# measure.sh [FOLDER]: every committed result of a CPU again, about 25 minutes on 2 idle cores. PYTHON is the interpreter;
# WRAP goes before each command (a lock, taskset). Then `python -m bench.report` makes the README's section.
set -u
cd "$(dirname "$0")/.."
folder=${1:-bench/results}
run() {
    ${WRAP:-} "${PYTHON:-python}" -m "${@:2}" --device cpu --out "$folder/cpu-$1.json"
}
loss="bench --ops fnac_loss --cases"
run 1-batch $loss b32-7x7 b64-7x7 b128-7x7 published b512-7x7 b1024-7x7 --seconds 6
run 2-batch-large $loss b2048-7x7 --seconds 12
run 3-cells $loss b128-4x4 b128-14x14 b128-28x28
run 4-shapes $loss published-smooth published-channels-last b256-14x14
run 5-bfloat16 $loss b128-7x7 published b1024-7x7 b128-14x14 --dtypes bfloat16 --seconds 6
run 6-parts bench --ops max_logits max_logits_forward --cases published tall wide --seconds 6
run 7-pooled bench --ops paired_maps adjacency_contrastive --cases published b1024-7x7 --seconds 4
run 8-nce bench --ops nce --cases b1024-1x1 --seconds 4
run 9-training-step bench.training_step
run b-cells-large $loss b128-56x56 --rounds 3 --seconds 12
run c-frames $loss frames
