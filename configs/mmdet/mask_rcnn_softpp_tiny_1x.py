# SOFT++ (arXiv 2207.03341), github.com/fudan-zvg/SOFT, README.md names this training and publishes no configuration:
# PVT's settings, and the drop path of its classifier.
_base_ = "_base_/mask_rcnn_pvt_1x.py"
model = dict(backbone=dict(name="softpp_tiny", drop_path_rate=0.1), neck=dict(in_channels=[64, 128, 320, 512]))
