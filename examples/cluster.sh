# shellcheck shell=bash disable=SC2034
# Sourced by the examples of cluster runs: --dry-run, --smoke and --help, how commands are printed and skipped, and the launch.
dry_run=false smoke=false extra=()
for argument in "$@"; do
  case "$argument" in
    --dry-run) dry_run=true ;;
    --smoke) smoke=true ;;
    -h | --help) sed -n '2,/^set -/s/^# \{0,1\}//p' "examples/$(basename "$0")"; exit 0 ;;
    *) echo "$0: unknown option $argument; there are --smoke, --dry-run and --help." >&2; exit 2 ;;
  esac
done
if ! command -v minherit >/dev/null; then
  PATH="$PWD/.venv/bin:$PATH"
  command -v minherit >/dev/null || $dry_run || {
    echo "$0: minherit is not installed; 'bash tools/setup.sh megatron,deepspeed,kernels,hf,data,eval,plots' makes .venv, or activate yours." >&2
    exit 2
  }
fi

step() { printf '\n== %s\n' "$*"; }
run() {
  printf '$'
  printf ' %q' "$@"
  printf '\n'
  $dry_run || "$@"
}
missing() { $dry_run || [ ! -e "$1" ]; }

require_inputs() { # NAME...: variables that name paths, which must exist in a real run
  $dry_run && return
  local name
  for name in "$@"; do
    [ -e "${!name}" ] || { echo "$0: $name=${!name} does not exist; set $name." >&2; exit 5; }
  done
}

train_on_cluster() { # OVERRIDES...: trains $RECIPE into $WORK/run as $LAUNCH says; a submitted job ends the script
  case "$LAUNCH" in
    slurm)
      run minherit launch slurm "$RECIPE" "$@" --output "$WORK/run" --nodes "$NODES" --gpus-per-node "$GPUS_PER_NODE" \
        --time "$TIME" --partition "$PARTITION" --account "$ACCOUNT" --container "$CONTAINER" --image "$IMAGE" --submit
      echo "Submitted. When exit_status.json in $WORK/run says 0, run this script again with LAUNCH=done."
      $dry_run || exit 0
      ;;
    torchrun)
      run torchrun --standalone --nproc-per-node "$GPUS_PER_NODE" -m megatron_inherit train "$RECIPE" "$@" "run.output=$WORK/run"
      ;;
    done)
      $dry_run || grep -qs '"exit_code": 0\b' "$WORK/run/exit_status.json" || {
        echo "$0: $WORK/run/exit_status.json does not say 0: the run goes on, waits in the queue or failed." >&2
        exit 1
      }
      ;;
    *) echo "$0: LAUNCH is slurm, torchrun or done." >&2; exit 2 ;;
  esac
}
