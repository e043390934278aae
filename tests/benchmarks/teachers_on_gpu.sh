#!/usr/bin/env bash
# What teachers do on a GPU: rate, memory and accuracy of SO3LR's labels, the time of Orb's architecture
# beside the student, and dynamics with SO3LR. From the project's root:
#   DATA=so3lr4000.h5 bash tests/benchmarks/teachers_on_gpu.sh
#   PARTS="label orb md" BATCHES="12000 24000" DTYPES=float64 bash tests/benchmarks/teachers_on_gpu.sh
#   PARTS=label FIRST=40000 DTYPES=float32 LABEL_SECONDS=200 bash tests/benchmarks/teachers_on_gpu.sh
#   SMALL=1 bash tests/benchmarks/teachers_on_gpu.sh       tiny, on the CPU: whether the parts run at all
# DATA is a dataset file with labels by the teacher `so3lr`, which the new ones are compared with; FIRST
# structures of it are labelled, all if it is not given, by each of the numbers of WORKERS. Teachers
# are those of `mlffd teacher install`, in $MLFFD_TEACHERS. Logs and JSON come in ${OUT:-teachers}.
set -uo pipefail
out=${OUT:-teachers}
parts=" ${PARTS:-label orb md} "
small=${SMALL:-}
data=${DATA:-tests/data/sample.h5}
if [ -n "$small" ]; then
    device=cpu batches=${BATCHES:-300} sizes=${SIZES:-22} waters=4 seconds=2
else
    device=cuda batches=${BATCHES:-6000 24000} sizes=${SIZES:-50,1000,5000} waters=16,64,216,512 seconds=8
fi
python=${PYTHON:-python3}
teachers=${MLFFD_TEACHERS:-$HOME/.local/share/mlffd/teachers}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 MLFFD_TEACHERS=$teachers
mkdir -p "$out"
failed=()
began=$SECONDS
part() { # NAME SECONDS COMMAND...
    local name=$1 seconds=$2
    shift 2
    [[ $parts == *" ${name%%-*} "* ]] || return 0
    echo "######## $name (at most $seconds s, $((SECONDS - began)) s so far)" | tee -a "$out/log.txt"
    # the bar of `mlffd label` draws itself over and over
    timeout -k 5 "$seconds" "$@" 2>&1 | tr '\r' '\n' | grep -v '%|' | tee -a "$out/log.txt"
    local status=${PIPESTATUS[0]}
    [ "$status" = 0 ] || failed+=("$name($status)")
}
label() { # DTYPE BATCH WORKERS
    local name=label-$1-$2-$3 watch=
    rm -rf "$out/$name"
    if [ "$device" = cuda ]; then
        nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits -lms 200 > "$out/memory.txt" &
        watch=$!
    fi
    part "$name" "${LABEL_SECONDS:-90}" "$python" -m openmm_mlffd.cli label "$data" -o "$out/$name" \
        --teacher so3lr ${FIRST:+--first "$FIRST"} \
        --teacher-option dtype="$1" --teacher-option device="$device" --batch-atoms "$2" --workers "$3"
    if [ -n "$watch" ]; then
        kill "$watch"
        sort -n "$out/memory.txt" | tail -1 | sed 's/^/largest GPU memory [MiB]: /' | tee -a "$out/log.txt"
        rm -f "$out/memory.txt"
    fi
    part "$name-compared" 30 "$python" tests/benchmarks/compare_labels.py "$data" "$out/$name"
    rm -rf "$out/$name"
}
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null || true
if [[ $parts == *" label "* ]]; then
    for dtype in ${DTYPES:-float32 float64}; do
        for batch in $batches; do
            for workers in ${WORKERS:-1}; do label "$dtype" "$batch" "$workers"; done
        done
    done
fi
part orb 220 "$python" -m openmm_mlffd.cli bench --sections speed --engines python --precisions single \
    --sizes "$sizes" --teachers orb-v2 --output "$out/orb" --device "$device"
part md-float32 80 "$teachers/so3lr/bin/python" tests/benchmarks/so3lr_md.py "$device" \
    --waters "$waters" --seconds "$seconds"
echo "######## $((SECONDS - began)) s; failed: ${failed[*]:-nothing}" | tee -a "$out/log.txt"
[ ${#failed[@]} = 0 ]
