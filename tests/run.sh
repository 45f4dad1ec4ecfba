#!/usr/bin/env bash
# Makes .venv if need be, then runs the linters and the tests. Arguments go to pytest:
#   bash tests/run.sh                    everything but what is marked nightly or gpu
#   bash tests/run.sh -m "not slow"      the quick part
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash tools/setup.sh megatron,deepspeed,kernels,hf,data,remote,gguf,eval,plots,loggers,docs,dev
export PATH="$PWD/.venv/bin:$PATH"
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" OMP_WAIT_POLICY=PASSIVE DS_ACCELERATOR=cpu CUDA_DEVICE_MAX_CONNECTIONS=1

ruff check .
ruff format --check .
mypy
lint-imports --no-cache >.import-linter.log || { cat .import-linter.log; exit 1; }
rm -f .import-linter.log
NO_MKDOCS_2_WARNING=1 mkdocs build --quiet --strict --site-dir "${TMPDIR:-/tmp}/minherit-site-$$"
rm -rf "${TMPDIR:-/tmp}/minherit-site-$$"

select=(-m "not nightly and not gpu") named=false
for argument in "$@"; do
  case "$argument" in
    -m | -m?*) select=() ;;
    tests/*) named=true ;;
  esac
done
run=(pytest ${select[@]+"${select[@]}"} "$@")
many=(-n "${MINHERIT_TEST_WORKERS:-2}" --dist loadfile)
if $named; then
  exec "${run[@]}" "${many[@]}"
fi

# Tests that fork their ranks need processes in which nothing else has started threads or joined a world.
mapfile -t forking < <(grep -lrE --include='test_*.py' 'support.*(forked_world|vocabulary_shards)' tests | sort)
failed=0
for file in "${forking[@]}"; do
  code=0
  "${run[@]}" "$file" || code=$?
  [ "$code" = 0 ] || { [ "$code" = 5 ] && [ "$#" -gt 0 ]; } || failed=1 # 5: the arguments select none of its tests
done
"${run[@]}" "${many[@]}" "${forking[@]/#/--ignore=}" || failed=1
exit "$failed"
