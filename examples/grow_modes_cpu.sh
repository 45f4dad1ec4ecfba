#!/usr/bin/env bash
# A growth in each mode on one CPU core, of the trained teacher and the data of examples/study_cpu.sh: the students start from the
# teacher's first blocks again (restart), from the round before (continue), or are patched with the teacher's blocks (patch).
#   bash examples/grow_modes_cpu.sh        (run it again to go on)
# Students train for 50 steps, so that the first ones do not match a teacher of 1,000 and there are rounds to decide.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=examples/no_arguments.sh
source examples/no_arguments.sh

bash tools/setup.sh megatron,hf,data,plots
export PATH="$PWD/.venv/bin:$PATH" HF_HUB_OFFLINE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

work="${WORK:-runs/growth-modes}" data="${DATA:-runs/studies/data}" teacher="${TEACHER:-runs/studies/cpu/teacher}"
for needed in "$data/subset" "$teacher"; do
  [ -e "$needed" ] || { echo "$0: $needed is missing; run examples/study_cpu.sh first." >&2; exit 5; }
done

common=("data.path=$data/subset" "eval.windows=$data/valid.safetensors" "model={path: $teacher, init: weights}"
  train.steps=50 schedule.warmup_steps=5 eval.every_steps=25 checkpoint.every_steps=25 run.seed=1)
for mode in restart continue; do
  minherit grow study-cpu "${common[@]}" "run.output=$work/$mode" "grow={mode: $mode, start: 2, increment: 2}"
done
minherit grow study-cpu "${common[@]}" "run.output=$work/patch" "grow={mode: patch, start: 4, increment: 1, \
student: {distill.alpha: 0.5, distill.hidden_weight: 1.0, distill.hidden_kind: cosine}}"
python benchmarks/growth.py "$work"/{restart,continue,patch} --out "$work/rows.csv"
minherit report "$work"/{restart,continue,patch} --out "$work/report.html"
