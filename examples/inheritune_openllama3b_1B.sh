#!/usr/bin/env bash
# OpenLLaMA-3B to a 13-block student of 1.8B parameters on 1B tokens, eight epochs (arXiv 2404.08634v1).
#   TEACHER=/models/open_llama_3b RAW=/data/RedPajama-Data-1T-Sample bash examples/inheritune_openllama3b_1B.sh
#   --dry-run  prints every command        --smoke  runs all of them on this machine with a tiny teacher and text
# The teacher is had from Hugging Face (openlm-research/open_llama_3b), the text from togethercomputer/RedPajama-Data-1T-Sample.
# Everything is a variable with a default below.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

RECIPE=inheritune-openllama3b-1b
TEACHER="${TEACHER:-/models/open_llama_3b}" # a Hugging Face folder, or any checkpoint that minherit reads
RAW="${RAW:-/data/RedPajama-Data-1T-Sample}"
WORK="${WORK:-runs/openllama-3b-1B}"
TOKENIZER="${TOKENIZER:-$TEACHER}"
TASK_DATA="${TASK_DATA:-/data/evals}"
TOKENS="${TOKENS:-1B}"
LAYERS="${LAYERS:-first:13}"
SEQUENCE=2048
SEED="${SEED:-1234}"
WORKERS="${WORKERS:-$(nproc)}"
SUITE="${SUITE:-inheritune}" TASKS="${TASKS:-}"
LAUNCH="${LAUNCH:-slurm}" # slurm, torchrun (this machine), or done (evaluate a finished run)
NODES="${NODES:-1}" GPUS_PER_NODE="${GPUS_PER_NODE:-8}" TIME="${TIME:-24:00:00}"
PARTITION="${PARTITION:-}" ACCOUNT="${ACCOUNT:-}" CONTAINER="${CONTAINER:-none}" IMAGE="${IMAGE:-}"
PYTHON="${PYTHON:-python}" SMOKE_ZERO=1

# shellcheck source=examples/inheritune_pipeline.sh
source examples/inheritune_pipeline.sh
