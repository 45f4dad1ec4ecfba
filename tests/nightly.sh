#!/usr/bin/env bash
# Runs what takes longer than a usual run: the tests marked nightly.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" -m nightly "$@"
