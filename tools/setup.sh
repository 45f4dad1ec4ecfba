#!/usr/bin/env bash
# Makes .venv in the repository's root and installs the project into it, once for each set of extras and constraints.
#   tools/setup.sh EXTRA[,EXTRA...]
# PYTHON                 the interpreter (default python3; 3.11 or newer)
# MINHERIT_TORCH_INDEX   a package index that serves the CPU build of torch, for machines without a GPU whose default
#                        index serves the CUDA build; ignored where nvidia-smi answers
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extras="${1:-hf,data,megatron,plots}"
python="${PYTHON:-python3}"
venv=.venv
stamp="$venv/.minherit-installed"

"$python" - <<'PY' || { echo "setup: Python 3.11 or newer is needed; set PYTHON=/path/to/python3.11." >&2; exit 2; }
import sys
sys.exit(sys.version_info < (3, 11))
PY

want="$(cat pyproject.toml constraints.txt tools/setup.sh | sha256sum | cut -d' ' -f1)"
have="$(head -n 1 "$stamp" 2>/dev/null || true)"
installed="$(tail -n +2 "$stamp" 2>/dev/null || true)"
missing=""
for extra in ${extras//,/ }; do
  grep -qx "$extra" <<<"$installed" || missing="$missing $extra"
done
if [ "$want" = "$have" ] && [ -z "$missing" ] && [ -x "$venv/bin/python" ]; then
  exit 0
fi

# Without python3-venv a folder comes about that has Python and no pip.
if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
  "$python" -m venv "$venv" || { echo "setup: python3 -m venv failed; on Debian: apt-get install python3-venv." >&2; exit 2; }
fi

echo "setup: installing into $venv with extras: $extras"
pip=("$venv/bin/python" -m pip --disable-pip-version-check --quiet)
"${pip[@]}" install --upgrade pip wheel setuptools
torch="$(grep '^torch==' constraints.txt)"
if nvidia-smi >/dev/null 2>&1; then
  "${pip[@]}" install "$torch"
else
  "$venv/bin/python" -c 'import torch' 2>/dev/null || "${pip[@]}" install "$torch" ${MINHERIT_TORCH_INDEX:+--index-url "$MINHERIT_TORCH_INDEX"}
fi
"${pip[@]}" install --constraint constraints.txt --editable ".[$extras]"
{
  echo "$want"
  { tr ',' '\n' <<<"$extras"; echo "$installed"; } | sed '/^$/d' | sort -u
} >"$stamp"
