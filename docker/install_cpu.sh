#!/usr/bin/env bash
# The install lines of Dockerfile.cpu, so that a test can run them without Docker.
#   install_cpu.sh SOURCE    SOURCE: the repository's folder; PYTHON: the interpreter to install into
set -euo pipefail
source="$1"
python="${PYTHON:-python3}"
pip=("$python" -m pip install --no-cache-dir --disable-pip-version-check --constraint "$source/constraints.txt")
"${pip[@]}" ${MINHERIT_TORCH_INDEX:+--index-url "$MINHERIT_TORCH_INDEX"} torch
"${pip[@]}" "${source}[megatron,deepspeed,hf,data,gguf,eval,plots]"
