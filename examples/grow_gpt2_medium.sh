#!/usr/bin/env bash
# Grows a student of GPT-2 medium to its teacher's loss on OpenWebText: 12 blocks of 24, then 14, 16, ... (arXiv 2404.08634).
#   RAW=/data/openwebtext TOKENIZER=/models/gpt2 bash examples/grow_gpt2_medium.sh
#   --dry-run  prints every command        --smoke  runs all of them on this machine with tiny models and little text
# The text is had from Hugging Face (Skylion007/openwebtext), the tokenizer from openai-community/gpt2.
# Everything is a variable with a default below; the recipe grow-gpt2-medium holds the hyper-parameters.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

RECIPE=grow-gpt2-medium
RAW="${RAW:-/data/openwebtext}" LAYOUT=openwebtext
WORK="${WORK:-runs/grow-gpt2-medium}"
TOKENIZER="${TOKENIZER:-/models/gpt2}"
TASK_DATA="${TASK_DATA:-/data/evals}"
VALID="${VALID:-0.0005}" WINDOWS="${WINDOWS:-1024}" SEQUENCE=1024
SEED="${SEED:-2357}"
WORKERS="${WORKERS:-$(nproc)}"
SUITE="${SUITE:-inheritune-gpt2}" TASKS="${TASKS:-}"
LAUNCH="${LAUNCH:-here}" # here (this machine), slurm (one node), or done (evaluate a finished growth)
GPUS_PER_NODE="${GPUS_PER_NODE:-8}" TIME="${TIME:-72:00:00}" PARTITION="${PARTITION:-}" ACCOUNT="${ACCOUNT:-}"
PYTHON="${PYTHON:-python}"

# shellcheck source=examples/grow_gpt2_pipeline.sh
source examples/grow_gpt2_pipeline.sh
