#!/usr/bin/env bash
# Long validation runs on a GPU, in commands as short as one likes. Each call starts the parts that do not
# run, waits, tells how far all are, and packs what there is into ${OUT:-$W}/validate.tar.gz.NN, below
# 15 MB each. Parts go on between calls, and where they were after being killed. From the project's root:
#   WAIT=540 bash tests/benchmarks/validate_on_gpu.sh               everything that needs no teacher
#   PARTS="nve law" WAIT=300 bash tests/benchmarks/validate_on_gpu.sh
#   PARTS=status WAIT=0 bash tests/benchmarks/validate_on_gpu.sh    starts nothing
#   PARTS=stop bash tests/benchmarks/validate_on_gpu.sh             ends what this script started
#   SMALL=1 WAIT=60 bash tests/benchmarks/validate_on_gpu.sh        seconds of each, on the CPU
# Parts:
#   nve            1 ns at constant energy, a drug of 50 atoms, 0.5 fs
#   law            50 ps of a peptide with 0.25, 0.5 and 1 fs; short ones of a drug and of 3,072 atoms; smoothness
#   water          256 waters, 200 ps at 1 bar             peptide-water  a capped peptide in water, likewise
#   peptide        the peptide alone, 200 ps               molecules      20 unseen molecules at 300 and 500 K
#   boxes          5 boxes, 50 ps at 1 bar                 robustness     distorted and hot structures
#   speed          times of steps; alone, or they mean nothing
#   teacher-water teacher-peptide teacher-static           the teacher's side: TEACHER, TEACHER_PYTHON,
#                                                          TEACHER_OPTIONS="dtype=float32 device=cuda"
#   forces         errors on labelled structures           needs DATA=file.h5 or .mlffdpack, and h5py
#   report         report.html from what is there          needs Matplotlib, MDTraj, Jinja2 (REPORT_SECTIONS)
# STUDENT is a bundled name or a file. RETRY=1 begins parts anew that ended with an error. TAKE='NVE*' packs only
# the pieces of these names, TAKE= none. With several GPUs the parts are dealt out to them,
# unless GPUS=1.
set -uo pipefail
work=${W:-/root/w/validate}
student=${STUDENT:-default}
name=$(basename "$student" .safetensors)
python=${PYTHON:-python3}
small=${SMALL:-}
parts=${PARTS:-nve law water peptide-water peptide molecules boxes robustness}
mkdir -p "$work/pieces" "$work/run"
gpus=${GPUS:-$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)}
count=0

running() { # PART: whether its process lives
    local pid
    pid=$(cat "$work/run/$1@$name.pid" 2>/dev/null) || return 1
    kill -0 "$pid" 2>/dev/null && grep -q openmm_mlffd "/proc/$pid/cmdline" 2>/dev/null
}

