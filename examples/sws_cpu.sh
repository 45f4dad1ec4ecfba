#!/usr/bin/env bash
# SWS, whole and small: a teacher, an auxiliary of 4 stages x 2 distilled from it, descendants of 4 to 16 layers before any
# training, and their training against scratch and against two ablations, two seeds, each on a core of its own. On a CPU.
#   bash examples/sws_cpu.sh
# SWS_WORK    where everything goes            SWS_SEEDS   default "1 2"
# SWS_TEXT    library (default), or modules: the top folder's modules alone, their last 5% for validation
# SWS_ROWS    appends to benchmarks/results/NAME.csv too   SWS_OVERRIDES  further key.path=value words for every run
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=examples/no_arguments.sh
source examples/no_arguments.sh

bash tools/setup.sh megatron,hf,data,plots
export PATH="$PWD/.venv/bin:$PATH" HF_HUB_OFFLINE=1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" OMP_WAIT_POLICY=PASSIVE

out="${SWS_WORK:-runs/sws-cpu}"
text="${SWS_TEXT:-library}"
[[ "$text" =~ ^(library|modules)$ ]] || { echo "SWS_TEXT is '$text'; it can be library or modules." >&2 && exit 2; }
read -ra seeds <<<"${SWS_SEEDS:-1 2}"
read -ra quick <<<"${SWS_OVERRIDES:-}" # for instance "train.steps=4 schedule.warmup_steps=1", to see every command run
step() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
run() { printf '$ %s\n' "$*"; "$@"; }
began=$SECONDS

step "Real text that is on every machine: Python's standard library and its language reference"
tokens() { # NAME: NAME.jsonl to NAME-tokens
  run minherit data ingest "$data/$1.jsonl" --out "$data/$1-text"
  run minherit data tokenize "$data/$1-text" "$data/$1-tokens" --tokenizer bytes
}
subset() { # NAME SHARE: all of its tokens but the share held out
  [ -e "$data/subset" ] || run minherit data subset "$data/$1-tokens" --out "$data/subset" --valid "$2" --test 0
}
windows() { # FOLDER SPLIT
  [ -e "$windows" ] || run minherit data windows "$data/$1" --split "$2" --out "$windows" --count 512 --sequence-length 64
}
data="$out/data/$text" windows="$out/data/$text/valid.safetensors"
mkdir -p "$data"
case "$text" in
  library)
    [ -e "$data/library.jsonl" ] || run python examples/standard_library.py "$data/library.jsonl"
    tokens library
    subset library 0.05
    windows subset valid
    ;;
  modules)
    [ -e "$data/valid.jsonl" ] || run python examples/standard_library.py "$data/train.jsonl" --held-out "$data/valid.jsonl"
    tokens train
    tokens valid
    subset train 0
    windows valid-tokens all
    ;;
esac
common=("data.path=$data/subset" "eval.windows=$windows" "${quick[@]}")

step "The teacher: 6 blocks, wider than its students"
run minherit train sws-cpu-teacher "${common[@]}" "run.output=$out/teacher"
[ -e "$out/teacher-hf" ] || run minherit export "$out/teacher" "$out/teacher-hf"
[ -e "$out/shape" ] || run minherit inherit examples/sws_cpu_student.json "$out/shape" --layers all --reset all

auxiliary() { # SEED ARM PLAN: distilled from the teacher; its learngene, and its descendants before any training
  local name="$2-seed$1"
  [ -e "$out/start/$name" ] || run minherit share init "$out/shape" "$out/start/$name" --plan "$3" --start random --seed "$1"
  run minherit train sws-cpu-auxiliary "${common[@]}" "model.path=$out/start/$name" "run.output=$out/$name/auxiliary" "run.name=$name" \
    "run.seed=$((1 + $1))" "distill.teacher=$out/teacher-hf"
  run minherit share extract "$out/$name/auxiliary" "$out/$name/learngene" --overwrite
  run minherit share family "$out/$name/learngene" "$out/$name/family" --depths 4,6-10,12,16 --place front --overwrite \
    --windows "$windows" --auxiliary-steps 500 --tuning-steps 20 --scratch-steps 500
}

train() { # SEED NAME MODEL OVERRIDES...
  local name="$2-seed$1"
  run minherit train sws-cpu-descendant "${common[@]}" "model.path=$3" "run.output=$out/runs/$name" "run.name=$name" "run.seed=$((2 + $1))" "${@:4}"
}

study() { # SEED
  auxiliary "$1" sws 2,2,2,2
  auxiliary "$1" no-stages 8              # one layer, eight times
  auxiliary "$1" no-guidance unshared:4   # four layers, once each
  run python benchmarks/sws_cpu.py orders "$out/sws-seed$1/learngene" "$windows" "$out/sws-seed$1/orders.json"
  run minherit share expand "$out/sws-seed$1/learngene" "$out/sws-seed$1/auto-10" --depth 10 --place auto --overwrite --windows "$windows"
  local depth arm long=(train.steps=500 schedule.warmup_steps=50 optimizer.lr=3.0e-3 schedule.floor_lr=3.0e-4 eval.every_steps=50)
  for depth in 06 10; do
    for arm in sws no-stages no-guidance; do
      train "$1" "L$depth-$arm" "$out/$arm-seed$1/family/depth-$depth"
    done
    train "$1" "L$depth-scratch" "$out/sws-seed$1/family/depth-$depth" model.init=random "${long[@]}" "${quick[@]}"
  done
}

step "Each seed: three auxiliaries (4 stages x 2; no stage information; no expansion guidance), their descendants, scratch"
pids=()
for seed in "${seeds[@]}"; do
  (set -e; study "$seed") >"$out/seed-$seed.log" 2>&1 &
  pids+=($!)
  echo "seed $seed: $out/seed-$seed.log"
done
failed=0
for place in "${!seeds[@]}"; do
  wait "${pids[$place]}" || { failed=$?; echo "seed ${seeds[$place]} failed:" >&2; tail -n 20 "$out/seed-${seeds[$place]}.log" >&2; }
done
[ "$failed" = 0 ] || exit "$failed"

step "What came of it"
run python benchmarks/sws_cpu.py collect "$out" --text "$text" --rows "${SWS_ROWS:-}" --seconds "$((SECONDS - began))"
runs=()
for depth in 06 10; do
  for arm in sws no-stages no-guidance scratch; do runs+=("$out/runs/L$depth-$arm-seed${seeds[0]}"); done
done
run minherit report "${runs[@]}" --out "$out/report.html" --title "SWS on a CPU (curves and table of seed ${seeds[0]})" \
  --analysis "$out/depths.json" --analysis "$out/tuning-06.json" --analysis "$out/tuning-10.json"
cat <<TEXT

The page:         $out/report.html (losses by depth before any training, training curves), its figures as PNG beside it
The rows:         $out/rows.json
How to read it:   The losses by depth before any training show what stage information and expansion guidance buy; the curves show
                  how much of it is left after training, against the two ablations and against scratch. In the toy experiment
                  that this design was calibrated on, depth transfer before training was strong, and no lasting gain over the
                  ablations was seen after 100 steps; docs/results/sws-cpu.md says what runs of this script gave.
                  The teacher's training and its forward passes are in none of the step ratios above.
Took:             $((SECONDS - began)) s after set-up
TEXT
