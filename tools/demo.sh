#!/bin/sh
# Trains a small ViG on photographs, from nothing but Python 3.10+ and pip:
#
#     sh tools/demo.sh                  # makes .venv, data/photos and output/demo
#     sh tools/demo.sh --epochs 20      # arguments go to tools/train.py; --overwrite starts anew
#
# Running it again goes on where the last run stopped. PYTHON chooses the interpreter that makes .venv.
set -eu
cd "$(dirname "$0")/.."
. tools/venv.sh

prepare demo visionmix.tools skimage matplotlib rich
.venv/bin/python tools/demo_data.py photos --out data/photos
.venv/bin/python tools/train.py configs/demo/vig_photos.yaml --data data/photos --output output/demo --resume "$@"
say ""
say "Next:  .venv/bin/python tools/predict.py data/photos/val/cat --checkpoint output/demo/best.safetensors"
