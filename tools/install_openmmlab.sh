#!/bin/sh
# Installs mmdet 3, mmseg 1 and mmpretrain 1 into .venv, from nothing but Python 3.10+, pip and a C++20 compiler:
#
#     sh tools/install_openmmlab.sh
#
# They come from the line that is maintained on PyPI under the prefix onedl-, and import as mmengine, mmcv, mmdet, mmseg
# and mmpretrain. mmcv is compiled here (9 minutes on 2 cores), since its released setup asks for C++17 where the headers
# of current PyTorch want C++20; its wheel is kept in the user's cache (VISIONMIX_CACHE, else the platform's), so that
# the next environment takes seconds. MAX_JOBS sets how many files are compiled at a time, CXX the compiler.
set -eu
cd "$(dirname "$0")/.."
. tools/venv.sh

# Releases that were seen to work together.
mmcv=2.3.6
packages="onedl-mmengine==0.10.12 onedl-mmdetection==3.5.1 onedl-mmsegmentation==1.4.2 onedl-mmpretrain==1.3.6"
# What these import, by hand and without dependencies: those that imaug declares hold numpy below 2.3 and bring OpenCV
# twice, with and without a window system, each in the other's folder.
needs="addict click einops ftfy imaug markdown mat4py model-index opencv-python-headless ordered-set platformdirs
    prettytable pycocotools pyyaml regex shapely six tabulate termcolor terminaltables tqdm wcwidth yapf"

installed() {
    .venv/bin/python -W ignore -c "
import mmcv.ops, mmdet.datasets, mmdet.evaluation, mmdet.models, mmseg.datasets, mmseg.evaluation, mmseg.models
import mmpretrain.models"
}
pip() { .venv/bin/python -m pip "$@"; }

prepare demo visionmix.tools skimage
if installed >/dev/null 2>&1; then
    say "mmdet, mmseg and mmpretrain are installed in .venv already."
    exit 0
fi
.venv/bin/python -c "
import importlib.metadata, importlib.util, sys
found = importlib.util.find_spec('transformers')
sys.exit(bool(found) and int(importlib.metadata.version('transformers').split('.')[0]) >= 5)" ||
    fail "mmpretrain cannot be imported beside transformers 5, which is installed in .venv. Run: .venv/bin/python -m pip uninstall transformers"

# Where the wheel lies: a folder for each combination that it was built for.
folder=$(.venv/bin/python - "$mmcv" <<'PYTHON'
import sys
import sysconfig

import torch
from visionmix.kernels.native import cache_folder

device = "cpu"
if torch.cuda.is_available():
    from torch.utils.cpp_extension import CUDA_HOME

    device = "cuda" if CUDA_HOME else "cpu"
parts = [f"mmcv{sys.argv[1]}", f"torch{torch.__version__}", sys.implementation.cache_tag, sysconfig.get_platform()]
print(cache_folder() / "openmmlab" / "-".join([*parts, device]))
PYTHON
) || fail "The cache folder cannot be made; its message stands above. VISIONMIX_CACHE names another."

# Compiles mmcv into $folder: aside first, so that an interrupted build leaves nothing that looks like a wheel.
build() {
    compiler=${CXX:-$(command -v c++ || command -v g++ || command -v clang++)} ||
        fail "No C++ compiler found. Install g++ or clang++, or name one: CXX=/path/to/c++ sh $0"
    aside="$folder.$$"
    mkdir -p "$aside"
    trap 'rm -rf "$aside"' EXIT
    trap 'exit 130' INT TERM
    cat >"$aside/c++" <<WRAPPER
#!/bin/sh
# mmcv's setup asks for C++17; the headers of current PyTorch want C++20.
for argument; do
    shift
    case \$argument in -std=c++17) argument=-std=c++20 ;; esac
    set -- "\$@" "\$argument"
done
exec $compiler "\$@"
WRAPPER
    chmod +x "$aside/c++"
    say "Compiling mmcv $mmcv, once for this PyTorch and Python (9 minutes on 2 cores; the log: $folder.log) ..."
    pip install --quiet --disable-pip-version-check 'setuptools>=80' wheel packaging ninja ||
        fail "The build tools could not be installed; pip's message stands above."
    case $folder in
        *-cuda) ;;
        *) export CUDA_VISIBLE_DEVICES="" ;; # else mmcv's setup would look for nvcc
    esac
    PATH="$PWD/.venv/bin:$PATH" CXX="$aside/c++" CC="$aside/c++" CFLAGS="${CFLAGS:-} -g0" \
        MAX_JOBS="${MAX_JOBS:-$(.venv/bin/python -c 'import os; print(len(os.sched_getaffinity(0)))' 2>/dev/null || echo 2)}" \
        .venv/bin/python -m pip wheel -v --disable-pip-version-check --no-build-isolation --no-deps \
        --no-binary onedl-mmcv --no-cache-dir "onedl-mmcv==$mmcv" --wheel-dir "$aside/wheel" >"$folder.log" 2>&1 ||
        fail "mmcv could not be compiled; $folder.log says why."
    rm -rf "$folder"
    mv "$aside/wheel" "$folder"
    say "The wheel is kept in $folder ($(du -sh "$folder" | cut -f1))."
}

if ! ls "$folder"/onedl_mmcv-*.whl >/dev/null 2>&1; then build; else say "Using the mmcv wheel in $folder."; fi
# The build tools that their setups need; they import torch, hence no isolation.
pip install --quiet --disable-pip-version-check 'setuptools>=77' wheel
# shellcheck disable=SC2086  # lists
pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation $packages $needs "$folder"/onedl_mmcv-*.whl ||
    fail "The installation failed; pip's message stands above. Run this again once that is mended."
installed >/dev/null || fail "Installed, but an import fails; the message stands above."
say "mmdet, mmseg and mmpretrain are installed in .venv."
