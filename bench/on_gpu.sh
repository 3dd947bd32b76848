#!/usr/bin/env bash
# on_gpu.sh: everything that needs a CUDA device, within 9 minutes and without network or installation: builds in place,
# runs the table of samples and the device's own tests on every GPU backend, compute-sanitizer on small samples, and the
# benchmark. Writes on_gpu.log and the results to $OUT (bench/results/gpu without it), as JSON; on_gpu.json says on which
# machine, with which versions, and how each stage ended, and is written anew at each: it is there whatever happens.
#
# Needs python3 (or $PYTHON) with torch, triton, numpy, pytest, setuptools and pybind11; cmake, ninja and a C++20 compiler;
# nvcc; compute-sanitizer for its stages. A stage that fails or runs out of its time does not stop the next ones; the end
# names it, and the exit status is then 1. ONLY="build table-cuda" runs those stages alone.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-bench/results/gpu}
mkdir -p "$out"
log=$out/on_gpu.log
python=${PYTHON:-python3}
limit=${LIMIT:-530} # seconds for everything
failed=() missing=() stages=() machine=() known=()
: >"$log"

say() { echo "$*" | tee -a "$log"; }

# quoted TEXT: as a string of JSON.
quoted() { printf '"%s"' "$(tr -d '\000-\037' <<<"$1" | sed 's/[\\"]/\\&/g')"; }

joined() { # ITEM...: with commas
    local IFS=,
    echo "$*"
}

# record OUTCOME: on_gpu.json, complete at any time.
record() {
    local why=()
    for item in "${missing[@]}"; do why+=("$(quoted "$item")"); done
    printf '{"outcome": %s, "seconds": %s, "missing": [%s], "machine": {%s}, "stages": [%s]}\n' "$(quoted "$1")" \
        "$SECONDS" "$(joined "${why[@]}")" "$(joined "${machine[@]}")" "$(joined "${stages[@]}")" >"$out/on_gpu.part"
    mv "$out/on_gpu.part" "$out/on_gpu.json"
}

# What is known of the machine without a working torch, or any Python.
fact() { machine+=("$(quoted "$1"): $(quoted "$2")"); }
asked() { timeout --kill-after=5 20 "$@" 2>/dev/null </dev/null | head -n 8 | paste -sd ';' || true; }

