#!/usr/bin/env bash
# measure.sh MACHINE [NAME...]: results of a CPU again (all, or those named), into bench/results/MACHINE; all take about
# 40 minutes on 2 idle cores, an hour where a training step takes 20 seconds. PYTHON is the interpreter, WRAP goes before
# each command (a lock, taskset). Then `python -m bench.report` makes the README's section.
set -u
cd "$(dirname "$0")/.."
folder=bench/results/${1:?"a short name of this machine"}
names=" ${*:2} " known=" " failed=
run() {
    known+="$1 "
    [[ $names == "  " || $names == *" $1 "* ]] || return 0
    ${WRAP:-} "${PYTHON:-python}" -m "${@:2}" --device cpu --out "$folder/$1.json" || failed+=" $1"
}
loss="bench --ops fnac_loss --cases"
run 1-batch $loss b32-7x7 b64-7x7 b128-7x7 published b512-7x7 b1024-7x7 --rounds 75 --seconds 20
run 2-batch-large $loss b2048-7x7 --rounds 5 --seconds 1
run 3-cells $loss b128-4x4 b128-14x14 b128-28x28
run 4-shapes $loss published-smooth published-channels-last b256-14x14
sizes="b32-7x7 b64-7x7 b128-7x7 published b512-7x7 b1024-7x7 b128-14x14"
run 5-bfloat16 $loss $sizes --dtypes bfloat16 --seconds 10
run 6-parts bench --ops max_logits max_logits_forward --cases published tall wide --seconds 5
run 7-pooled bench --ops paired_maps adjacency_contrastive --cases published b1024-7x7 --seconds 4
run 8-nce bench --ops nce --cases b1024-1x1 --seconds 4
run 9-training-step bench.training_step
run a-training-step-kept bench.training_step --keep-memory
run b-cells-large $loss b128-56x56 --rounds 3 --seconds 1
run c-frames $loss frames --rounds 3 --seconds 1
run d-batch-huge $loss b4096-7x7 --rounds 3 --seconds 1
run e-batch-huger $loss b8192-7x7 --backends compile cpu --rounds 3 --seconds 1
run f-memory-kept $loss $sizes --keep-memory --no-memory
run g-distributed bench.distributed
if grep -q -w amx_bf16 /proc/cpuinfo; then # what serves where there is AVX-512 and no AMX
    FNAC_CPU_ISA=avx512vnni run h-without-amx $loss $sizes --backends cpu --no-memory
fi
for name in "${@:2}"; do
    [[ $known == *" $name "* ]] || failed+=" $name (unknown)"
done
if [[ $failed ]]; then
    echo "measure.sh: failed:$failed" >&2
    exit 1
fi
