#!/usr/bin/env bash
# The main job, whole and small: text -> tokens, an 8-block teacher, a 4-block student that inherits from it and three
# controls at equal steps, one page that compares them. On a CPU; the first run sets .venv up.
#   bash examples/quickstart.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=examples/no_arguments.sh
source examples/no_arguments.sh

bash tools/setup.sh megatron,hf,data,plots
export PATH="$PWD/.venv/bin:$PATH" HF_HUB_OFFLINE=1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" OMP_WAIT_POLICY=PASSIVE # threads that wait give their core to others

out=runs/quickstart
SECONDS=0
step() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
run() { printf '$ %s\n' "$*"; "$@"; }

step "Real text that is on every machine: Python's standard library and its language reference"
mkdir -p "$out/data" "$out/start"
run python examples/standard_library.py "$out/data/library.jsonl"
run minherit data ingest "$out/data/library.jsonl" --out "$out/data/text"
run minherit data tokenize "$out/data/text" "$out/data/tokens" --tokenizer bytes
[ -e "$out/data/subset" ] || run minherit data subset "$out/data/tokens" --out "$out/data/subset" --valid 0.05 --test 0
[ -e "$out/data/valid.safetensors" ] || run minherit data windows "$out/data/subset" --out "$out/data/valid.safetensors" --count 256 --sequence-length 128

step "The teacher: 8 blocks"
run minherit train quickstart-teacher

step "Four ways to start a student of 4 blocks"
start() { [ -e "$out/start/$1" ] || run minherit inherit "$out/teacher" "$out/start/$1" --layers first:4 --seed 7 "${@:2}"; }
start inherited
start random --reset all
start embeddings-only --reset attn,mlp,norm
start as-published --as-published

step "Each is trained for the same steps on the same samples"
for arm in inherited as-published embeddings-only random; do
  run minherit train quickstart-student "model.path=$out/start/$arm" "run.output=$out/$arm" "run.name=$arm"
done

step "What came of it"
run minherit report "$out/teacher" "$out/inherited" "$out/as-published" "$out/embeddings-only" "$out/random" --out "$out/report.html"
run minherit export "$out/inherited" "$out/student-hf" --overwrite
for model in teacher inherited; do
  printf '\n-- the %s goes on:\n' "$model"
  run minherit generate "$out/$model" $'def read(self, size=-1):\n    """' --max-new-tokens 120 --temperature 0.6 --seed 1
done

cat <<TEXT

Done in $((SECONDS / 60)) min $((SECONDS % 60)) s, set-up not counted.
The page:      $out/report.html (and report.png beside it)
The student:   $out/student-hf, an ordinary folder for AutoModelForCausalLM.from_pretrained
On a cluster:  minherit inherit YOUR_TEACHER student --layers first:8
               minherit launch slurm inheritune-llama2-7b-50b model.path=student data.path=YOUR_DATA \\
                   eval.windows=YOUR_WINDOWS --nodes 4 --output runs/student
TEXT
