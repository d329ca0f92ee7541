#!/usr/bin/env bash
# Everything that a machine with a GPU can show, in one command of less than eight minutes that needs no network:
#
#     tests/gpu/run.sh              # results in $OUT, or in ./gpu-results
#     tests/gpu/run.sh --dry-run    # the same steps with tiny sizes, and the host in the GPU's place
#
# PYTHON names the interpreter that has torch and lightning. See docs/gpu.md.
set -euo pipefail
cd "$(dirname "$0")/../.."
exec "${PYTHON:-python3}" -m tests.gpu.kit "$@"
