# shellcheck shell=bash
# Sourced by examples that take no arguments: --help prints their head, anything else is refused before work begins.
case "${1:-}" in
  "") ;;
  -h | --help) sed -n '2,/^set -/s/^# \{0,1\}//p' "examples/$(basename "$0")"; exit 0 ;;
  *) echo "$0: unknown argument $1; it takes none, --help says what it does." >&2; exit 2 ;;
esac
