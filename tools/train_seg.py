"""Train a segmentation model by a config of mmseg, with a backbone of this library.

python tools/train_seg.py configs/mmseg/upernet_vmamba_tiny_160k.py --data /data/ade20k
torchrun --nproc-per-node 8 tools/train_seg.py configs/mmseg/upernet_vig_h_t_160k.py --data /data/ade20k
visionmix train-seg mmseg/upernet_vmamba_tiny_160k.py --data /data/ade20k
"""

import sys

from visionmix.tools import openmmlab


def main(argv: list[str] | None = None) -> int:
    """Run the `train-seg` command with these arguments."""
    return openmmlab.train("mmseg", argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