finish() {
    local status=$?
    trap - EXIT
    if ((${#missing[@]})); then
        record "not started: something is missing"
    elif ((status == 0)); then
        record passed
    elif ((${#failed[@]})); then
        record failed
    else
        record "stopped with status $status"
    fi
    exit "$status"
}
trap finish EXIT
trap 'exit 143' TERM
trap 'exit 130' INT
record running
fact system "$(uname -srm)"
fact gpu "$(asked nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader)"
fact nvcc "$(asked "$(command -v nvcc || echo "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc")" --version)"
fact versions "$(asked "$python" -c '
import importlib.metadata, platform
print("python", platform.python_version())
for name in ("torch", "triton", "numpy", "pytest", "pybind11"):
    try:
        print(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        print(name, "not installed")')"
fact commit "$(asked git rev-parse HEAD)"
fact date "$(date -u +%FT%TZ)"
record running

PATH=$("$python" -c 'import sysconfig; print(sysconfig.get_path("scripts"))' || true):$PATH # pip's cmake and ninja
export PATH PYTHONUNBUFFERED=1

# stage NAME SECONDS COMMAND...: runs it within its time and what is left of the whole.
stage() {
    local name=$1 seconds=$2 status=0 began=$SECONDS outcome
    shift 2
    known+=("$name")
    if [[ -n ${ONLY:-} && " $ONLY " != *" $name "* ]]; then return; fi
    if ((limit - SECONDS < seconds)); then seconds=$((limit - SECONDS)); fi
    echo "--- $name: $*" >>"$log"
    record "running $name"
    if ((seconds < 5)); then
        outcome="no time left" status=124
    else
        timeout --kill-after=5 "$seconds" "$@" </dev/null >>"$log" 2>&1 || status=$?
        case $status in
            0) outcome=ok ;;
            124 | 137) outcome="out of its $seconds s" ;;
            *) outcome=failed ;;
        esac
        if ((status)); then tail -n 25 "$log"; fi
    fi
    say "--- $name: $outcome, $((SECONDS - began)) s"
    if ((status)); then failed+=("$name ($outcome)"); fi
    stages+=("{\"stage\": \"$name\", \"outcome\": \"$outcome\", \"seconds\": $((SECONDS - began)), \"status\": $status}")
    record "running"
}

for module in torch triton numpy pytest setuptools pybind11; do
    timeout --kill-after=5 60 "$python" -c "import $module" 2>/dev/null || missing+=("the Python package $module")
done
for tool in cmake ninja c++; do
    command -v "$tool" >/dev/null || missing+=("$tool")
done
command -v nvcc >/dev/null || [[ -x ${CUDA_HOME:-/usr/local/cuda}/bin/nvcc ]] || missing+=("nvcc")
if ((${#missing[@]})); then
    printf 'on_gpu.sh: %s is missing\n' "${missing[@]}" | tee -a "$log" >&2
    exit 1
fi

stage device 30 "$python" -c '
import torch
assert torch.cuda.is_available(), "torch sees no CUDA device"
print(torch.cuda.get_device_properties(0), "torch", torch.__version__)'
if ((${#failed[@]})); then exit 1; fi

# The machine's own architecture alone: the others are compiled, and their registers counted, where there is no device.
export FNAC_CUDA=on CMAKE_CUDA_ARCHITECTURES=${CMAKE_CUDA_ARCHITECTURES:-native}
stage build 150 "$python" setup.py build_ext --inplace
stage info 30 "$python" -c '
import fnac_kernels
from fnac_kernels._info import render
print(render())
problems = fnac_kernels.info()["backends"]
assert not problems["cuda"] and not problems["triton"], problems'

# Several processes at once where pytest-xdist is installed: the exact results come from the CPU, and Triton compiles each
# of its many variants first.
if "$python" -c 'import xdist' 2>/dev/null; then workers=(-n 8); else workers=(); fi
tests=("$python" -m pytest -q --maxfail=10 -p no:cacheprovider)
table=tests/test_backends.py
parallel=(env OMP_NUM_THREADS=2 "${tests[@]}" "${workers[@]}")
stage table-cuda 90 "${parallel[@]}" $table -k cuda
stage device-tests 90 "${tests[@]}" tests/test_gpu.py
small="cuda and fnac_loss and not masked and (bfloat16 or 17x17c33 or 33x33c48 or 5x5c40 or 19x19c70 or 10x10c24)"
sanitized=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1) # or tensors lie wall to wall
stage memcheck 60 "${sanitized[@]}" --tool memcheck "${tests[@]}" $table -k "$small"

bench=("$python" -m bench --device cuda --memory-limit 64 --seconds 1.5)
stage bench-batch 90 "${bench[@]}" --no-memory --ops fnac_loss --cases b32-7x7 published b1024-7x7 \
    --dtypes float32 bfloat16 --backends compile triton cuda --out "$out/1-batch.json"
stage bench-large 90 "${bench[@]}" --no-memory --ops fnac_loss --cases b4096-7x7 b2048-7x7 b128-14x14 --dtypes bfloat16 \
    --backends compile triton cuda --out "$out/2-batch-large.json"
stage table-triton 150 "${parallel[@]}" $table -k triton
stage racecheck 60 "${sanitized[@]}" --tool racecheck "${tests[@]}" $table -k "$small"
stage bench-largest 60 "${bench[@]}" --no-memory --ops fnac_loss --cases b8192-7x7 --dtypes bfloat16 \
    --backends triton cuda --out "$out/3-batch-huge.json"
stage operators 60 "${parallel[@]}" tests/test_ops.py -k "cuda and not compiled"

for name in ${ONLY:-}; do
    if [[ " ${known[*]} " != *" $name "* ]]; then failed+=("$name (unknown)"); fi
done
if ((${#failed[@]})); then
    say "on_gpu.sh: failed: $(printf '%s, ' "${failed[@]}" | sed 's/, $//')"
    exit 1
fi
say "on_gpu.sh: all stages passed in $SECONDS s; results in $out"
