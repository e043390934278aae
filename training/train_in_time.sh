#!/usr/bin/env bash
# Train, and evaluate, within a given time, on a host that may have nothing but Python and torch.
#
#   bash training/train_in_time.sh CONFIG MINUTES OUT [key=value ...]
#
# The run's folder is OUT. DATA is the dataset (default data/so3lr.h5); if it is not there, it is
# unpacked from PACK (see training/pack.py). SITE is a folder of further Python packages. If the
# compiled step fails hard, the rest of the time goes to one without compiler, then without graph.
# With fit_steps=N among the settings it takes so many steps instead, and the time they need.
set -uo pipefail
config=$1 minutes=$2 out=$3
shift 3
: "${DATA:=data/so3lr.h5}" "${PACK:=}" "${SITE:=}" "${PYTHON:=python3}"
mkdir -p "$out"
# a checkout that is not installed is found as it is
export PYTHONPATH="$PWD${SITE:+:$PWD/$SITE}${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

left() { # minutes that are left for training: 45 s are for starting and for what comes after
  "$PYTHON" -c "print(max(0.1, $minutes - ($SECONDS + ${RESERVE_S:-45}) / 60))"
}

"$PYTHON" -c 'import torch; print("torch", torch.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU")'
if [ ! -e "$DATA" ]; then
  mkdir -p "$(dirname "$DATA")"
  "$PYTHON" -m openmm_mlffd.training.pack unpack "$PACK" "$DATA" || exit 1
  echo "unpacked after $SECONDS s"
fi
watcher=
if command -v nvidia-smi >/dev/null; then
  nvidia-smi --query-gpu=timestamp,utilization.gpu,memory.used,power.draw --format=csv,noheader,nounits -l 2 \
    >"$out/gpu.csv" 2>/dev/null &
  watcher=$!
fi
status=1
for how in "" "compile=off" "compile=off cuda_graph=false"; do
  limit="fit_minutes=$(left)"
  [[ " $* " == *" fit_steps="* ]] && limit=
  echo "training${limit:+ for ${limit#*=} minutes}${how:+ with $how}, after $SECONDS s"
  rm -f "$out/checkpoint.pt"
  # shellcheck disable=SC2086
  "$PYTHON" -m openmm_mlffd.cli train "$config" "data.files=[$DATA]" "output=$out" \
    $limit $how "$@" 2>>"$out/train.err"
  status=$?
  [ $status = 0 ] && break
  echo "failed with status $status:"
  tr '\r' '\n' <"$out/train.err" | grep -v "step/s\|it/s" | tail -n 12
done
echo "trained after $SECONDS s"
[ -n "$watcher" ] && kill "$watcher"
if [ -e "$out/gpu.csv" ]; then
  awk -F', ' '{u[NR]=$2; m=$3>m?$3:m; p+=$4} END {n=0; for (i=int(NR/4); i<=NR*0.95; i++) {s+=u[i]; n++}
    printf "GPU busy %.0f %% (samples from a quarter of the time on), %d MiB, %.0f W\n", s/n, m, p/NR}' "$out/gpu.csv"
fi
tr '\r' '\n' <"$out/train.err" | grep -E "^(INFO|WARNING|ERROR)|Error" | cut -c1-300 | tail -n 30
for split in val test; do
  "$PYTHON" -m openmm_mlffd.cli evaluate "$out/student.safetensors" "$DATA" --split "$split" \
    --batch-atoms 4000 --json "$out/$split.json" 2>/dev/null
done
echo "done after $SECONDS s"
exit $status
