# VSSD (arXiv 2407.18559), github.com/YuHengsss/VSSD, README.md; drop path is that of its shorter training.
_base_ = "_base_/mask_rcnn_3x.py"
model = dict(backbone=dict(name="vssd_small", drop_path_rate=0.4), neck=dict(in_channels=[64, 128, 256, 512]))
