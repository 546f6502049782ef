# CARE (arXiv 2411.16170) publishes no configuration: PVT's settings, and the drop path of its classifier.
_base_ = "_base_/mask_rcnn_pvt_1x.py"
model = dict(backbone=dict(name="care_s0", drop_path_rate=0.1), neck=dict(in_channels=[32, 64, 128, 256]))
