"""Train a detector by a config of mmdet, with a backbone of this library.

python tools/train_det.py configs/mmdet/mask_rcnn_vmamba_tiny_1x.py --data /data/coco
torchrun --nproc-per-node 8 tools/train_det.py configs/mmdet/retinanet_vig_h_t_1x.py --data /data/coco
visionmix train-det mmdet/mask_rcnn_vmamba_tiny_1x.py --data /data/coco --cfg-options train_dataloader.batch_size=4
"""

import sys

from visionmix.tools import openmmlab


def main(argv: list[str] | None = None) -> int:
    """Run the `train-det` command with these arguments."""
    return openmmlab.train("mmdet", argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
