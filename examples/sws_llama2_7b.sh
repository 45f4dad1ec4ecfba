#!/usr/bin/env bash
# SWS at LLaMA-2-7B's width: an auxiliary of 16 layers in 5 stages is distilled from the teacher, one stage a pipeline rank;
# its learngene initialises ordinary models of 6 to 16 layers.
#   TEACHER=/models/Llama-2-7b-hf RAW=/data/RedPajama-Data-1T bash examples/sws_llama2_7b.sh
#   --dry-run  prints every command        --smoke  runs all of them on this machine with a tiny teacher and text
# The teacher is had from its licensor (Hugging Face: meta-llama/Llama-2-7b-hf), the text from togethercomputer/RedPajama-Data-1T.
# Everything is a variable with a default below. Every step is skipped where its result is there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

RECIPE=sws-llama2-7b
TEACHER="${TEACHER:-/models/Llama-2-7b-hf}"
RAW="${RAW:-/data/RedPajama-Data-1T}"
WORK="${WORK:-runs/sws-llama2-7b}"
TOKENIZER="${TOKENIZER:-$TEACHER}"
TOKENS="${TOKENS:-10B}" PLAN="${PLAN:-3,3,4,3,3}" START="${START:-stepwise}" DEPTHS="${DEPTHS:-6-16}" STAGES=5
SEQUENCE=2048 SEED="${SEED:-1234}" WORKERS="${WORKERS:-$(nproc)}"
LAUNCH="${LAUNCH:-slurm}" # slurm, torchrun (this machine), or done (expand a finished run)
NODES="${NODES:-5}" GPUS_PER_NODE="${GPUS_PER_NODE:-8}" TIME="${TIME:-24:00:00}"
PARTITION="${PARTITION:-}" ACCOUNT="${ACCOUNT:-}" CONTAINER="${CONTAINER:-none}" IMAGE="${IMAGE:-}"
PYTHON="${PYTHON:-python}"

# shellcheck source=examples/cluster.sh
source examples/cluster.sh

if $smoke; then
  WORK="${SMOKE_WORK:-runs/smoke/$RECIPE}" NODES=1 GPUS_PER_NODE=2 LAUNCH=torchrun WORKERS=1 PLAN=2,2 STAGES=2 DEPTHS=2,3
  RAW="$WORK/raw" TEACHER="$WORK/teacher" TOKENIZER=bytes TOKENS=20k SEQUENCE=64
  extra=(train.dtype=fp32 train.budget=4096 train.global_batch=8 train.micro_batch=4 train.sequence_length=64 schedule.warmup_steps=2
    parallel.pp=2 megatron.overlap_param_gather=false checkpoint.every_steps=4 eval.every_steps=4 eval.micro_batch=8
    "logging.loggers=[]" data.epochs=0)
  step "Smoke inputs: a tiny teacher and text through the same commands"
  run mkdir -p "$WORK"
  missing "$WORK/library.jsonl" && run "$PYTHON" examples/standard_library.py "$WORK/library.jsonl"
  missing "$RAW" && run "$PYTHON" examples/smoke_inputs.py "$WORK/library.jsonl" "$RAW" "$WORK/tasks"
  missing "$TEACHER" && run minherit inherit llama-tiny "$TEACHER" --layers all --reset all
else
  require_inputs TEACHER RAW
fi

step "Data: ingest, tokenize, draw $TOKENS tokens, fix the evaluation windows"
run minherit data ingest "$RAW" --layout redpajama --out "$WORK/text" --workers "$WORKERS"
run minherit data tokenize "$WORK/text" "$WORK/tokens" --tokenizer "$TOKENIZER" --workers "$WORKERS"
missing "$WORK/subset" && run minherit data subset "$WORK/tokens" --out "$WORK/subset" --tokens "$TOKENS" --weights llama --seed "$SEED"
missing "$WORK/valid.safetensors" && run minherit data windows "$WORK/subset" --out "$WORK/valid.safetensors" --count 1024 --sequence-length "$SEQUENCE"

step "Plan: stages $PLAN over $STAGES pipeline ranks; the auxiliary starts from the teacher ($START)"
run minherit share plan "$PLAN" --pp "$STAGES" --model "$TEACHER"
missing "$WORK/auxiliary" && run minherit share init "$TEACHER" "$WORK/auxiliary" --plan "$PLAN" --start "$START" --seed "$SEED"

step "Distil"
train_on_cluster "model.path=$WORK/auxiliary" "distill.teacher=$TEACHER" "data.path=$WORK/subset" "eval.windows=$WORK/valid.safetensors" \
  ${extra[@]+"${extra[@]}"}

step "The learngene, and its family of ordinary models"
run minherit share extract "$WORK/run" "$WORK/learngene" --overwrite
run minherit share family "$WORK/learngene" "$WORK/family" --depths "$DEPTHS" --place auto --windows "$WORK/valid.safetensors" --overwrite
run minherit report "$WORK/run" --out "$WORK/report.html"
echo "Each folder of $WORK/family is a model.path for 'minherit train'; what it shares with its siblings is its beginning."
