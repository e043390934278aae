#!/usr/bin/env bash
# The tests that need a GPU and the benchmark, in eight minutes; logs and JSON in ${OUT:-bench}.
# A part that fails or hangs does not stop the rest. From the project's root: bash tests/benchmarks/on_gpu.sh
set -uo pipefail
out=${OUT:-bench}
mkdir -p "$out"
python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
failed=()
part() { # NAME SECONDS COMMAND...
    local name=$1 seconds=$2
    shift 2
    echo "######## $name" | tee -a "$out/log.txt"
    timeout "$seconds" "$@" 2>&1 | tee -a "$out/log.txt"
    local status=${PIPESTATUS[0]}
    [ "$status" = 0 ] || failed+=("$name($status)")
}
bench() { # SECONDS SECTION OPTIONS...
    local seconds=$1 section=$2
    shift 2
    part "$section" "$seconds" "$python" -m openmm_mlffd.cli bench --sections "$section" --output "$out/$section" "$@"
    mv "$out/$section/bench.json" "$out/$section.json" 2>/dev/null
    rmdir "$out/$section" 2>/dev/null
}
nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.max.sm --format=csv,noheader || true
part tests 130 "$python" -m pytest -q -m gpu -W ignore -p no:cacheprovider --tb=short --maxfail=25 tests/kernels tests/core tests/interfaces
bench 80 agreement
bench 170 speed
bench 40 drift
bench 50 profile --sizes 50,5000,100000 --precisions single,mixed
echo "######## failed: ${failed[*]:-nothing}" | tee -a "$out/log.txt"
