#!/bin/sh
# Runs the compiled kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer; Linux with g++.
#
#     sh tools/sanitize.sh              # arguments go to pytest
#
# The kernels are compiled with the sanitizers into a cache of their own. The runtimes are loaded before Python, which was
# built without them; leaks are not looked for, since Python itself leaves some.
set -eu
cd "$(dirname "$0")/.."
. tools/venv.sh
prepare dev visionmix.tools pytest hypothesis

cache=$(mktemp -d)
trap 'rm -rf "$cache"' EXIT
CXX="g++ -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g"
VISIONMIX_CACHE=$cache VISIONMIX_KERNELS=auto CXX=$CXX OMP_NUM_THREADS=2 \
    ASAN_OPTIONS=detect_leaks=0:verify_asan_link_order=0 UBSAN_OPTIONS=print_stacktrace=1 \
    LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so) $(g++ -print-file-name=libstdc++.so)" \
    .venv/bin/python -m pytest -p no:xdist -q -k "cpu and not graph" tests/kernels "$@"
