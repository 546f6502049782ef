#!/bin/sh
# Runs the tests, from nothing but Python 3.10+ and pip:
#
#     sh tools/test.sh                  # the quick suite
#     sh tools/test.sh --all            # the long sweeps too
#     sh tools/test.sh -k resume -x     # other arguments go to pytest
#
# PYTHON chooses the interpreter that makes .venv.
set -eu
cd "$(dirname "$0")/.."
. tools/venv.sh

prepare dev visionmix.tools skimage pytest xdist hypothesis onnx onnxruntime onnxscript openvino build mkdocs mkdocstrings

# One process a core with one thread each: two, unless PYTEST_WORKERS says otherwise.
marks="not long"
count=$#
while [ "$count" -gt 0 ]; do
    argument=$1
    shift
    if [ "$argument" = --all ]; then marks=""; else set -- "$@" "$argument"; fi
    count=$((count - 1))
done
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
# Processes that tests start share the bytecode of the first.
unset PYTHONDONTWRITEBYTECODE
exec .venv/bin/python -m pytest -n "${PYTEST_WORKERS:-2}" --dist worksteal -m "$marks" "$@"
