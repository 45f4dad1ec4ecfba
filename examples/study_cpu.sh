#!/usr/bin/env bash
# A study on one CPU core, whole: text -> tokens -> subsets and evaluation windows -> every arm -> table, claims, curves.
# Run it again to go on after an interruption; studies of the same folder share their teacher and equal arms.
#   bash examples/study_cpu.sh [initialisation-cpu|layers-cpu|depth-cpu|baselines-cpu|repetition-cpu|rewarming-cpu|repair-cpu]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
study=${1:-initialisation-cpu}
case "$study" in
  initialisation-cpu | layers-cpu | depth-cpu | baselines-cpu | repetition-cpu | rewarming-cpu | repair-cpu) ;;
  -h | --help) sed -n '2,/^set -/s/^# \{0,1\}//p' "examples/$(basename "$0")"; exit 0 ;;
  *) echo "$0: there is no study $study here; --help names them." >&2; exit 2 ;;
esac

bash tools/setup.sh megatron,hf,data,plots
export PATH="$PWD/.venv/bin:$PATH" HF_HUB_OFFLINE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

data=runs/studies/data
mkdir -p "$data"
if [ ! -e "$data/valid.safetensors" ]; then
  python examples/standard_library.py "$data/library.jsonl"
  minherit data ingest "$data/library.jsonl" --out "$data/text"
  minherit data tokenize "$data/text" "$data/tokens" --tokenizer bytes
  minherit data subset "$data/tokens" --out "$data/subset" --valid 0.05 --test 0 --overwrite
  minherit data windows "$data/subset" --out "$data/valid.safetensors" --count 256 --sequence-length 64
fi
for tokens in 204800 51200; do # half and an eighth of what 400 steps read, from all over the training split
  sample=$data/sample-$tokens
  [ -e "$sample/subset" ] && continue
  mkdir -p "$sample"
  python examples/training_text.py "$data/subset" "$sample/text.jsonl" "$tokens"
  minherit data ingest "$sample/text.jsonl" --out "$sample/text"
  minherit data tokenize "$sample/text" "$sample/tokens" --tokenizer bytes
  minherit data subset "$sample/tokens" --out "$sample/subset" --valid 0 --test 0 --overwrite
done
[ -e "$data/calibration.jsonl" ] || python examples/training_text.py "$data/subset" "$data/calibration.jsonl"

minherit study run "$study" --dry-run
minherit study run "$study"
minherit study show runs/studies/cpu --study "$study"