# The code of running parts must not change under them
any_running() {
    local pid
    for file in "$work"/run/*.pid; do
        pid=$(cat "$file" 2>/dev/null) || continue
        grep -q openmm_mlffd "/proc/$pid/cmdline" 2>/dev/null && return 0
    done
    return 1
}
if ! any_running; then
    rm -rf "$work/tree"
    mkdir -p "$work/tree"
    cp -r openmm_mlffd kernels training "$work/tree/"
fi
[ -f "$student" ] && cp "$student" "$work/tree/$name.safetensors" && student=$work/tree/$name.safetensors
export PYTHONPATH=$work/tree${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

start() { # PART COMMAND...: in a session of its own, unless it runs or is done
    local part=$1 log=$work/run/$1@$name.log
    shift
    running "$part" && return
    if [ -f "$work/run/$part@$name.done" ]; then
        [ -n "${RETRY:-}" ] && [ "$(cat "$work/run/$part@$name.done")" != 0 ] || return
        rm "$work/run/$part@$name.done"
    fi
    local device=()
    [ "${gpus:-0}" -gt 1 ] && device=(env "CUDA_VISIBLE_DEVICES=$((count++ % gpus))")
    echo "== $(date -u +%T) $*" >>"$log"
    (
        cd "$work" || exit
        setsid "${device[@]}" bash -c 'echo $$ >"$1"; shift; done=$1; shift; "$@"; s=$?
            echo "== exit $s"; [ $s = 3 ] || echo $s >"$done"' openmm_mlffd \
            "$work/run/$part@$name.pid" "$work/run/$part@$name.done" "$@" \
            >>"$log" 2>&1 </dev/null &
    )
}
validate() { # PART OPTIONS...
    local part=$1
    shift
    local level=(--full --run-minutes "${RUN_MINUTES:-100000}")
    [ -n "$small" ] && level=(--level tiny --device cpu)
    start "$part" "$python" -m openmm_mlffd.cli validate "$student" -o "$work/out-$name-$part" \
        --pieces "$work/pieces" --measure-only "${level[@]}" "$@"
}
measure() { # PART SECTION TASK...: tasks of the full plan whose names hold a text; all if there is none
    local part=$1 section=$2 only=() task
    shift 2
    [ -z "$small" ] && for task in "$@"; do only+=(--only "$task"); done
    validate "$part" --sections "$section" "${only[@]}" "${teacher[@]}"
}
teacher=()
with_teacher() {
    teacher=(--teacher "${TEACHER:-so3lr}" --teacher-python "${TEACHER_PYTHON:-/root/teach/so3lr/bin/python}")
    local option
    for option in ${TEACHER_OPTIONS-dtype=float32 device=cuda}; do teacher+=(--teacher-option "$option"); done
    measure "$@"
    teacher=()
}
data() { # DATA as a dataset file in $data
    data=${DATA:?a dataset file is needed}
    if [ ! -f "$work/data.h5" ]; then # the tree of the next call may lack it
        if [[ $data == *.mlffdpack ]]; then
            "$python" -m openmm_mlffd.training.pack unpack "$data" "$work/data.part" || return
        else
            cp "$data" "$work/data.part" || return
        fi
        mv "$work/data.part" "$work/data.h5"
    fi
    data=$work/data.h5
}
begin() { # PART
    case $1 in
    nve) measure nve nve "NVE oseltamivir, single" ;;
    law) measure law nve smoothness "NVE alanine dipeptide" "NVE oseltamivir, double" "NVE water box" ;;
    water) measure water ensembles "student water box" ;;
    peptide-water) measure peptide-water ensembles "student alanine dipeptide in water" ;;
    peptide) measure peptide ensembles "student alanine dipeptide, NVT" ;;
    molecules) measure molecules stability "stability of" ;;
    boxes)
        for box in "water box" "alanine dipeptide" caffeine molnupiravir zwitterion; do
            measure "box-${box%% *}" stability "stability $box"
        done
        ;;
    robustness) measure robustness robustness ;;
    speed) measure speed speed ;;
    teacher-water) with_teacher teacher-water teacher "teacher water box" ;;
    teacher-peptide) with_teacher teacher-peptide teacher "teacher alanine dipeptide" ;;
    teacher-static) with_teacher teacher-static teacher geometries torsions dimers ;;
    forces) data && validate forces --sections forces --data "$data" ;;
    report) report ;;
    status | stop) ;;
    *) echo "no part is called $1" >&2 ;;
    esac
}
report() { # what was measured; simulations as long as they are
    local options=(--full --run-minutes 0.001)
    [ -n "$small" ] && options=(--level tiny --device cpu)
    [ -n "${DATA:-}" ] && data && options+=(--data "$data")
    rm -f "$work/run/report@$name.done"
    start report "$python" -m openmm_mlffd.cli validate "$student" -o "$work/report-$name" \
        --pieces "$work/pieces" "${options[@]}" \
        --sections "${REPORT_SECTIONS:-nve,ensembles,stability,robustness,speed}"
}
for part in $parts; do begin "$part"; done
if [[ " $parts " == *" stop "* ]]; then
    for file in "$work"/run/*.pid; do
        pid=$(cat "$file" 2>/dev/null) || continue
        grep -q openmm_mlffd "/proc/$pid/cmdline" 2>/dev/null && kill -- "-$pid"
    done
fi
until=$((SECONDS + ${WAIT:-30}))
while [ $SECONDS -lt $until ]; do
    sleep 2
    any_running || break
done

echo "######## $(date -u +%T), student $name"
for file in "$work"/run/*.log; do
    [ -f "$file" ] || continue
    part=$(basename "$file" .log)
    state="not running: the next call that names it goes on"
    [ -f "$work/run/$part.done" ] && state="ended with $(cat "$work/run/$part.done")"
    pid=$(cat "$work/run/$part.pid" 2>/dev/null)
    grep -q openmm_mlffd "/proc/$pid/cmdline" 2>/dev/null && state=running
    echo "$part: $state | $(grep -v '^ *$' "$file" | tail -n 1 | cut -c1-150)"
done
"$python" -m openmm_mlffd.validation.suite.standing "$work/pieces" --json "$work/standing.json"
nvidia-smi --query-gpu=name,utilization.gpu,memory.used --format=csv,noheader 2>/dev/null

# trajectory.dcd repeats what the segments hold
out=$(realpath -m "${OUT:-$work}")
mkdir -p "$out"
rm -f "$out"/validate.tar.gz.*
what=(run standing.json)
cd "$work" || exit
# shellcheck disable=SC2206
[ "${TAKE-*}" ] && what+=(pieces/${TAKE-*})
for folder in report-*; do [ -d "$folder" ] && what+=("$folder"); done
tar --exclude='*.dcd' --exclude='*.pid' --exclude='report-*/pieces' -cf - "${what[@]}" 2>/dev/null |
    gzip -1 | split -b 15000000 -d -a 2 - "$out/validate.tar.gz."
ls -la "$out"/validate.tar.gz.* | awk '{print $5, $9}'
