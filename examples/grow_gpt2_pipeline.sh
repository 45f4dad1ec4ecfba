# shellcheck shell=bash
# What the two growth examples share: prepare OpenWebText, grow, evaluate, export, report. They set the variables and source it.
# Every step is skipped where its result is there, and an interrupted growth goes on, so that the script can be run again.
set -euo pipefail

# shellcheck source=examples/cluster.sh
source examples/cluster.sh

if $smoke; then
  WORK="${SMOKE_WORK:-runs/smoke/$RECIPE}" GPUS_PER_NODE=1 LAUNCH=here WORKERS=1 TASKS=lambada_openai LAYOUT=files
  RAW="$WORK/library.jsonl" TASK_DATA="$WORK/tasks" TOKENIZER=bytes VALID=0.05 WINDOWS=16 SEQUENCE=64
  extra=(model.preset=gpt2-tiny "model.shape={num_layers: 4, vocab_size: 257, max_positions: 64}" train.dtype=fp32 train.steps=8
    train.global_batch=8 train.micro_batch=8 train.sequence_length=64 schedule.warmup_steps=2 megatron.distributed_optimizer=false
    megatron.overlap_grad_reduce=false megatron.overlap_param_gather=false checkpoint.every_steps=8 eval.every_steps=8 logging.every_steps=4
    "logging.loggers=[]" grow.start=2 grow.when_vacuous=continue)
  step "Smoke inputs: text and a task through the same commands"
  run mkdir -p "$WORK"
  run "$PYTHON" examples/standard_library.py "$RAW"
  run "$PYTHON" examples/smoke_inputs.py "$RAW" "$WORK/raw" "$TASK_DATA"
else
  require_inputs RAW TOKENIZER
fi

step "Data: ingest, tokenize, hold documents out, fix the evaluation windows"
run minherit data ingest "$RAW" --layout "$LAYOUT" --out "$WORK/text" --workers "$WORKERS"
run minherit data tokenize "$WORK/text" "$WORK/tokens" --tokenizer "$TOKENIZER" --workers "$WORKERS"
missing "$WORK/subset" && run minherit data subset "$WORK/tokens" --out "$WORK/subset" --valid "$VALID" --test 0 --seed "$SEED"
missing "$WORK/valid.safetensors" && run minherit data windows "$WORK/subset" --out "$WORK/valid.safetensors" --count "$WINDOWS" --sequence-length "$SEQUENCE"

step "Grow: the teacher, a random student, then students until one matches the teacher"
growth=(grow "$RECIPE" "run.output=$WORK/growth" "data.path=$WORK/subset" "eval.windows=$WORK/valid.safetensors"
  ${extra[@]+"${extra[@]}"} --processes "$GPUS_PER_NODE")
run minherit "${growth[@]}" --dry-run
case "$LAUNCH" in
  slurm)
    run sbatch --job-name "$RECIPE" --nodes 1 --ntasks 1 --gpus-per-node "$GPUS_PER_NODE" --time "$TIME" --requeue \
      --cpus-per-task "${CPUS:-$((8 * GPUS_PER_NODE))}" --signal B:USR1@300 \
      ${PARTITION:+--partition "$PARTITION"} ${ACCOUNT:+--account "$ACCOUNT"} --output "$WORK/growth-%j.log" \
      --wrap "exec minherit $(printf '%q ' "${growth[@]}")"
    echo "Submitted. When $WORK/growth/student is there, run this script again with LAUNCH=done; if the time was too short, submit"
    echo "it again as it is: the growth saves 300 s before its limit, and goes on."
    $dry_run || exit 0
    ;;
  here) run minherit "${growth[@]}" ;;
  done) ;;
  *) echo "$0: LAUNCH is slurm, here or done." >&2; exit 2 ;;
esac
if ! $dry_run && [ ! -e "$WORK/growth/student" ]; then
  echo "$0: nothing was grown; grow.json in $WORK/growth says why." >&2
  exit 0
fi

step "Evaluate teacher and student, export, report"
chosen=(--suite "$SUITE")
[ -z "$TASKS" ] || chosen=(--tasks "$TASKS")
for model in teacher student; do # kept in the run's folder, where the model card and the page find it
  run minherit evaluate "$WORK/growth/$model" "${chosen[@]}" --data-dir "$TASK_DATA"
done
run minherit export "$WORK/growth/student" "$WORK/student" --overwrite
run minherit report "$WORK/growth" --out "$WORK/report.html"
