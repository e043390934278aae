#!/usr/bin/env bash
# The tests that need a GPU and all that is measured on one, in nine minutes; logs, JSON and a figure in
# ${OUT:-bench}. A part that fails or hangs does not stop the rest. From the project's root:
#   bash tests/benchmarks/on_gpu.sh                             everything but what follows
#   PARTS=openmm-long bash tests/benchmarks/on_gpu.sh           barostat moves, a ligand in a protein, a protein
#   PARTS=openmm-npt bash tests/benchmarks/on_gpu.sh            water at constant pressure, 200 ps if it is fast enough
#   PARTS="tests speed" bash tests/benchmarks/on_gpu.sh         these parts
#   SMALL=1 bash tests/benchmarks/on_gpu.sh          tiny, on the CPU: whether the parts run at all
# It needs no network, no h5py and no compiler of Warp for the CPU. TEACHERS="orb-v2" times teachers
# too, where orb-models is there; REFERENCE=docs/bench_reference.json compares.
set -uo pipefail
out=${OUT:-bench}
parts=" ${PARTS:-tests openmm-torch overhead openmm agreement speed batch drift profile teachers} "
mkdir -p "$out"
python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
small=${SMALL:-}
factor=${small:+5}
factor=${factor:-1}
failed=()
began=$SECONDS
part() { # NAME SECONDS COMMAND...
    local name=$1 seconds=$(($2 * factor))
    shift 2
    [[ $parts == *" $name "* ]] || return 0
    echo "######## $name (at most $seconds s, $((SECONDS - began)) s so far)" | tee -a "$out/log.txt"
    timeout -k 5 "$seconds" "$@" 2>&1 | tee -a "$out/log.txt"
    local status=${PIPESTATUS[0]}
    [ "$status" = 0 ] || failed+=("$name($status)")
}
bench() { # NAME SECONDS SECTION OPTIONS...
    local name=$1 seconds=$2 section=$3
    shift 3
    part "$name" "$seconds" "$python" -m openmm_mlffd.cli bench --sections "$section" \
        --output "$out/$name" ${small:+--device cpu} "$@"
    for end in json png; do
        mv "$out/$name/bench.$end" "$out/$name.$end" 2>/dev/null
    done
    rmdir "$out/$name" 2>/dev/null
    return 0
}
pytest=("$python" -m pytest -q -W ignore -p no:cacheprovider --tb=short --maxfail=25)
sizes=${small:+22}
engines=python,eager
"$python" -c 'from openmm_mlffd.interfaces.openmm_torch import torch_force_class as c; c()' 2>/dev/null &&
    engines=python,torchscript,eager
nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.max.sm --format=csv,noheader || true
part tests 110 "${pytest[@]}" -m gpu tests/kernels tests/core tests/interfaces
part openmm-torch 35 "${pytest[@]}" tests/interfaces/test_openmm_torch.py
bench overhead 15 overhead --sizes "${sizes:-22,50,1000,5000,25000}"
part openmm 75 "$python" tests/benchmarks/openmm_gpu.py --output "$out/openmm.json" --budget 70 \
    --only machine,host,agreement,alarm ${small:+--platform Reference --small}
bench agreement 45 agreement
bench speed 120 speed --sizes "${sizes:-22,50,1000,5000,25000,100000}" --engines "$engines" ${REFERENCE:+--compare "$REFERENCE"}
bench batch 15 batch
bench drift 20 drift
bench profile 35 profile --sizes "${sizes:-50,5000,100000}" --precisions single,mixed
[ -z "${TEACHERS:-}" ] ||
    bench teachers 70 speed --sizes "${sizes:-50,1000,5000}" --engines python --precisions single --teachers "$TEACHERS"
part openmm-long 340 "$python" tests/benchmarks/openmm_gpu.py --output "$out/openmm-long.json" --budget 330 \
    --only machine,barostat_moves,ligand,protein ${small:+--platform Reference --small}
part openmm-npt 590 "$python" tests/benchmarks/openmm_gpu.py --output "$out/openmm-npt.json" --budget 570 \
    --only machine,npt ${small:+--platform Reference --small}
echo "######## $((SECONDS - began)) s; failed: ${failed[*]:-nothing}" | tee -a "$out/log.txt"
