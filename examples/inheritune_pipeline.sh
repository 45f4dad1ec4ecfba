#!/usr/bin/env bash
# What the two LLaMA examples share: prepare data, slice, pretrain, evaluate, export, report. They set the variables and source it.
# Every step is skipped where its result is there, so that the script can be run again after an interruption.
set -euo pipefail

# shellcheck source=examples/cluster.sh
source examples/cluster.sh

if $smoke; then
  WORK="${SMOKE_WORK:-runs/smoke/$RECIPE}" NODES=1 GPUS_PER_NODE=1 LAUNCH=torchrun WORKERS=1 TASKS=lambada_openai SUITE=
  RAW="$WORK/raw" TASK_DATA="$WORK/tasks" TEACHER="$WORK/teacher" TOKENIZER=bytes TOKENS=20k LAYERS=first:2 SEQUENCE=64
  extra=(train.dtype=fp32 train.budget=8192 train.global_batch=8 train.micro_batch=4 train.sequence_length=64 schedule.warmup_steps=2
    deepspeed.zero_stage="$SMOKE_ZERO" checkpoint.every_steps=8 eval.every_steps=8 logging.every_steps=4 "logging.loggers=[]")
  step "Smoke inputs: a tiny teacher, text and a task through the same commands"
  run mkdir -p "$WORK"
  run "$PYTHON" examples/standard_library.py "$WORK/library.jsonl"
  run "$PYTHON" examples/smoke_inputs.py "$WORK/library.jsonl" "$RAW" "$TASK_DATA"
  missing "$TEACHER" && run minherit inherit llama-tiny "$TEACHER" --layers all --reset all
else
  require_inputs TEACHER RAW
fi

step "Data: ingest, tokenize, draw $TOKENS tokens with LLaMA's weights, fix the evaluation windows"
run minherit data ingest "$RAW" --layout redpajama --out "$WORK/text" --workers "$WORKERS"
run minherit data tokenize "$WORK/text" "$WORK/tokens" --tokenizer "$TOKENIZER" --workers "$WORKERS"
missing "$WORK/subset" && run minherit data subset "$WORK/tokens" --out "$WORK/subset" --tokens "$TOKENS" --weights llama --seed "$SEED"
missing "$WORK/valid.safetensors" && run minherit data windows "$WORK/subset" --out "$WORK/valid.safetensors" --count 1024 --sequence-length "$SEQUENCE"

step "Slice: $LAYERS of $TEACHER"
missing "$WORK/student" && run minherit inherit "$TEACHER" "$WORK/student" --layers "$LAYERS"

step "Pretrain"
train_on_cluster "model.path=$WORK/student" "data.path=$WORK/subset" "eval.windows=$WORK/valid.safetensors" ${extra[@]+"${extra[@]}"}

step "Evaluate, export, report"
run minherit export "$WORK/run" "$WORK/student-trained" --overwrite
if [ -n "$TASKS" ]; then
  run minherit evaluate "$WORK/run" --tasks "$TASKS" --data-dir "$TASK_DATA"
else
  run minherit evaluate "$WORK/run" --suite "$SUITE" --data-dir "$TASK_DATA"
fi
run minherit report "$WORK/run" --out "$WORK/report.html"
