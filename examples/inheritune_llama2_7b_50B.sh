#!/usr/bin/env bash
# LLaMA-2-7B to a 7-block student of 1.7B parameters, pretrained on 50B tokens with ZeRO-3 (arXiv 2404.08634v1).
#   TEACHER=/models/Llama-2-7b-hf RAW=/data/RedPajama-Data-1T bash examples/inheritune_llama2_7b_50B.sh
#   --dry-run  prints every command        --smoke  runs all of them on this machine with a tiny teacher and text
# The teacher is had from its licensor (Hugging Face: meta-llama/Llama-2-7b-hf), the text from togethercomputer/RedPajama-Data-1T.
# MODEL=openllama-7b or openllama-3b takes another teacher's depth; everything else is a variable with a default below.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

MODEL="${MODEL:-llama-2-7b}"
case "$MODEL" in
  llama-2-7b) teacher=Llama-2-7b-hf layers=first:7 ;;
  openllama-7b) teacher=open_llama_7b layers=first:7 ;;
  openllama-3b) teacher=open_llama_3b layers=first:13 ;;
  *) echo "$0: MODEL is llama-2-7b, openllama-7b or openllama-3b." >&2; exit 2 ;;
esac
RECIPE=inheritune-llama2-7b-50b
TEACHER="${TEACHER:-/models/$teacher}" # a Hugging Face folder, or any checkpoint that minherit reads
RAW="${RAW:-/data/RedPajama-Data-1T}"
WORK="${WORK:-runs/$MODEL-50B}"
TOKENIZER="${TOKENIZER:-$TEACHER}"
TASK_DATA="${TASK_DATA:-/data/evals}"
TOKENS="${TOKENS:-50B}"
LAYERS="${LAYERS:-$layers}"
SEQUENCE=2048
SEED="${SEED:-1234}"
WORKERS="${WORKERS:-$(nproc)}"
SUITE="${SUITE:-inheritune}" TASKS="${TASKS:-}"
LAUNCH="${LAUNCH:-slurm}" # slurm, torchrun (this machine), or done (evaluate a finished run)
NODES="${NODES:-4}" GPUS_PER_NODE="${GPUS_PER_NODE:-8}" TIME="${TIME:-24:00:00}"
PARTITION="${PARTITION:-}" ACCOUNT="${ACCOUNT:-}" CONTAINER="${CONTAINER:-none}" IMAGE="${IMAGE:-}"
PYTHON="${PYTHON:-python}" SMOKE_ZERO=3

# shellcheck source=examples/inheritune_pipeline.sh
source examples/inheritune_pipeline.sh
