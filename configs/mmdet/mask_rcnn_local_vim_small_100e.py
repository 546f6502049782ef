# LocalMamba (arXiv 2403.09338), github.com/hunto/LocalMamba,
# detection/configs/local_mamba/vitdet_cascade_mask-rcnn_local_vim_small_lsj-100e.py: as the tiny model's, whose
# directions of scans it has there, without weights; here its own.
_base_ = "mask_rcnn_local_vim_tiny_100e.py"
model = dict(backbone=dict(name="local_vim_small"), neck=dict(in_channels=384))
