#!/usr/bin/env bash
# The install lines of Dockerfile: into NVIDIA's PyTorch image, whose torch, Triton, apex and Transformer Engine stay as they are.
#   install_gpu.sh SOURCE [PIP OPTION...]    SOURCE: the repository's folder; PYTHON: the interpreter to install into
set -euo pipefail
source="$1"
shift
python="${PYTHON:-python3}"
keep="$(mktemp)"
trap 'rm -f "$keep"' EXIT
"$python" - >"$keep" <<'PY'
import importlib.metadata as installed
for name in ("torch", "triton", "numpy"):
    try:
        print(f"{name}=={installed.version(name)}")
    except installed.PackageNotFoundError:
        pass
PY
"$python" -m pip install --no-cache-dir --disable-pip-version-check --constraint "$keep" "$@" \
  "deepspeed==0.19.8" "megatron-core>=0.16.1" "transformers>=5.3" "lm-eval==0.4.13" \
  "${source}[megatron,deepspeed,hf,data,gguf,eval,plots,loggers]"
